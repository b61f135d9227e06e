"""Where models lie on this machine, and what they are called: our own cache and those of other programs.

Names: of `toy fetch` (smollm2-135m); OWNER/REPO or OWNER/REPO/FILE of the Hugging Face hub's cache and of LM Studio's;
NAME:TAG of Ollama's; FILE of llama.cpp's own downloads. Only the heads of files are read.

Sources: the layout of the hub's cache, https://huggingface.co/docs/huggingface_hub/guides/manage-cache; of Ollama's models
folder, which keeps manifests as an OCI registry does, https://github.com/opencontainers/image-spec/blob/main/manifest.md.
"""

import contextlib
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from toy.files.errors import BadFileError, printable
from toy.files.fetch import FETCHABLE, cache_dir, cached
from toy.files.gguf import part_number, parts_of, read_head
from toy.files.gguf_models import UnsupportedModelError, check_kind
from toy.files.gguf_types import FILE_TYPES
from toy.files.hugging_face import CONFIG, weight_files
from toy.files.hugging_face_config import config_of
from toy.files.safetensors_file import PICKLES, read_json

_DEEPEST = 6  # folders below the root of a cache
_MANIFEST = 2**20  # bytes, the largest that is read
_MODEL, _ADAPTER = "application/vnd.ollama.image.model", "application/vnd.ollama.image.adapter"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class Found(NamedTuple):
    """A model file, or the folder of a model for transformers. name: what commands take for it. place: whose cache it is in.
    problem: why it cannot be used by that name at all, None of most."""

    name: str
    path: Path
    place: str
    problem: str | None = None


class Head(NamedTuple):
    """What the head of a model file, or the config of a folder, says. n_bytes: of all its parts. type: of most of its
    weights, "" where it is not said. kind: "model" or "adapter". problem: why this library can neither run nor train it, None
    where it can."""

    architecture: str
    n_bytes: int
    type: str = ""
    kind: str = "model"
    problem: str | None = None


def caches() -> dict[str, Path]:
    """The folders that are looked through, by whose they are. Each may be missing.

    Ours: `cache_dir`. Hugging Face: HF_HUB_CACHE, or `hub` in HF_HOME. LM Studio: ~/.lmstudio/models. Ollama: OLLAMA_MODELS,
    or ~/.ollama/models. llama.cpp: LLAMA_CACHE, or `llama.cpp` in the platform's cache folder.
    """
    home, environment = Path.home(), os.environ
    general = Path(environment.get("XDG_CACHE_HOME") or home / ".cache")
    hub_home = Path(environment.get("HF_HOME") or general / "huggingface")
    llama_cpp = home / "Library" / "Caches" if sys.platform == "darwin" else general
    if sys.platform == "win32":
        llama_cpp = Path(environment.get("LOCALAPPDATA") or home / "AppData" / "Local")
    return {
        "toy": cache_dir(),
        "Hugging Face": Path(environment.get("HF_HUB_CACHE") or hub_home / "hub"),
        "LM Studio": home / ".lmstudio" / "models",
        "Ollama": Path(environment.get("OLLAMA_MODELS") or home / ".ollama" / "models"),
        "llama.cpp": Path(environment.get("LLAMA_CACHE") or llama_cpp / "llama.cpp"),
    }


def models_in_caches() -> list[Found]:
    """Every model file in the `caches`, in their order and by name. A folder that cannot be read has none."""
    readers: dict[str, Callable[[Path], Iterator[Found]]] = {
        "toy": _ours, "Hugging Face": _of_the_hub, "LM Studio": _of_lm_studio, "Ollama": _of_ollama,
        "llama.cpp": _of_llama_cpp,
    }  # fmt: skip
    return [
        found
        for place, root in caches().items()
        for found in sorted(readers[place](root), key=lambda f: (f.name, f.path))
    ]


def find_model(model: str | os.PathLike[str]) -> Path:
    """The path that the name of a model means: a path where something is, or a name of `models_in_caches`.

    Raises FileNotFoundError (with the command to type) when there is neither, ValueError for a name that two files have and
    for one that cannot be used.
    """
    path, name = Path(model), os.fspath(model)
    if path.exists():
        return path
    if name in FETCHABLE:
        if found := cached(name):
            return found
        raise FileNotFoundError(f"the model {name} was not fetched yet: type `toy fetch {name}`")
    if _may_be_a_name(name):
        wanted = {name, f"{name}:latest"}
        same = {found.path: found for found in models_in_caches() if found.name in wanted}
        if len(same) > 1:
            there = " and ".join(f"{found.path} ({found.place})" for found in same.values())
            raise ValueError(f"{name!r} names {len(same)} files: {there}. Give the path of one")
        for found in same.values():
            if found.problem is not None:
                raise ValueError(f"{name} cannot be used by its name: {found.problem}")
            return found.path
    raise FileNotFoundError(
        f"there is no run directory, checkpoint or GGUF file {name!r}, and no model of that name: `toy list` shows those "
        f"on this machine, `toy fetch` gets {', '.join(FETCHABLE)}"
    )


def _may_be_a_name(name: str) -> bool:
    """Whether it is worth looking through the caches: no absolute path, nothing that leads upwards."""
    return bool(re.fullmatch(r"[\w.:/+@ -]{1,300}", name)) and not name.startswith(("/", ".")) and ".." not in name


def head_of(path: str | os.PathLike[str]) -> Head:
    """What a model file says of itself, out of its first bytes. A damaged file is no error: its `problem` says what is wrong.

    That the head names a model which this library has does not promise that every key and tensor of it is known: opening it
    looks at all of them.
    """
    path = Path(path)
    if path.is_dir():
        return _head_of_folder(path)
    try:
        parts = parts_of(path)
        n_bytes = sum(part.stat().st_size for part in parts)
        metadata = read_head(path)
    except BadFileError as error:
        with contextlib.suppress(OSError):
            return Head("", path.stat().st_size, problem=error.problem)
        return Head("", 0, problem=error.problem)
    except OSError as error:
        return Head("", 0, problem=f"{error.filename or path}: {error.strerror or error}")
    architecture, number = str(metadata.get("general.architecture", "")), metadata.get("general.file_type")
    kind = "adapter" if metadata.get("general.type") == "adapter" else "model"
    type_name = FILE_TYPES.get(number, "") if isinstance(number, int) else ""
    problem = None
    if kind == "model":
        try:
            check_kind(path, metadata)
        except UnsupportedModelError as error:
            problem = str(error).removeprefix(f"{path} ")
    return Head(printable(architecture), n_bytes, type_name, kind, problem)


def _head_of_folder(path: Path) -> Head:
    """What the configs in a Hugging Face folder say, and whether its weights are there."""
    n_bytes, weights = 0, [entry for entry in _entries(path) if entry.suffix in (".safetensors", *PICKLES)]
    with contextlib.suppress(OSError):
        n_bytes = sum(entry.stat().st_size for entry in weights)
    if (path / "adapter_config.json").exists():
        return Head("", n_bytes, "", "adapter")
    try:
        said = read_json(path / CONFIG)
        architecture, type_name = printable(said.get("model_type", "")), said.get("dtype", said.get("torch_dtype"))
    except (OSError, ValueError) as error:
        return Head("", n_bytes, problem=str(error).removeprefix(f"{path / CONFIG}: "))
    problem = None
    try:
        config_of(path / CONFIG, said)
        weight_files(path)
    except ValueError as error:
        problem = (
            str(error).removeprefix(f"{path / CONFIG}: ").removeprefix(f"{path / CONFIG} ").removeprefix(f"{path} ")
        )
    types = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    return Head(architecture, n_bytes, types.get(type_name, "") if isinstance(type_name, str) else "", "model", problem)


# -- the caches --------------------------------------------------------------------------------------------------------


def _files(root: Path, deepest: int = _DEEPEST) -> Iterator[Path]:
    """The GGUF files below a folder: of a split model the first part alone. Links to folders are not followed."""
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if entry.name.endswith(".gguf"):
            if part_number(entry.name) in (None, 1) and entry.is_file():
                yield Path(entry.path)
        elif deepest and entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path), deepest - 1)


def _ours(root: Path) -> Iterator[Found]:
    for name in FETCHABLE:
        if path := cached(name):
            yield Found(name, path, "toy")
    yield from _of_the_hub(root / "hub", "toy")


def _of_the_hub(root: Path, place: str = "Hugging Face") -> Iterator[Found]:
    for folder in _folders(root):
        if folder.name.startswith("models--"):
            snapshot = _snapshot(folder)
            if snapshot is not None:
                repository = folder.name.removeprefix("models--").replace("--", "/")
                yield from _named_by_folder(repository, snapshot, place)


def _snapshot(folder: Path) -> Path | None:
    """The checkout of a repository that `main` means; of one that was only fetched by its commit, the newest."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        commit = (folder / "refs" / "main").read_text(encoding="ascii").strip()
        if re.fullmatch(r"[0-9a-f]{7,64}", commit) and (folder / "snapshots" / commit).is_dir():
            return folder / "snapshots" / commit
    checkouts = _folders(folder / "snapshots")
    return max(checkouts, key=lambda checkout: (checkout.stat().st_mtime, checkout.name), default=None)


def _of_lm_studio(root: Path) -> Iterator[Found]:
    for publisher in _folders(root):
        for repository in _folders(publisher):
            yield from _named_by_folder(f"{publisher.name}/{repository.name}", repository, "LM Studio")


def _named_by_folder(repository: str, folder: Path, place: str) -> Iterator[Found]:
    """OWNER/REPO where there is one file, OWNER/REPO/FILE where there are several to choose from; OWNER/REPO is also the
    folder itself, where its model is in safetensors."""
    files = list(_files(folder))
    if any(entry.suffix in (".safetensors", *PICKLES) for entry in _entries(folder)):
        yield Found(repository, folder, place)
        for path in files:
            yield Found(f"{repository}/{path.relative_to(folder).as_posix()}", path, place)
        return
    for path in files:
        inside = path.relative_to(folder).as_posix()
        yield Found(repository if len(files) == 1 else f"{repository}/{inside}", path, place)


def _of_llama_cpp(root: Path) -> Iterator[Found]:
    for path in _files(root):
        yield Found(path.relative_to(root).as_posix(), path, "llama.cpp")


def _of_ollama(root: Path) -> Iterator[Found]:
    manifests = root / "manifests"
    for registry in _folders(manifests):
        for namespace in _folders(registry):
            for model in _folders(namespace):
                for manifest in _entries(model):
                    if manifest.is_file():
                        parts = (registry.name, namespace.name, f"{model.name}:{manifest.name}")
                        plain = itertools.dropwhile(lambda part: part in ("registry.ollama.ai", "library"), parts)
                        yield _ollama_model("/".join(plain), manifest, root / "blobs")


def _ollama_model(name: str, manifest: Path, blobs: Path) -> Found:
    """The model that a manifest names, by the digest of its content."""
    digests: dict[str, list[str]] = {_MODEL: [], _ADAPTER: []}
    try:
        for layer in _layers(manifest):
            digest = layer.get("digest")
            if layer.get("mediaType") in digests:
                if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
                    raise BadFileError(manifest, "names a layer by something that is no sha256 digest")
                digests[layer["mediaType"]].append(digest.replace(":", "-"))
    except (BadFileError, OSError) as error:
        return Found(name, manifest, "Ollama", problem=str(error))
    if len(digests[_MODEL]) != 1:
        return Found(
            name, manifest, "Ollama", problem=f"its manifest {manifest} names {len(digests[_MODEL])} model files"
        )
    path = blobs / digests[_MODEL][0]
    if digests[_ADAPTER]:
        adapters = ", ".join(str(blobs / digest) for digest in digests[_ADAPTER])
        return Found(
            name, path, "Ollama",
            problem=f"it is a model with an adapter, two files here: take the model {path} with --adapter {adapters}",
        )  # fmt: skip
    return Found(name, path, "Ollama")


def _layers(manifest: Path) -> list[dict[str, Any]]:
    layers = read_json(manifest, _MANIFEST).get("layers")
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise BadFileError(manifest, "is no manifest of a model: it has no list of layers")
    return layers


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _folders(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.is_dir()]
