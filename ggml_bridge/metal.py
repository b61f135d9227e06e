"""Which nodes ggml's Metal backend runs. A node that it does not run would move to the CPU, with copies both ways.

The table is that of ggml 0.20 (`ggml_metal_device_supports_op`) for Apple silicon, restricted to what `Graph` records.
It makes the question answerable on machines without Metal.
"""

from typing import TYPE_CHECKING

from ggml_bridge.records import VIEWS, Node, refused

if TYPE_CHECKING:
    from ggml_bridge.core import Graph
    from ggml_bridge.session import Session

FLOATS = ("f32", "f16")

# elementwise over one input: f32 or f16 with contiguous rows
ONE_INPUT = {
    *("SCALE", "FILL", "CLAMP", "SQR", "SQRT", "SIN", "COS", "LOG"),
    *("TANH", "RELU", "SIGMOID", "SILU", "ELU", "GELU", "GELU_ERF", "GELU_QUICK"),
    *("NEG", "ABS", "SGN", "STEP", "EXP", "EXPM1", "SOFTPLUS"),
}

# elementwise over two inputs of one type with contiguous rows
TWO_INPUTS = {"ADD", "SUB", "MUL", "DIV"}

# reductions and normalisations over contiguous rows
ROWS = {"SUM_ROWS", "CUMSUM", "MEAN", "SOFT_MAX", "NORM", "RMS_NORM", "L2_NORM"}

GATED = {"REGLU", "GEGLU", "SWIGLU", "GEGLU_ERF", "GEGLU_QUICK"}

ANY = {"REPEAT", "ROPE", "ROPE_BACK", "MUL_MAT", "GET_ROWS", "ARGMAX", "OPT_STEP_ADAMW", "OPT_STEP_SGD"}

# type copied from -> types copied to
COPIES = {"f32": ("f32", "f16", "bf16", "i32"), "f16": ("f32", "f16"), "bf16": ("f32", "bf16"), "i32": ("f32", "i32")}
QUANTIZED = {"q4_0", "q4_1", "q5_0", "q5_1", "q8_0"}  # these are copied to f32 and f16

CUMSUM_LONGEST = 1024 * 1024  # two passes over blocks of at most 1024


def reason(node: Node) -> str | None:
    """Why Metal does not run a `Node`, or None when it does."""
    sources = node.sources
    if node.op in VIEWS or node.op in ANY:
        return None
    if not sources:
        return "Metal has no such operation"
    first = sources[0]
    if node.op in ONE_INPUT:
        if first.dtype not in FLOATS:
            return f"input is {first.dtype}, not f32 or f16"
        return None if first.contiguous_rows else "rows of the input are strided"
    if node.op in TWO_INPUTS:
        if first.dtype not in FLOATS or first.dtype != sources[1].dtype:
            return f"inputs are {first.dtype} and {sources[1].dtype}, not both f32 or both f16"
        return None if first.contiguous_rows and sources[1].contiguous_rows else "rows of an input are strided"
    if node.op in ROWS:
        if node.op == "CUMSUM" and first.shape[-1] > CUMSUM_LONGEST:
            return f"rows are longer than {CUMSUM_LONGEST}"
        return None if first.contiguous_rows else "rows of the input are strided"
    if node.op == "SUM":
        return None if first.contiguous else "input is not contiguous"
    if node.op in GATED:
        if first.dtype not in FLOATS:
            return f"input is {first.dtype}, not f32 or f16"
        return None if first.contiguous_rows else "rows of the input are strided"
    if node.op == "SILU_BACK":
        return None if all(s.contiguous and s.dtype == "f32" for s in sources) else "inputs are not contiguous f32"
    if node.op == "CONCAT":
        return None if first.dtype == sources[1].dtype else "inputs are of different types"
    if node.op in ("CPY", "CONT", "DUP"):
        allowed = ("f32", "f16") if first.dtype in QUANTIZED else COPIES.get(first.dtype, ())
        return None if node.dtype in allowed else f"no copy from {first.dtype} to {node.dtype}"
    if node.op == "SET_ROWS":
        return None if first.dtype == "f32" else f"rows are {first.dtype}, not f32"
    return "Metal has no such operation"


def metal_unsupported(graph: "Graph | Session") -> list[tuple[Node, str]]:
    """The nodes of a Graph or Session that Metal does not run, as a list of (Node, reason)."""
    return refused(graph, reason)
