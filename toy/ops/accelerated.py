"""The op table of `reference` on compiled kernels: the same names, parameters and results, float32 only.

Each op is a function of `toy._kernels`; its numpy twin, with the formula and the shapes, stands in `toy/ops/reference.py`.
Results agree with the reference to 2e-6 of the largest element. What differs:

* Caches hold less (attention keeps no probabilities, cross_entropy only refers to the logits) and are opaque.
* Matrices may be columns of a wider one (rows contiguous); parameters and their gradients must be C-contiguous.
* Whatever else is wrong with an argument is a ValueError that names it.

Importing this module raises ImportError, with what to do, where the kernels are not built.
"""

import numpy as np

from toy._kernels.attention import attention, attention_backward, concat, split
from toy._kernels.elementwise import add, gelu, gelu_backward, silu, silu_backward, swiglu, swiglu_backward
from toy._kernels.embedding import embedding, embedding_backward, rope, rope_backward
from toy._kernels.linear import linear, linear_backward
from toy._kernels.loss import cross_entropy, cross_entropy_backward
from toy._kernels.norms import layer_norm, layer_norm_backward, rms_norm, rms_norm_backward
from toy._kernels.optimizer import adamw_step, scale_, sum_of_squares
from toy._kernels.threads import get_num_threads, set_num_threads

name = "accelerated"


def scale(x, factor):
    """factor * x, in a new array."""
    out = np.array(x, order="C")
    scale_(out, factor)
    return out


__all__ = [
    "adamw_step",
    "add",
    "attention",
    "attention_backward",
    "concat",
    "cross_entropy",
    "cross_entropy_backward",
    "embedding",
    "embedding_backward",
    "gelu",
    "gelu_backward",
    "get_num_threads",
    "layer_norm",
    "layer_norm_backward",
    "linear",
    "linear_backward",
    "name",
    "rms_norm",
    "rms_norm_backward",
    "rope",
    "rope_backward",
    "scale",
    "scale_",
    "set_num_threads",
    "silu",
    "silu_backward",
    "split",
    "sum_of_squares",
    "swiglu",
    "swiglu_backward",
]
