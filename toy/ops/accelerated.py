"""The op table of `reference` on compiled kernels: the same names, parameters and results, float32 only.

Each op is a function of `toy._kernels`; its numpy twin, with the formula and the shapes, stands in `toy/ops/reference.py`.
Results agree with the reference to 2e-6 of the largest element. What differs:

* Caches hold less (attention keeps no probabilities, cross_entropy only refers to the logits) and are opaque.
* Matrices may be columns of a wider one (rows contiguous); parameters and their gradients must be C-contiguous.
* `linear_cross_entropy` writes the gradient of a band of logits over the logits.
* A quantised weight is dequantised inside the product, in the cache of the thread that uses it.
* `toy.ops.precision` makes the same table with the products of `linear` and `linear_cross_entropy` in bfloat16.
* Whatever else is wrong with an argument is a ValueError that names it.

Importing this module raises ImportError, with what to do, where the kernels are not built.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from toy._kernels import embedding as _embedding
from toy._kernels import linear as _linear
from toy._kernels import loss as _loss
from toy._kernels import products as _products
from toy._kernels import quantized as _quantized
from toy._kernels.arrays import check_matrix
from toy._kernels.threads import get_num_threads, set_num_threads  # noqa: F401
from toy.op_table import Array, OpCache, row_bands
from toy.ops.reference import _checked_labels
from toy.ops.reference import again as again
from toy.quantized import QUANTIZED_IS_FROZEN, Leaf, QuantizedMatrix

if TYPE_CHECKING:  # the types of an op are those of its twin
    from toy.ops.reference import *  # noqa: F403
else:  # the ops that a kernel file lists in its __all__ are ops of this table
    from toy._kernels.attention import *  # noqa: F403
    from toy._kernels.elementwise import *  # noqa: F403
    from toy._kernels.embedding import *  # noqa: F403
    from toy._kernels.layout import *  # noqa: F403
    from toy._kernels.loss import *  # noqa: F403
    from toy._kernels.norms import *  # noqa: F403
    from toy._kernels.optimizer import *  # noqa: F403

name = "accelerated"


def masked(x: Array, mask: Array) -> Array:
    """x * mask, both (N, D); numpy's own product, which waits for the memory as a kernel would."""
    return x * mask


class QuantizedCache(NamedTuple):
    """Of an op whose weight is quantised: the backward needs nothing else."""

    weight: QuantizedMatrix
    precision: int = _products.F32


def embedding(token_ids: Array, table: Leaf) -> tuple[Array, OpCache]:
    """Look up one row per id. token_ids: int (N,), table: (V, D) -> (N, D)."""
    if isinstance(table, QuantizedMatrix):
        compiled = table.type in _quantized.TYPES
        rows = _quantized.embedding(token_ids, table.raw, table.type) if compiled else table.take(token_ids)
        return rows, QuantizedCache(table)
    return _embedding.embedding(token_ids, table)


def embedding_backward(d_out: Array, cache: OpCache, d_table: Array | None) -> None:
    """d_out: (N, D). Adds into d_table (V, D); an id that occurs k times collects k rows. None = frozen."""
    if not isinstance(cache, QuantizedCache):
        _embedding.embedding_backward(d_out, cache, d_table)
    elif d_table is not None:
        raise ValueError(QUANTIZED_IS_FROZEN)


def linear(x: Array, weight: Leaf, bias: Array | None = None) -> tuple[Array, OpCache]:
    """x: (N, in), weight: (out, in), bias: (out,) or None -> (N, out)."""
    return _linear_in(_products.F32, x, weight, bias)


def _linear_in(precision: int, x: Array, weight: Leaf, bias: Array | None = None) -> tuple[Array, OpCache]:
    if not isinstance(weight, QuantizedMatrix):
        return _linear.linear(x, weight, bias, precision)
    if weight.type in _quantized.TYPES:
        y = _quantized.linear(x, weight.raw, weight.type, bias, precision)
        return y, QuantizedCache(weight, precision)
    check_matrix(
        x, "x", None, weight.shape[1], "linear: x (N, in), weight a QuantizedMatrix (out, in), bias (out,) or None"
    )
    y = np.empty((len(x), weight.shape[0]), np.float32)
    for rows in weight.bands():
        part = None if bias is None else bias[rows]
        y[:, rows] = _linear.linear(x, weight.rows(rows.start, rows.stop), part, precision)[0]
    return y, QuantizedCache(weight, precision)


def linear_backward(d_y: Array, cache: OpCache, d_weight: Array | None, d_bias: Array | None = None) -> Array:
    """d_y: (N, out) -> d_x (N, in). Adds into d_weight (out, in) and d_bias (out,); None = frozen."""
    if not isinstance(cache, QuantizedCache):
        return _linear.linear_backward(d_y, cache, d_weight, d_bias)
    if d_weight is not None:
        raise ValueError(QUANTIZED_IS_FROZEN)
    weight = cache.weight
    if weight.type in _quantized.TYPES:
        return _quantized.linear_backward(d_y, weight.raw, weight.type, d_bias, cache.precision)
    check_matrix(d_y, "d_y", None, weight.shape[0], "linear_backward: d_y (N, out), d_bias (out,) or None")
    if d_bias is not None:
        d_bias += d_y.sum(axis=0)
    d_x = np.zeros((len(d_y), weight.shape[1]), np.float32)
    for rows in weight.bands():
        band = weight.rows(rows.start, rows.stop)
        if cache.precision == _products.F32:
            d_x += d_y[:, rows] @ band
        else:
            _products.multiply("nn", d_y[:, rows], band, d_x, cache.precision, add=True)
    return d_x


def linear_cross_entropy(
    x: Array,
    weight: Leaf,
    labels: Array,
    cap: float | None = None,
    d_weight: Array | None = None,
    backward: bool = True,
) -> tuple[float, Any]:
    """The loss cross_entropy(softcap(x W^T, cap), labels) and its gradient d_x (N, D); adds into d_weight (V, D).

    x: (N, D), weight: (V, D), labels: as for `cross_entropy`. cap: None = no softcap. backward: False = the loss alone, None
    for d_x.
    """
    return _linear_cross_entropy_in(_products.F32, x, weight, labels, cap, d_weight, backward)


def _linear_cross_entropy_in(
    precision: int,
    x: Array,
    weight: Leaf,
    labels: Array,
    cap: float | None = None,
    d_weight: Array | None = None,
    backward: bool = True,
) -> tuple[float, Any]:
    labels, n_counted = _checked_labels(labels, len(x), weight.shape[0])
    total, share, d_x = 0.0, 1 / max(n_counted, 1), np.empty(x.shape, np.float32) if backward else None
    for rows in row_bands(len(x), weight.shape[0]):
        logits, product = _linear_in(precision, x[rows], weight)  # (n, V)
        logits, capped = (logits, None) if cap is None else softcap(logits, cap)  # noqa: F405
        total += _loss.cross_entropy_gradient(logits, labels[rows], share, backward)
        if d_x is not None:
            d_logits = logits if capped is None else softcap_backward(logits, capped)  # noqa: F405
            d_x[rows] = linear_backward(d_logits, product, d_weight)
    return total * share, d_x
