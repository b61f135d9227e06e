"""The operations of a Session: each as a composition of ggml's forward operations, its backward right below it.

ggml's own backward pass lacks rules for LayerNorm, GELU, TANH and CONCAT and ends the process when it meets one, its
softmax gradient is wrong when buffers are reused, and it uses operations that Metal does not have. So the rules here
are written out, with operations that every ggml device runs, and hold when memory is reused.

A forward takes the graph and tensors and returns `(out, cache)`; its backward takes the graph, `d_out` and the same
arguments and returns one gradient per tensor (None where there is none). Activations are (N, D), weights (out, in).
Every gradient is contiguous. `d_<name>` is the gradient of the loss with respect to `<name>`.
"""

import math

import numpy as np


def contiguous(g, x):
    return x if x.is_contiguous else g.cont(x)


def transposed(g, x):
    """(N, D) -> (D, N), contiguous."""
    return contiguous(g, g.transpose(x))


def columns_summed(g, d):
    """(N, D) -> (D,): the sum over the rows."""
    return g.reshape(g.sum_rows(transposed(g, d)), (d.shape[1],))


def as_matrix(x):
    """The shape of x as (rows, columns)."""
    return (1, *x.shape) if x.ndim == 1 else x.shape


def reduced(g, d, x):
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
    return g.reshape(total, x.shape)


# ----------------------------------------------------------------------------------------------------------------------
# elementwise
# ----------------------------------------------------------------------------------------------------------------------


def add(g, a, b):
    """a + b, b broadcast to a."""
    return g.add(a, b), None


def add_backward(g, d_out, cache, a, b):
    return d_out, reduced(g, d_out, b)


def mul(g, a, b):
    """a * b, b broadcast to a."""
    return g.mul(a, b), None


def mul_backward(g, d_out, cache, a, b):
    return g.mul(d_out, b), reduced(g, g.mul(d_out, a), b)


def scale(g, a, factor):
    return g.scale(a, factor), factor


def scale_backward(g, d_out, factor, a):
    return (g.scale(d_out, factor),)


SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
CUBIC = 0.044715


def gelu(g, x):
    """GELU, tanh form (Hendrycks & Gimpel 2016): x/2 * (1 + tanh(u)), u = sqrt(2/pi) * (x + 0.044715 x^3).

    ggml's own GELU is a table of float16 values on the CPU, with errors of 2e-3.
    """
    u = g.mul(x, g.scale(g.sqr(x), SQRT_2_OVER_PI * CUBIC, SQRT_2_OVER_PI))
    t = g.tanh(u)
    return g.mul(x, g.scale(t, 0.5, 0.5)), t


def gelu_backward(g, d_out, t, x):
    # dy/dx = (1 + t)/2 + x/2 * (1 - t^2) * du/dx,  du/dx = sqrt(2/pi) * (1 + 3 * 0.044715 x^2)
    d_u = g.scale(g.sqr(x), 3 * SQRT_2_OVER_PI * CUBIC, SQRT_2_OVER_PI)
    slope = g.mul(g.mul(x, g.scale(g.sqr(t), -0.5, 0.5)), d_u)
    return (g.mul(d_out, g.add(g.scale(t, 0.5, 0.5), slope)),)


def silu(g, x):
    """x * sigmoid(x)."""
    return g.silu(x), None


def silu_backward(g, d_out, cache, x):
    return (g.silu_back(d_out, x),)


# ----------------------------------------------------------------------------------------------------------------------
# matrices
# ----------------------------------------------------------------------------------------------------------------------


def matmul(g, w, x):
    """x @ w.T: w (out, in), x (N, in) -> (N, out)."""
    return g.mul_mat(contiguous(g, w), contiguous(g, x)), None


def matmul_backward(g, d_out, cache, w, x):
    d_w = g.mul_mat(transposed(g, x), transposed(g, d_out))  # d_out^T @ x: (out, in)
    d_x = g.mul_mat(transposed(g, w), d_out)  # d_out @ w: (N, in)
    return d_w, d_x


def transpose(g, x):
    return g.transpose(x), None


def transpose_backward(g, d_out, cache, x):
    return (transposed(g, d_out),)


def cont_2d(g, x, rows, columns):
    return g.cont(x, (rows, columns)), None


def cont_2d_backward(g, d_out, cache, x):
    return (g.reshape(d_out, x.shape),)


def concat(g, a, b, axis):
    return g.concat(a, b, axis), axis


def concat_backward(g, d_out, axis, a, b):
    cut, end = a.shape[axis], d_out.shape[axis]
    return contiguous(g, g.slice(d_out, axis, 0, cut)), contiguous(g, g.slice(d_out, axis, cut, end))


# ----------------------------------------------------------------------------------------------------------------------
# normalisation
# ----------------------------------------------------------------------------------------------------------------------


def layer_norm(g, x, gamma, beta, eps):
    """(x - mean) / sqrt(var + eps) * gamma + beta, row by row (Ba, Kiros & Hinton 2016, eq. 4)."""
    x_hat = g.norm(x, eps)
    return g.add(g.mul(x_hat, gamma), beta), (x_hat, eps)


def layer_norm_backward(g, d_out, cache, x, gamma, beta):
    x_hat, eps = cache
    d_x_hat = g.mul(d_out, gamma)
    centred = g.sub(x, g.mean(x))
    std = g.sqrt(g.scale(g.mean(g.sqr(centred)), 1.0, eps))  # (N, 1)
    # the mean and the std both depend on every element of the row: one projection for each
    along = g.mul(x_hat, g.mean(g.mul(d_x_hat, x_hat)))
    d_x = g.div(g.sub(g.sub(d_x_hat, g.mean(d_x_hat)), along), std)
    return d_x, reduced(g, g.mul(d_out, x_hat), gamma), reduced(g, d_out, beta)


def rms_norm(g, x, gamma, eps):
    """x / sqrt(mean(x^2) + eps) * gamma, row by row (Zhang & Sennrich 2019, eq. 4)."""
    x_hat = g.rms_norm(x, eps)
    return g.mul(x_hat, gamma), (x_hat, eps)


def rms_norm_backward(g, d_out, cache, x, gamma):
    x_hat, eps = cache
    d_x_hat = g.mul(d_out, gamma)
    rms = g.sqrt(g.scale(g.mean(g.sqr(x)), 1.0, eps))  # (N, 1)
    along = g.mul(x_hat, g.mean(g.mul(d_x_hat, x_hat)))
    return g.div(g.sub(d_x_hat, along), rms), reduced(g, g.mul(d_out, x_hat), gamma)


# ----------------------------------------------------------------------------------------------------------------------
# attention
# ----------------------------------------------------------------------------------------------------------------------


def softmax(g, x):
    """softmax over the last axis."""
    p = g.soft_max_ext(x)
    return p, p


def softmax_backward(g, d_out, p, x):
    return (g.mul(p, g.sub(d_out, g.sum_rows(g.mul(d_out, p)))),)


def diag_mask_inf(g, x, below, additive):
    """Add -inf above the diagonal. additive: 0 or -inf, below: 1 or 0, both of x's shape."""
    return g.add(x, additive), below


def diag_mask_inf_backward(g, d_out, below, x):
    return (g.mul(d_out, below),)


# ----------------------------------------------------------------------------------------------------------------------
# embedding
# ----------------------------------------------------------------------------------------------------------------------


def get_rows(g, table, ids):
    """Row ids[n] of the table: table (V, D), ids (N,) -> (N, D)."""
    return g.get_rows(table, ids), None


def get_rows_backward(g, d_out, cache, table, ids):
    """d_table[v] = the sum of d_out[n] over all n with ids[n] = v, as a product with a matrix of zeros and ones.

    ggml has no scatter that adds, so rows of equal ids are summed by a matmul first. With V <= N that matrix has one
    row for each id (V, N); otherwise one for each *distinct* id of this batch (N, N), and the sums are then written to
    their places in the table. The positions of the ones are derived from the ids when those are uploaded.
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
    sums = g.mul_mat(transposed(g, d_out), g.reshape(selector, (slots, n)))  # (slots, D)
    if v <= n:
        g.on_upload(ids, lambda values: ones_at.upload(values.reshape(-1).astype(np.int64) * n + np.arange(n)))
        return sums, None
    # slots that this batch does not use hold zeros; they all go to an extra row below the table
    rows_at = g.input((n,), "i32", name=f"{ids.name}: distinct")

    def derive(values):
        distinct, slot = np.unique(values.reshape(-1), return_inverse=True)
        ones_at.upload(slot.reshape(-1) * n + np.arange(n))
        rows_at.upload(np.concatenate([distinct, np.full(n - len(distinct), v)]).astype(np.int64))

    g.on_upload(ids, derive)
    extended = g.set_rows(g.full((v + 1, d), 0.0), sums, rows_at)
    return g.slice(extended, 0, 0, v), None


# ----------------------------------------------------------------------------------------------------------------------
# loss
# ----------------------------------------------------------------------------------------------------------------------


def cross_entropy(g, logits, labels, columns):
    """The mean of -log softmax(logits)[label] over the rows that count -> (1,).

    logits (N, V). labels: i32 (N,), -1 = not counted; or f32 (N, V), a row of zeros = not counted.
    The cache holds the sum, from which `cross_entropy_backward` starts, and 1/count as a row of `columns` numbers:
    gradients are divided by the count when they are used, not here. Metal multiplies matrices in half precision, where
    the gradient of a mean over many tokens would mostly round to zero.
    """
    n, v = logits.shape
    p = g.soft_max_ext(logits)
    top = g.reshape(g.argmax(logits), (n, 1))
    rows = (n, v, 1)  # every row of logits as a table of V numbers
    # log sum exp(x) = max(x) - log(max(p)): exact, and no small p is ever taken the logarithm of
    log_p_top = g.log(g.reshape(g.get_rows(g.reshape(p, rows), top), (n, 1)))
    x_top = g.reshape(g.get_rows(g.reshape(logits, rows), top), (n, 1))
    log_total = g.sub(x_top, log_p_top)  # (N, 1)
    inverse_count = g.input((1, columns), name=f"{labels.name}: 1/count")

    def upload_count(count):
        inverse_count.upload(np.full((1, columns), 1.0 / max(int(count), 1), np.float32))

    if labels.dtype == "i32":
        g.limit(labels, -1, v, "classes of the loss, -1 = not counted")
        classes = g.input((n, 1), "i32", name=f"{labels.name}: classes")
        weights = g.input((n, 1), name=f"{labels.name}: counted")

        def derive(values):
            values = values.reshape(-1, 1)
            classes.upload(np.maximum(values, 0))
            weights.upload((values >= 0).astype(np.float32))
            upload_count((values >= 0).sum())

        x_label = g.reshape(g.get_rows(g.reshape(logits, rows), classes), (n, 1))
        losses = g.mul(g.sub(log_total, x_label), weights)
        target = classes
    else:
        weights = g.input((n, 1), name=f"{labels.name}: row sums")

        def derive(values):
            values = values.reshape(n, v)
            weights.upload(values.sum(axis=1, keepdims=True, dtype=np.float64))
            upload_count(np.any(values != 0, axis=1).sum())

        losses = g.scale(g.sum_rows(g.mul(labels, g.sub(logits, log_total))), -1.0)
        target = labels
    g.on_upload(labels, derive)
    mean = g.mul(g.sum(losses), g.reshape(g.slice(inverse_count, 1, 0, 1), (1,)))
    return mean, (p, weights, target, inverse_count)


def cross_entropy_backward(g, cache):
    """-> the gradient of the *sum* of the losses with respect to the logits (N, V)."""
    p, weights, target, _ = cache
    n, v = p.shape
    d_logits = g.mul(p, weights)
    if target.dtype != "i32":
        return g.sub(d_logits, target)
    # subtract the one-hot label: take the element out of every row, subtract, put it back
    table = g.reshape(d_logits, (n, v, 1))
    at_label = g.sub(g.get_rows(table, target), g.reshape(weights, (n, 1, 1)))
    return g.reshape(g.set_rows(table, at_label, target), (n, v))
