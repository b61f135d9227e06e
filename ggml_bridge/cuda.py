"""Which nodes ggml's CUDA backend runs; see metal.py, which answers the same for Metal.

The table is that of ggml 0.20 (`ggml_backend_cuda_device_supports_op`), restricted to what `Graph` records.
"""

from typing import TYPE_CHECKING

from ggml_bridge.records import VIEWS, Node, refused

if TYPE_CHECKING:
    from ggml_bridge.core import Graph
    from ggml_bridge.session import Session

ANY = {"SCALE", "SQR", "SQRT", "SIN", "COS", "CLAMP", "LOG", "ARGMAX", "SET_ROWS", "CONT", "SOFT_MAX", "FILL", "CUMSUM"}
ANY |= {"OPT_STEP_ADAMW", "OPT_STEP_SGD", "CONCAT", "GET_ROWS"}

CONTIGUOUS = {"TANH", "RELU", "SIGMOID", "SILU", "ELU", "GELU", "GELU_ERF", "GELU_QUICK", "NEG", "ABS", "SGN", "STEP"}
CONTIGUOUS |= {"EXP", "EXPM1", "SOFTPLUS", "SILU_BACK", "SUM_ROWS", "MEAN"}
CONTIGUOUS_ROWS = {"NORM", "RMS_NORM", "L2_NORM", "SUM", "MUL_MAT", "ROPE", "ROPE_BACK"}
CONTIGUOUS_ROWS |= {"REGLU", "GEGLU", "SWIGLU", "GEGLU_ERF", "GEGLU_QUICK"}

FLOATS = ("f32", "f16")
ELEMENTWISE = {"ADD", "SUB", "MUL", "DIV"}
COPIES = {"f32": ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "i32"), "i32": ("f32", "i32")}
COPIES |= {half: ("f32", "f16", "bf16") for half in ("f16", "bf16")}
COPIES |= {quantized: ("f32",) for quantized in ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1")}


def reason(node: Node) -> str | None:
    """Why ggml's CUDA backend does not run a `Node`, or None when it does."""
    sources = node.sources
    if node.op in VIEWS or node.op in ANY:
        return None
    if not sources:
        return "CUDA has no such operation"
    first = sources[0]
    if node.op in CONTIGUOUS:
        return None if first.contiguous else "the input is not contiguous"
    if node.op in CONTIGUOUS_ROWS:
        strided = [s for s in (sources[:2] if node.op == "MUL_MAT" else sources[:1]) if not s.contiguous_rows]
        return "rows of an input are strided" if strided else None
    if node.op in ELEMENTWISE:
        types = {s.dtype for s in sources} | {node.dtype}
        return None if types <= set(FLOATS) else f"types are {', '.join(sorted(types))}, not f32 or f16"
    if node.op == "REPEAT":
        return None if first.dtype in FLOATS else f"input is {first.dtype}, not f32 or f16"
    if node.op in ("CPY", "DUP"):
        return None if node.dtype in COPIES.get(first.dtype, ()) else f"no copy from {first.dtype} to {node.dtype}"
    return "CUDA has no such operation"


def cuda_unsupported(graph: "Graph | Session") -> list[tuple[Node, str]]:
    """The nodes of a Graph or Session that ggml's CUDA backend does not run, as a list of (Node, reason)."""
    return refused(graph, reason)
