"""The ggml library: opened once, its devices, its version."""

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ggml_bridge import loading
from ggml_bridge.loading import LoadError
from ggml_bridge.records import Device

if TYPE_CHECKING:
    import numpy as np  # importing the bridge loads nothing

_loaded: dict[
    str, Any
] = {}  # "core": the extension, bound; "directory": of the libraries; "error": the LoadError of a failed attempt


def load() -> ModuleType:
    """Open libggml and return the compiled core. Raises LoadError (always the same one after a failure)."""
    if "error" in _loaded:
        raise _loaded["error"]
    if "core" not in _loaded:
        try:
            _loaded["core"], _loaded["directory"] = _open()
        except LoadError as error:
            _loaded["error"] = error
            raise
    return _loaded["core"]


def _open() -> tuple[ModuleType, Path]:
    try:
        from ggml_bridge import core
    except ImportError as error:
        raise LoadError(f"the compiled part of ggml_bridge is missing ({error}): {loading.how_to_rebuild()}") from error
    directory = loading.library_directory()
    missing = loading.missing_cpu_features(core.x86_features())
    if missing:
        raise LoadError(
            f"the prebuilt ggml needs {', '.join(missing)}, which this processor lacks; build ggml here: "
            f"pip install --force-reinstall --no-binary libggml-python {loading.SOURCES} "
            "-C cmake.define.GGML_NATIVE=ON"
        )
    core._bind(loading.addresses(loading.open_libraries(directory), core.function_names()))
    loading.check_version(core.headers_version(), core.library_version())
    core.check_layout()
    return core, directory


def start() -> ModuleType:
    """The core with its backends registered, which initialises the devices."""
    core = load()
    core.load_backends(_loaded["directory"])
    return core


def available() -> tuple[bool, str]:
    """(True, "ggml 0.20.2 from ...") or (False, why not and what to type)."""
    try:
        core = load()
    except LoadError as error:
        return False, str(error)
    return True, f"ggml {core.library_version()} from {_loaded['directory']}"


def version() -> str:
    """The version of the ggml library, for example "0.20.2". Raises LoadError."""
    return load().library_version()


def quantize(array: "np.ndarray", dtype: str) -> "np.ndarray":
    """float32 (rows, n) -> uint8 (rows, bytes of a row) in one of ggml's types ("q4_k", "q8_0", ...), by ggml's own
    quantiser.

    Raises LoadError without ggml; ValueError for a type that cannot be made of numbers alone, rows that are no multiple of
    its block, and numbers that are not finite.
    """
    return load().quantize(array, dtype)


def devices() -> list[Device]:
    """The devices of this ggml as `Device` records: CPU, Metal, other GPUs, accelerators. Raises LoadError."""
    return start().devices()


def find_device(name: str) -> Device:
    """The `Device` of a name, a backend's name ("metal") or a kind ("gpu"). Raises ValueError, listing those there are."""
    return start().device(name)


def notices() -> list[str]:
    """Sentences about backends of this ggml, such as CUDA, that found no device, and what to do. Raises LoadError."""
    core = start()
    return loading.notices(core.backends(), core.devices(), core.said_when_started())
