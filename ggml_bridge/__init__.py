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
with the reason. TOY_GGML_DIR names a ggml build of your own (`python -m ggml_bridge.build cuda` makes one);
TOY_GGML_LOG=1 prints what ggml logs.
"""

from typing import TYPE_CHECKING, Any

from ggml_bridge.library import available, devices, find_device, load, notices, quantize, start, version
from ggml_bridge.loading import LoadError
from ggml_bridge.records import Device, Explanation, Node, Source

if TYPE_CHECKING:
    from ggml_bridge.core import Backend, Graph, Tensor
    from ggml_bridge.cuda import cuda_unsupported
    from ggml_bridge.metal import metal_unsupported
    from ggml_bridge.session import Session

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
    "cuda_unsupported",
    "devices",
    "find_device",
    "load",
    "metal_unsupported",
    "notices",
    "quantize",
    "version",
]


def __getattr__(name: str) -> Any:
    if name in ("Backend", "Graph", "Tensor"):
        return getattr(start(), name)
    if name == "Session":
        from ggml_bridge.session import Session

        return Session
    if name == "cuda_unsupported":
        from ggml_bridge.cuda import cuda_unsupported

        return cuda_unsupported
    if name == "metal_unsupported":
        from ggml_bridge.metal import metal_unsupported

        return metal_unsupported
    raise AttributeError(f"module 'ggml_bridge' has no attribute {name!r}")
