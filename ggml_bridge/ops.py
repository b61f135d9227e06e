"""The rules of the native graphs: each operation as a composition of ggml's forward operations, its backward right below it.

ggml's own backward pass lacks rules for LayerNorm, GELU, TANH and CONCAT and ends the process when it meets one, its
softmax gradient is wrong when buffers are reused, and it uses operations that Metal does not have. So the rules here
are written out, with operations that every ggml device runs, and hold when memory is reused. A `Session` records them
verb by verb; an op table (toy/ops/graph/native.py) is made of them.

A forward takes the graph and tensors and returns `(out, cache)`; its backward takes the graph, `d_out` and the same
arguments and returns one gradient per tensor (None where there is none). A gradient that nobody uses is dropped by
`Graph.allocate`. Activations are (N, D), weights (out, in). `d_out` is contiguous, and so is every gradient that is
returned. `d_<name>` is the gradient of the loss with respect to `<name>`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from ggml_bridge.core import Graph, Tensor

    LossCache = tuple[Tensor, Tensor, Tensor, Tensor]  # probabilities, weights, target, 1/count


def contiguous(g: Graph, x: Tensor) -> Tensor:
    return x if x.is_contiguous else g.cont(x)


def columns_summed(g: Graph, d: Tensor) -> Tensor:
    """(N, D) -> (D,): the sum over the rows."""
    return g.reshape(g.sum_rows(g.transposed(d)), (d.shape[1],))


def as_matrix(x: Tensor) -> tuple[int, ...]:
    """The shape of x as (rows, columns)."""
    return (1, *x.shape) if x.ndim == 1 else x.shape


def reduced(g: Graph, d: Tensor, x: Tensor) -> Tensor:
    """Sum d over the axes along which x was broadcast, and give it x's shape."""
    rows, columns = as_matrix(x)
    d = d if d.ndim == 2 else g.reshape(d, as_matrix(d))
    if (rows, columns) == d.shape:
        total = d
    elif rows == 1 and columns == 1:
        total = g.sum(d)
    elif rows == 1:
        total = columns_summed(g, d)
    else:
        total = g.sum_rows(d)
    return total if total.shape == x.shape else g.reshape(total, x.shape)


def part_of_row(g: Graph, row: Tensor, columns: int) -> Tensor:
    """The first numbers of a row (1, width) of equal ones, to multiply a matrix of so many columns with.

    A single one where the matrix is wider than the row: a CPU then repeats it element by element, which takes longer.
    """
    width = row.shape[1]
    return row if columns == width else g.slice(row, 1, 0, columns if columns < width else 1)


# ----------------------------------------------------------------------------------------------------------------------
# elementwise
# ----------------------------------------------------------------------------------------------------------------------


def add(g: Graph, a: Tensor, b: Tensor) -> tuple[Tensor, None]:
    """a + b, b broadcast to a."""
    return g.add(a, b), None


def add_backward(g: Graph, d_out: Tensor, cache: None, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return d_out, reduced(g, d_out, b)


def mul(g: Graph, a: Tensor, b: Tensor) -> tuple[Tensor, None]:
    """a * b, b broadcast to a."""
    return g.mul(a, b), None


def mul_backward(g: Graph, d_out: Tensor, cache: None, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return g.mul(d_out, b), reduced(g, g.mul(d_out, a), b)


def scale(g: Graph, a: Tensor, factor: float) -> tuple[Tensor, float]:
    return g.scale(a, factor), factor


def scale_backward(g: Graph, d_out: Tensor, factor: float, a: Tensor) -> tuple[Tensor]:
    return (g.scale(d_out, factor),)


SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
CUBIC = 0.044715


def gelu(g: Graph, x: Tensor) -> tuple[Tensor, Tensor]:
    """GELU, tanh form (Hendrycks & Gimpel 2016): x/2 * (1 + tanh(u)), u = sqrt(2/pi) * (x + 0.044715 x^3).

    ggml's own GELU is a table of float16 values on the CPU, with errors of 2e-3.
    """
    u = g.mul(x, g.scale(g.sqr(x), SQRT_2_OVER_PI * CUBIC, SQRT_2_OVER_PI))
    t = g.tanh(u)
    return g.mul(x, g.scale(t, 0.5, 0.5)), t


def gelu_backward(g: Graph, d_out: Tensor, t: Tensor, x: Tensor) -> tuple[Tensor]:
    # dy/dx = (1 + t)/2 + x/2 * (1 - t^2) * du/dx,  du/dx = sqrt(2/pi) * (1 + 3 * 0.044715 x^2)
    d_u = g.scale(g.sqr(x), 3 * SQRT_2_OVER_PI * CUBIC, SQRT_2_OVER_PI)
    slope = g.mul(g.mul(x, g.scale(g.sqr(t), -0.5, 0.5)), d_u)
    return (g.mul(d_out, g.add(g.scale(t, 0.5, 0.5), slope)),)


def geglu(g: Graph, gate: Tensor, up: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """gelu(gate) * up (Shazeer 2020, eq. 5)."""
    activation, t = gelu(g, contiguous(g, gate))
    return g.mul(activation, up), (activation, t)


def geglu_backward(
    g: Graph, d_out: Tensor, cache: tuple[Tensor, Tensor], gate: Tensor, up: Tensor
) -> tuple[Tensor, Tensor]:
    activation, t = cache
    (d_gate,) = gelu_backward(g, g.mul(d_out, up), t, contiguous(g, gate))
    return d_gate, g.mul(d_out, activation)


def softcap(g: Graph, x: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """cap * tanh(x / cap)."""
    t = g.tanh(g.scale(contiguous(g, x), 1.0 / cap))
    return g.scale(t, cap), t


def softcap_backward(g: Graph, d_out: Tensor, t: Tensor, x: Tensor) -> tuple[Tensor]:
    return (g.mul(d_out, g.scale(g.sqr(t), -1.0, 1.0)),)


def silu(g: Graph, x: Tensor) -> tuple[Tensor, None]:
    """x * sigmoid(x)."""
    return g.silu(contiguous(g, x)), None


def silu_backward(g: Graph, d_out: Tensor, cache: None, x: Tensor) -> tuple[Tensor]:
    return (g.silu_back(d_out, contiguous(g, x)),)


def swiglu(g: Graph, gate: Tensor, up: Tensor) -> tuple[Tensor, None]:
    """silu(gate) * up (Shazeer 2020, eq. 6)."""
    return g.swiglu(gate, up), None


def swiglu_backward(g: Graph, d_out: Tensor, cache: None, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    gate = contiguous(g, gate)
    return g.silu_back(g.mul(d_out, up), gate), g.mul(d_out, g.silu(gate))


# ----------------------------------------------------------------------------------------------------------------------
# matrices
# ----------------------------------------------------------------------------------------------------------------------


def matmul(g: Graph, w: Tensor, x: Tensor) -> tuple[Tensor, None]:
    """x @ w.T: w (out, in), x (N, in) -> (N, out)."""
    return g.mul_mat(contiguous(g, w), contiguous(g, x)), None


def matmul_backward(g: Graph, d_out: Tensor, cache: None, w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    # d_x first: w^T is then gone before d_w, which may be as large, is made
    d_x = g.mul_mat(g.transposed(w), d_out)  # d_out @ w: (N, in)
    d_w = g.mul_mat(g.transposed(x), g.transposed(d_out))  # d_out^T @ x: (out, in)
    return d_w, d_x


def transpose(g: Graph, x: Tensor) -> tuple[Tensor, None]:
    return g.transpose(x), None


def transpose_backward(g: Graph, d_out: Tensor, cache: None, x: Tensor) -> tuple[Tensor]:
    return (g.transposed(d_out),)


def cont_2d(g: Graph, x: Tensor, rows: int, columns: int) -> tuple[Tensor, None]:
    return g.cont(x, (rows, columns)), None


def cont_2d_backward(g: Graph, d_out: Tensor, cache: None, x: Tensor) -> tuple[Tensor]:
    return (g.reshape(d_out, x.shape),)


def concat(g: Graph, a: Tensor, b: Tensor, axis: int) -> tuple[Tensor, int]:
    return g.concat(a, b, axis), axis


def concat_backward(g: Graph, d_out: Tensor, axis: int, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    cut, end = a.shape[axis], d_out.shape[axis]
    return contiguous(g, g.slice(d_out, axis, 0, cut)), contiguous(g, g.slice(d_out, axis, cut, end))


# ----------------------------------------------------------------------------------------------------------------------
# normalisation
# ----------------------------------------------------------------------------------------------------------------------


def layer_norm(g: Graph, x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, tuple[Tensor, float]]:
    """(x - mean) / sqrt(var + eps) * gamma + beta, row by row (Ba, Kiros & Hinton 2016, eq. 4)."""
    x_hat = g.norm(x, eps)
    return g.add(g.mul(x_hat, gamma), beta), (x_hat, eps)


def layer_norm_backward(
    g: Graph, d_out: Tensor, cache: tuple[Tensor, float], x: Tensor, gamma: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    x_hat, eps = cache
    d_x_hat = g.mul(d_out, gamma)
    x = contiguous(g, x)  # CUDA takes no mean of rows with gaps, as the class tokens of a ViT have
    centred = g.sub(x, g.mean(x))
    std = g.sqrt(g.scale(g.mean(g.sqr(centred)), 1.0, eps))  # (N, 1)
    # the mean and the std both depend on every element of the row: one projection for each
    along = g.mul(x_hat, g.mean(g.mul(d_x_hat, x_hat)))
    d_x = g.div(g.sub(g.sub(d_x_hat, g.mean(d_x_hat)), along), std)
    return d_x, reduced(g, g.mul(d_out, x_hat), gamma), reduced(g, d_out, beta)


def rms_norm(g: Graph, x: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, tuple[Tensor, float]]:
    """x / sqrt(mean(x^2) + eps) * gamma, row by row (Zhang & Sennrich 2019, eq. 4)."""
    x_hat = g.rms_norm(x, eps)
    return g.mul(x_hat, gamma), (x_hat, eps)


def rms_norm_backward(
    g: Graph, d_out: Tensor, cache: tuple[Tensor, float], x: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor]:
    x_hat, eps = cache
    d_x_hat = g.mul(d_out, gamma)
    rms = g.sqrt(g.scale(g.mean(g.sqr(x)), 1.0, eps))  # (N, 1)
    along = g.mul(x_hat, g.mean(g.mul(d_x_hat, x_hat)))
    return g.div(g.sub(d_x_hat, along), rms), reduced(g, g.mul(d_out, x_hat), gamma)


# ----------------------------------------------------------------------------------------------------------------------
# attention
# ----------------------------------------------------------------------------------------------------------------------


def softmax(
    g: Graph, x: Tensor, mask: Tensor | None = None, factor: float = 1.0
) -> tuple[Tensor, tuple[Tensor, float]]:
    """softmax(factor * x + mask) over the last axis; mask: a constant of 0 and -inf, or None."""
    p = g.soft_max_ext(x, mask, factor)
    return p, (p, factor)


def softmax_backward(g: Graph, d_out: Tensor, cache: tuple[Tensor, float], x: Tensor) -> tuple[Tensor]:
    p, factor = cache  # a masked x has p = 0 and so gets no gradient
    d_x = g.mul(p, g.sub(d_out, g.sum_rows(g.mul(d_out, p))))
    return (d_x if factor == 1.0 else g.scale(d_x, factor),)


def diag_mask_inf(g: Graph, x: Tensor, below: Tensor, additive: Tensor) -> tuple[Tensor, Tensor]:
    """Add -inf above the diagonal. additive: 0 or -inf, below: 1 or 0, both of x's shape."""
    return g.add(x, additive), below


def diag_mask_inf_backward(g: Graph, d_out: Tensor, below: Tensor, x: Tensor) -> tuple[Tensor]:
    return (g.mul(d_out, below),)


# ----------------------------------------------------------------------------------------------------------------------
# embedding
# ----------------------------------------------------------------------------------------------------------------------


def get_rows(g: Graph, table: Tensor, ids: Tensor) -> tuple[Tensor, None]:
    """Row ids[n] of the table: table (V, D), ids (N,) -> (N, D)."""
    return g.get_rows(table, ids), None


def get_rows_backward(
    g: Graph, d_out: Tensor, cache: None, table: Tensor, ids: Tensor, collected: Tensor | None = None
) -> tuple[Tensor, None]:
    """d_table[v] = the sum of d_out[n] over all n with ids[n] = v, as a product with a matrix of zeros and ones.

    ggml has no scatter that adds, so rows of equal ids are summed by a matmul first. With V <= N that matrix has one
    row for each id (V, N); otherwise one for each *distinct* id of this batch (N, N), and the sums are then written to
    their places in the table. The positions of the ones are derived from the ids when those are uploaded.

    collected: a gradient (V, D) that this one is added to, or None. It may be written into.
    """
    v, d = table.shape
    (n,) = ids.shape
    slots = min(v, n)
    if slots * n > np.iinfo(np.int32).max:
        raise ValueError(
            f"get_rows: no gradient for {n} ids of a table of {v} rows: {slots} x {n} positions are too many"
        )
    ones_at = g.input((n,), "i32", name=f"{ids.name}: slots")
    selector = g.set_rows(g.full((slots * n, 1), 0.0), g.full((n, 1), 1.0), ones_at)
    sums = g.mul_mat(g.transposed(d_out), g.reshape(selector, (slots, n)))  # (slots, D)
    if v <= n:
        g.on_upload(ids, lambda values: ones_at.upload(values.reshape(-1).astype(np.int64) * n + np.arange(n)))
        return sums if collected is None else g.add(collected, sums), None
    rows_at = g.input((n,), "i32", name=f"{ids.name}: distinct")

    def derive(values: np.ndarray) -> None:
        distinct, slot = np.unique(values.reshape(-1), return_inverse=True)
        ones_at.upload(slot.reshape(-1) * n + np.arange(n))
        # the sums of slots that this batch does not use are zeros: they go to rows that it does not use
        others = np.setdiff1d(np.arange(n), distinct)[: n - len(distinct)]
        rows_at.upload(np.concatenate([distinct, others]))

    g.on_upload(ids, derive)
    if collected is None:
        collected = g.full((v, d), 0.0)
    else:
        sums = g.add(sums, g.get_rows(collected, rows_at))
    return g.set_rows(collected, sums, rows_at), None


# ----------------------------------------------------------------------------------------------------------------------
# loss
# ----------------------------------------------------------------------------------------------------------------------


def cross_entropy(g: Graph, logits: Tensor, labels: Tensor, columns: int) -> tuple[Tensor, LossCache]:
    """The mean of -log softmax(logits)[label] over the rows that count -> (1,).

    logits (N, V). labels: i32 (N,), -1 = not counted; or f32 (N, V), a row of zeros = not counted.
    The cache holds the sum, from which `cross_entropy_backward` starts, and 1/count as a row of `columns` numbers:
    gradients are divided by the count when they are used (`part_of_row`), not here. Metal multiplies matrices in
    half precision, where the gradient of a mean over many tokens would mostly round to zero.
    """
    inputs = loss_inputs(g, labels, logits.shape[1], columns)
    total, kept = sum_of_losses(g, logits, inputs.target, inputs.weights)
    return mean_loss(g, total, inputs.inverse_count), (*kept, inputs.inverse_count)


def cross_entropy_backward(g: Graph, cache: LossCache) -> Tensor:
    """-> the gradient of the *sum* of the losses with respect to the logits (N, V)."""
    p, weights, target, _ = cache
    return sum_of_losses_backward(g, p, weights, target)


class LossInputs(NamedTuple):
    """What is derived from labels when those are uploaded."""

    target: Tensor  # the classes i32 (N, 1), or the labels f32 (N, V)
    weights: Tensor  # (N, 1, 1) of the rows: 0 or 1, or the sum of the label's row
    inverse_count: Tensor  # (1, columns)


def loss_inputs(g: Graph, labels: Tensor, classes: int, columns: int) -> LossInputs:
    """labels: as for `cross_entropy`. classes: what a label chooses from. columns: of 1/count."""
    n = labels.shape[0]
    weights = g.input((n, 1, 1), name=f"{labels.name}: weights")
    inverse_count = g.input((1, columns), name=f"{labels.name}: 1/count")
    target = labels
    if labels.dtype == "i32":
        g.limit(labels, -1, classes, "classes of the loss, -1 = not counted")
        target = g.input((n, 1), "i32", name=f"{labels.name}: classes")

    def derive(values: np.ndarray) -> None:
        values = values.reshape(n, -1)
        if labels.dtype == "i32":
            target.upload(np.maximum(values, 0))
            weights.upload((values >= 0).astype(np.float32).reshape(n, 1, 1))
            count = np.count_nonzero(values >= 0)
        else:
            weights.upload(values.sum(axis=1, dtype=np.float64).reshape(n, 1, 1))
            count = np.count_nonzero(np.any(values != 0, axis=1))
        inverse_count.upload(np.full((1, columns), 1.0 / max(int(count), 1), np.float32))

    g.on_upload(labels, derive)
    return LossInputs(target, weights, inverse_count)


def sum_of_losses(
    g: Graph, logits: Tensor, target: Tensor, weights: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """logits (N, V), target and weights: those of its rows -> the sum of the losses (1,), what the backward takes."""
    n, v = logits.shape
    rows, column = (n, v, 1), (n, 1, 1)  # every row of the logits as a table of V numbers; one number taken from each
    table = g.reshape(logits, rows)
    top = g.reshape(g.argmax(logits), (n, 1))
    x_top = g.get_rows(table, top)
    if target.dtype == "i32":
        below_top = g.mul(g.sub(x_top, g.get_rows(table, target)), weights)
    else:
        logits = g.sub(logits, g.reshape(x_top, (n, 1)))
        below_top = g.reshape(g.scale(g.sum_rows(g.mul(target, logits)), -1.0), column)
    # -log softmax(x)[i] = (x_top - x_i) - log(p_top): exact however small p_i is, and p_top is never small. The softmax
    # comes last, because it then takes the memory of the logits.
    p = g.soft_max_ext(logits)
    log_p_top = g.log(g.get_rows(g.reshape(p, rows), top))
    losses = g.sub(below_top, g.mul(log_p_top, weights))
    return g.sum(losses), (p, weights, target)


def sum_of_losses_backward(g: Graph, p: Tensor, weights: Tensor, target: Tensor) -> Tensor:
    """-> the gradient of `sum_of_losses` with respect to the logits (N, V)."""
    n, v = p.shape
    d_logits = g.mul(p, g.reshape(weights, (n, 1)))
    if target.dtype != "i32":
        return g.sub(d_logits, target)
    # subtract the one-hot label: take the element out of every row, subtract, put it back
    table = g.reshape(d_logits, (n, v, 1))
    at_label = g.sub(g.get_rows(table, target), weights)
    return g.reshape(g.set_rows(table, at_label, target), (n, v))


def mean_loss(g: Graph, total: Tensor, inverse_count: Tensor) -> Tensor:
    """total: (1,) a sum of losses -> (1,)."""
    return g.mul(total, part_of_row(g, inverse_count, 1))
