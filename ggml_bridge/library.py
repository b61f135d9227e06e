"""The ggml library: opened once, its devices, its version."""

from ggml_bridge import loading
from ggml_bridge.loading import LoadError

_loaded = {}  # "core": the extension, bound; "directory": of the libraries; "error": the LoadError of a failed attempt


def load():
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


def _open():
    try:
        from ggml_bridge import core
    except ImportError as error:
        raise LoadError(f"the compiled part of ggml_bridge is missing ({error}): {loading.how_to_rebuild()}") from error
    directory = loading.library_directory()
    missing = loading.missing_cpu_features(core.x86_features())
    if missing:
        raise LoadError(
            f"the prebuilt ggml needs {', '.join(missing)}, which this processor lacks; build ggml here: "
            "pip install --force-reinstall --no-binary libggml-python libggml-python==0.20.2.post1 "
            "-C cmake.define.GGML_NATIVE=ON"
        )
    core._bind(loading.addresses(loading.open_libraries(directory), core.function_names()))
    loading.check_version(core.headers_version(), core.library_version())
    core.check_layout()
    return core, directory


def start():
    """The core with its backends registered, which initialises the devices."""
    core = load()
    core.load_backends(_loaded["directory"])
    return core


def available():
    """(True, "ggml 0.20.2 from ...") or (False, why not and what to type)."""
    try:
        core = load()
    except LoadError as error:
        return False, str(error)
    return True, f"ggml {core.library_version()} from {_loaded['directory']}"


def version():
    """The version of the ggml library, for example "0.20.2". Raises LoadError."""
    return load().library_version()


def devices():
    """The devices of this ggml as `Device` records: CPU, Metal, other GPUs, accelerators. Raises LoadError."""
    return start().devices()


def find_device(name):
    """The `Device` of a name, a backend's name ("metal") or a kind ("gpu"). Raises ValueError, listing those there are."""
    return start().device(name)
