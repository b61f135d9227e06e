"""Which tensor of a GGUF file gets which type: the plain types, and llama.cpp's mixes such as q4_k_m.

A mix keeps more bits where an error costs more: the output matrix, and in some of the blocks the values and the way down of
the MLP. The rules are those of llama.cpp's quantiser (its llama-quant.cpp), for a dense model without a table of
importances.
"""

from collections.abc import Mapping
from typing import NamedTuple

from toy.quantized import TYPES


class Mix(NamedTuple):
    """base: the type of a matrix nothing else is said of. file_type: the number of general.file_type. better: the type of the
    matrices that matter more, in the blocks that get it; first: whether those are the first eighth of the blocks alone."""

    base: str
    file_type: int
    better: str | None = None
    first: bool = False


MIXES = {
    "f32": Mix("F32", 0), "f16": Mix("F16", 1), "bf16": Mix("BF16", 32), "q8_0": Mix("Q8_0", 7),
    "q4_0": Mix("Q4_0", 2), "q4_1": Mix("Q4_1", 3), "q5_0": Mix("Q5_0", 8), "q5_1": Mix("Q5_1", 9),
    "q4_k_s": Mix("Q4_K", 14, "Q5_K", first=True), "q4_k_m": Mix("Q4_K", 15, "Q6_K"),
    "q5_k_s": Mix("Q5_K", 16), "q5_k_m": Mix("Q5_K", 17, "Q6_K"), "q6_k": Mix("Q6_K", 18), "iq4_nl": Mix("IQ4_NL", 25),
}  # fmt: skip
# the numbers of general.file_type in llama.h, for showing: those above, and what is read but not written
FILE_TYPES = {mix.file_type: name for name, mix in MIXES.items()} | {
    10: "q2_k", 11: "q3_k_s", 12: "q3_k_m", 13: "q3_k_l", 19: "iq2_xxs", 20: "iq2_xs", 21: "q2_k_s", 22: "iq3_xs",
    23: "iq3_xxs", 24: "iq1_s", 26: "iq3_s", 27: "iq3_m", 28: "iq2_s", 29: "iq2_m", 30: "iq4_xs", 31: "iq1_m",
    36: "tq1_0", 37: "tq2_0", 38: "mxfp4", 39: "nvfp4",
}  # fmt: skip
# for rows that are no multiple of 256: types of blocks of 32 with about as many bits
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_FLOATS = ("F32", "F16", "BF16")


def tensor_types(shapes: Mapping[str, tuple[int, ...]], type: str, n_layers: int) -> dict[str, str]:
    """dict of the tensors of a model to the names of their types. type: a name in MIXES."""
    mix, tied = MIXES[type], "output.weight" not in shapes
    return {name: _type_of(name, shape, mix, n_layers, tied) for name, shape in shapes.items()}


def _type_of(name: str, shape: tuple[int, ...], mix: Mix, n_layers: int, tied: bool) -> str:
    if is_plain(name, shape):
        return "F32"
    kind, stem = mix.base, name.removesuffix(".weight").split(".")
    if kind not in (*_FLOATS, "Q8_0"):
        if name == "output.weight" or (tied and name == "token_embd.weight"):
            kind = "Q6_K"
        elif stem[-1] == "attn_v" and mix.first:
            kind = "Q5_K" if int(stem[1]) < 4 else kind
        elif stem[-1] == "ffn_down" and mix.first:
            kind = "Q5_K" if int(stem[1]) < n_layers // 8 else kind
        elif stem[-1] in ("attn_v", "ffn_down") and mix.better is not None:
            kind = mix.better if _gets_more_bits(int(stem[1]), n_layers) else kind
        elif stem[-1] == "attn_qkv" and mix.better is not None and not mix.first:
            kind = {"Q4_K": "Q5_K", "Q5_K": "Q6_K"}[kind]
    return fitting(kind, shape[-1])


def is_plain(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is always F32: llama.cpp wants vectors and GPT-2's positions so."""
    return len(shape) < 2 or name == "position_embd.weight"


def _gets_more_bits(block: int, n_layers: int) -> bool:
    """The first and the last eighth of the blocks, and every third of the others."""
    eighth = n_layers // 8
    return block < eighth or block >= 7 * n_layers // 8 or (block - eighth) % 3 == 2


def fitting(kind: str, columns: int) -> str:
    """The type, or one like it whose blocks divide rows of this many numbers."""
    if columns % TYPES[kind].block and kind in _FALLBACK:
        kind = _FALLBACK[kind]
    return "F16" if columns % TYPES[kind].block else kind
