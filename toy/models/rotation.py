"""How far RoPE turns: what a Llama's config says of it, as the arguments of the op `rope`.

Three things stretch the angles of a longer context over those of training, alone or together: factors of their own for each
pair (Llama 3.1), one factor for all pairs (linear: Chen et al. 2023, section 3.2), and YaRN (Peng et al. 2023, section 3.2),
which stretches the slow pairs, leaves the fast ones, and sharpens attention. All of it is a divisor of each pair's frequency
and one magnitude. The numbers are llama.cpp's.
"""

import math
from typing import Any

import numpy as np

from toy.config import LlamaConfig

# turns within the original context: a pair with more is not stretched at all, one with fewer wholly (YaRN's beta and alpha)
FAST, SLOW = 32, 1


def rotation(c: LlamaConfig, windowed: bool = False) -> dict[str, Any]:
    """The arguments base, halves, factors and magnitude of `rope`; those that are at their default are left out. windowed: in
    the layers with a window."""
    arguments: dict[str, Any] = {"base": c.rope_base}
    if c.rope_halves:
        arguments["halves"] = True
    if windowed and c.rope_local_base is not None:
        arguments["base"] = c.rope_local_base
        return arguments | ({} if c.rope_attn_factor == 1 else {"magnitude": c.rope_attn_factor})
    factors = np.ones(c.d_head // 2) if c.rope_factors is None else np.array(c.rope_factors)
    magnitude = c.rope_attn_factor
    if c.rope_scaling == "linear":
        factors *= c.rope_scale
    elif c.rope_scaling == "yarn":
        factors /= stretch(c)
        sharper = 0.1 * math.log(max(c.rope_scale, 1))
        magnitude *= (1 + sharper) / (1 + c.yarn_log_multiplier * sharper)
    if (factors != 1).any():
        arguments["factors"] = tuple(factors.tolist())
    if magnitude != 1:
        arguments["magnitude"] = magnitude
    return arguments


def stretch(c: LlamaConfig) -> np.ndarray:
    """What YaRN multiplies each pair's frequency with, from 1 (fast) to 1 / rope_scale (slow) -> (d_head/2,)."""
    context = c.rope_original_context or c.context_length

    def pair_with(turns: float) -> float:
        """The pair that turns so often within the original context, as a fraction."""
        return c.d_head * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(c.rope_base))

    first = max(0, math.floor(pair_with(FAST)))
    last = min(c.d_head - 1, math.ceil(pair_with(SLOW)))
    slow = np.clip((np.arange(c.d_head // 2) - first) / max(0.001, last - first), 0, 1)  # how slow a pair is
    return (1 - slow) + slow / c.rope_scale
