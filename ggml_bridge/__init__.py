"""ggml for Python, checked: devices, sessions and graphs. It knows nothing about models.

Two interfaces over the same core:

`Session` has one graph, the verbs a student needs, and a backward pass of its own (see session.py and
`examples/gpt2_by_session.py`).

`Backend` and `Graph` are the level below, for code that records its own backward pass:

    import ggml_bridge

    with ggml_bridge.Backend(device="cpu", n_threads=2) as backend:
        w = backend.persistent((4, 3), name="w")        # (out, in); memory of its own, shared by all graphs
        g = backend.graph()
        x = g.input((5, 3), name="x")                   # uploaded before compute()
        y = g.output(g.mul_mat(w, x))                   # x @ w.T, kept for download
        g.allocate()                                    # memory for persistent tensors and for the graph
        w.upload(numpy_weights)
        x.upload(numpy_activations)
        g.compute()                                     # releases the GIL
        y.download()                                    # a new float32 array (5, 3)

Shapes are numpy shapes. Constructors carry ggml's names and argument order. Nodes run in the order of recording.
A backend may have several graphs (training, evaluation) over the same persistent tensors; they compute one at a time.
Nothing here ends the process: what ggml would abort on raises TypeError, ValueError, RuntimeError or MemoryError.
Own C kernels go into a graph with `Graph.custom`; kernel.pxd says how.

Importing this package loads nothing. `available()` tells whether ggml can be used; `load()` raises `LoadError`
with the reason. TOY_GGML_DIR names a ggml build of your own; TOY_GGML_LOG=1 prints what ggml logs.
"""

from ggml_bridge import loading
from ggml_bridge.loading import LoadError
from ggml_bridge.records import Device, Explanation, Node, Source

__all__ = [
    "Backend",
    "Device",
    "Explanation",
    "Graph",
    "LoadError",
    "Node",
    "Session",
    "Source",
    "Tensor",
    "available",
    "devices",
    "find_device",
    "load",
    "metal_unsupported",
    "version",
]

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
        raise LoadError(
            f"the compiled part of ggml_bridge is missing ({error}); install a C compiler and the headers, then: "
            f"{loading.INSTALL} && {loading.REBUILD}"
        ) from error
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


def _start():
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
    return _start().devices()


def find_device(name):
    """The `Device` of a name, a backend's name ("metal") or a kind ("gpu"). Raises ValueError, listing those there are."""
    return _start().device(name)


def __getattr__(name):
    if name in ("Backend", "Graph", "Tensor"):
        return getattr(_start(), name)
    if name == "Session":
        from ggml_bridge.session import Session

        return Session
    if name == "metal_unsupported":
        from ggml_bridge.metal import metal_unsupported

        return metal_unsupported
    raise AttributeError(f"module 'ggml_bridge' has no attribute {name!r}")
