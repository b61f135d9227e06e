"""Finding and opening libggml: the `libggml` package, or a build of the user's own named by TOY_GGML_DIR."""

import ctypes
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from ggml_bridge.records import Device

INSTALL = "pip install 'libggml-python>=0.20.2,<0.21'"
SOURCES = "libggml-python==0.20.2.post1"  # what is compiled here, where the wheel does not do

X86_FEATURES = {1: "AVX2", 2: "FMA", 4: "F16C"}  # the bits of core.x86_features()


class LoadError(RuntimeError):
    """libggml, or the compiled part of the bridge, cannot be used here; the message says why and what to type."""


def how_to_rebuild() -> str:
    """What to type to compile the bridge, again or at last: one package with the kernels, so theirs is the text."""
    try:
        from toy._kernels import rebuild_command
    except ImportError as error:  # neither are they built, and their message ends in the same command
        return f"{INSTALL}, and {error}"
    return f"install a C compiler, then {INSTALL} && {rebuild_command()}"


def library_directory() -> Path:
    """The directory that holds the ggml libraries. Raises LoadError when there is none."""
    own = os.environ.get("TOY_GGML_DIR")
    if own:
        roots = [Path(own)]
        missing = f"TOY_GGML_DIR={own} holds no {_pattern('ggml-base')} (looked in it and in its lib64, lib and bin)"
    else:
        spec = importlib.util.find_spec("libggml")
        if spec is None or spec.submodule_search_locations is None:
            raise LoadError(f"the package libggml-python is not installed; {INSTALL}")
        roots = [Path(place) for place in spec.submodule_search_locations]
        missing = f"the package libggml in {roots[0]} holds no {_pattern('ggml-base')}; {INSTALL} --force-reinstall"
    for root in roots:
        for directory in (root, root / "lib64", root / "lib", root / "bin"):
            if _find(directory, "ggml-base") is not None:
                return directory
    raise LoadError(missing)


def _pattern(stem: str) -> str:
    if sys.platform == "win32":
        return f"{stem}.dll"
    return f"lib{stem}*.dylib" if sys.platform == "darwin" else f"lib{stem}.so*"


def _find(directory: Path, stem: str) -> Path | None:
    """The library file named `stem` in a directory, or None. Linux packages carry one library under three names (.so,
    .so.0, .so.0.20.2): the one that the other libraries ask for (.so.0) is opened, so that it is loaded only once."""
    if sys.platform == "win32":
        names = [f"{stem}.dll", f"lib{stem}.dll"]
    elif sys.platform == "darwin":
        names = [f"lib{stem}.0.dylib", f"lib{stem}.dylib"]
    else:
        names = [f"lib{stem}.so.0", f"lib{stem}.so"]
    candidates = [directory / name for name in names] + sorted(directory.glob(_pattern(stem)))
    return next((path for path in candidates if path.is_file()), None)


def missing_cpu_features(features: int) -> list[str]:
    """Names of the x86 features that the prebuilt Linux and Windows libraries need and this machine lacks.

    features: the bits of `core.x86_features()` (-1: not an x86 processor). A libggml that was compiled here, or one
    named by TOY_GGML_DIR, is trusted to suit the machine.
    """
    if features < 0 or os.environ.get("TOY_GGML_DIR"):
        return []
    try:
        wheel = importlib.metadata.distribution("libggml-python").read_text("WHEEL") or ""
    except importlib.metadata.PackageNotFoundError:
        wheel = ""
    if wheel and not any(tag in wheel for tag in ("manylinux", "musllinux", "win_amd64")):
        return []
    return [name for bit, name in X86_FEATURES.items() if not features & bit]


def open_libraries(directory: Path) -> list[ctypes.CDLL]:
    """Open libggml-base, the backends and libggml, in the order in which they need each other; returns the handles."""
    if sys.platform == "win32":
        os.add_dll_directory(str(directory))
    first = [_find(directory, stem) for stem in ("ggml-base", "ggml-cpu")]
    last = _find(directory, "ggml")
    if last is None:
        raise LoadError(f"{directory} holds ggml-base but no {_pattern('ggml')}: the build is incomplete")
    # other backends (Metal, BLAS, Vulkan, CUDA) that libggml was linked with; one that does not open is only a problem
    # if libggml then does not open either
    stems = ("metal", "blas", "vulkan", "cuda", "hip", "sycl", "opencl", "rpc")
    others = [path for path in (_find(directory, f"ggml-{stem}") for stem in stems) if path is not None]
    handles: list[ctypes.CDLL] = []
    refused: list[str] = []
    for path in [*first, *others, last]:
        if path is None:
            continue
        try:
            handles.append(ctypes.CDLL(str(path)))
        except OSError as error:
            if path in first or path == last:
                raise LoadError("; ".join([f"cannot open {path}: {error}", *refused])) from error
            refused.append(f"{path.name}: {error}")
    return handles


def addresses(handles: Sequence[ctypes.CDLL], names: Iterable[str]) -> dict[str, int]:
    """{name: address} of functions in the opened libraries. Raises LoadError naming those that are missing."""
    names, found = list(names), {}
    for name in names:
        for handle in reversed(handles):
            function = getattr(handle, name, None)
            if function is not None and (address := ctypes.cast(function, ctypes.c_void_p).value):
                found[name] = address
                break
    missing = sorted(set(names) - set(found))
    if missing:
        raise LoadError(
            f"this libggml lacks {', '.join(missing)}; the bridge is written for ggml 0.20: {INSTALL} --force-reinstall"
        )
    return found


def check_version(headers: str, library: str) -> None:
    """ggml's interface changes between releases: the headers the extension was compiled with must be the library's."""
    if headers.split(".")[:2] != library.split(".")[:2]:
        raise LoadError(
            f"ggml_bridge was compiled with the headers of ggml {headers}, but the library is ggml {library}; "
            f"either compile it again: {how_to_rebuild()}; or take the library it was compiled for: "
            f"pip install 'libggml-python=={headers}.*'"
        )


# backends that `python -m ggml_bridge.build` can add -> what it takes for them to find a device
_ADDED = {
    "CUDA": "install NVIDIA's driver (`nvidia-smi` then lists the card), as new as the CUDA toolkit it was built with",
    "Vulkan": "install a Vulkan driver (`vulkaninfo` then lists the device); GGML_VK_VISIBLE_DEVICES=0 shows a software one",
}


def why_missing(wanted: str, backends: Collection[str], devices: Sequence[Device], said: str) -> str:
    """Why a device is not there and what to do, in a clause; "" where nothing is known of it.

    wanted: the device's name in lower case; backends: names of those that are registered; devices: those found; said:
    ggml's complaint when it looked for them.
    """
    for backend in _ADDED:
        name = backend.lower()
        if wanted.startswith(name) and not any(device.backend == backend for device in devices):
            if backend in backends:
                return f"its {_found_none(backend, said)}"
            return (
                f"it was built without {backend}: `python -m ggml_bridge.build {name}` builds one that has it, and then "
                "TOY_GGML_DIR names it"
            )
    return ""


def _found_none(backend: str, said: str) -> str:
    return f"{backend} found no device{f' (ggml: {said})' if said else ''}: {_ADDED[backend]}"


def notices(backends: Collection[str], devices: Sequence[Device], said: str) -> list[str]:
    """A sentence for each backend of this ggml that found no device; arguments as of `why_missing`."""
    busy = {device.backend for device in devices}
    return [f"ggml's {_found_none(name, said)}" for name in _ADDED if name in backends and name not in busy]
