"""The textbook op table: every op of the models in numpy, its backward right below it.

Conventions, the same in every op table:

* Activations are matrices of shape (N, D): N = B*T rows (batch b, position t -> row b*T + t), one row per token.
* Weight matrices are (out, in), so y = x @ W.T.
* A forward returns `(out, cache)`; the cache is whatever its backward needs and is opaque to the models.
* `d_<name>` is the gradient of the loss with respect to `<name>`. A backward *returns* the gradients of the
  activations and *adds* (+=) the gradients of the parameters into the arrays it is given. Passing None for a
  parameter gradient means that parameter is frozen.
* Token ids and labels are checked and copied, because a backward indexes with them; other arrays are neither.
* The arithmetic is done in the dtype of the inputs: float32 for training, float64 for checking derivatives. Hence the
  `x.dtype.type(eps)`: a number that came as a float64 would make everything after it float64.
* A weight may stay quantised as its file has it, frozen: `toy.quantized.QuantizedMatrix` multiplies and is looked up in as an
  array does, with exactly the numbers that its bytes stand for.

The letters of all shapes and formulas, here, in the models and in the lessons; a file names those that it adds:

    symbol   meaning                                                             in the code
    B        sequences (or images) in a batch                                    batch, t_batch
    T        tokens in a sequence; Tq and Tk where queries and keys differ       t_seq
    N        rows, one per token: N = B*T
    V        tokens in the vocabulary, or classes                                vocab_size, n_classes
    D        width: columns of the residual stream                               d_model
    F        width inside the MLP                                                d_ff
    H        heads, of queries                                                   n_heads
    G        key/value heads: G = H, or fewer, each shared by H/G query heads    n_kv_heads
    d_head   columns of one head; all heads side by side are H*d_head wide       d_head
    L        blocks                                                              n_layers
    P        patches of an image, of C numbers each                              n_patches
    r        rank of an adapter, whose matrices are (r, in) and (out, r)          rank
    d_x      the gradient of the loss with respect to x, in the shape of x       d_x

`d_model`, `d_ff` and `d_head` are widths, called so in the papers; every other `d_...` is a gradient.

The ops stand in the order in which a model calls them; the last two sections, the optimizer and what spares memory, can wait.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from toy.arrays import whole_numbers
from toy.op_table import Array, Result, row_bands
from toy.quantized import Leaf, check_trainable, is_frozen

name = "reference"
PARTS = ("softmax", "multi_head_attention", "_capped_attention")  # of attention: no ops that a model calls

# ----------------------------------------------------------------------------------------------------------------------
# embedding: out[n] = table[token_ids[n]]
# ----------------------------------------------------------------------------------------------------------------------


class EmbeddingCache(NamedTuple):
    token_ids: np.ndarray  # (N,)
    table: Leaf  # (V, D)


def embedding(token_ids: Array, table: Leaf) -> tuple[Array, EmbeddingCache]:
    """Look up one row per id. token_ids: int (N,), table: (V, D) -> (N, D)."""
    token_ids = whole_numbers("token_ids", token_ids, 0, table.shape[0])
    return table[token_ids], EmbeddingCache(token_ids, table)


def embedding_backward(d_out: Array, cache: EmbeddingCache, d_table: Array | None) -> None:
    """d_out: (N, D). Adds into d_table (V, D); an id that occurs k times collects k rows."""
    if d_table is not None:
        check_trainable(cache.table)
        np.add.at(d_table, cache.token_ids, d_out)  # d_table[token_ids] += d_out would keep one row of each id


# ----------------------------------------------------------------------------------------------------------------------
# linear: y = x W^T + b
# ----------------------------------------------------------------------------------------------------------------------


class LinearCache(NamedTuple):
    x: np.ndarray | None  # (N, in), for d_weight; None where there is none, the weight being frozen
    weight: Leaf  # (out, in)


def linear(x: Array, weight: Leaf, bias: Array | None = None) -> tuple[Array, LinearCache]:
    """x: (N, in), weight: (out, in), bias: (out,) or None -> (N, out)."""
    y = x @ weight.T  # (N, in) @ (in, out)
    if bias is not None:
        y += bias
    return y, LinearCache(None if is_frozen(weight) else x, weight)


def linear_backward(d_y: Array, cache: LinearCache, d_weight: Array | None, d_bias: Array | None = None) -> Array:
    """d_y: (N, out) -> d_x (N, in). Adds into d_weight (out, in) and d_bias (out,)."""
    if d_weight is not None:
        check_trainable(cache.weight)
        d_weight += d_y.T @ cache.x  # (out, N) @ (N, in)
    if d_bias is not None:
        d_bias += d_y.sum(axis=0)
    return d_y @ cache.weight  # (N, out) @ (out, in)


# ----------------------------------------------------------------------------------------------------------------------
# residual stream, and how numbers lie in matrices
# ----------------------------------------------------------------------------------------------------------------------


def add(a: Array, b: Array) -> Array:
    """a + b, both (N, D). Its backward needs no op: the gradient goes unchanged to both summands."""
    return a + b


def scale(x: Array, factor: float) -> Array:
    """factor * x for a plain number. Its backward is the same op on the gradient."""
    return x * x.dtype.type(factor)


def masked(x: Array, mask: Array) -> Array:
    """x * mask, both (N, D): dropout (Srivastava et al. 2014) by a mask of 0 and 1/(1-p). Its backward is the same op on the
    gradient."""
    return x * mask


def split(x: Array, widths: Sequence[int]) -> tuple[Array, ...]:
    """Cut the columns of x (N, sum(widths)) into matrices (N, w) for w in widths (views, nothing is copied)."""
    return tuple(np.split(x, np.cumsum(widths)[:-1], axis=1))


def concat(parts: Sequence[Array]) -> Array:
    """Put matrices (N, w_i) side by side -> (N, sum w_i). The backward of `split`."""
    return np.concatenate(parts, axis=1)


def reshape(x: Array, rows: int) -> Array:
    """The numbers of x (N, D) row after row as (rows, N*D/rows): a view if x is C-contiguous, else of a copy.

    Its backward is the same op, with the rows that x had. With B rows, one for each sequence, `split` and `concat` cut
    and join sequences: (B, T*D).
    """
    return x.reshape(rows, -1)


def zeros_like(x: Array) -> Array:
    """Zeros in the shape of x (N, D): the gradient of what has no part in the loss."""
    return np.zeros_like(x)


# ----------------------------------------------------------------------------------------------------------------------
# RMSNorm (Zhang & Sennrich 2019, eq. 4): y = x / rms(x) * gamma,  rms(x) = sqrt(mean(x^2) + eps)
# ----------------------------------------------------------------------------------------------------------------------


class RMSNormCache(NamedTuple):
    x: np.ndarray  # (N, D)
    rstd: np.ndarray  # (N, 1)  1 / rms(x)
    gamma: np.ndarray  # (D,)


def rms_norm(x: Array, gamma: Array, eps: float = 1e-5) -> tuple[Array, RMSNormCache]:
    """x: (N, D), gamma: (D,) -> (N, D)."""
    rstd = 1.0 / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + x.dtype.type(eps))  # (N, 1)
    return x * rstd * gamma, RMSNormCache(x, rstd, gamma)


def rms_norm_backward(d_y: Array, cache: RMSNormCache, d_gamma: Array | None) -> Array:
    """d_y: (N, D) -> d_x (N, D). Adds into d_gamma (D,)."""
    x, rstd, gamma = cache
    x_hat = x * rstd  # (N, D)
    if d_gamma is not None:
        d_gamma += (d_y * x_hat).sum(axis=0)
    d_x_hat = d_y * gamma  # (N, D)
    # rstd depends on every element of the row, hence the projection that is subtracted
    return rstd * (d_x_hat - x_hat * np.mean(d_x_hat * x_hat, axis=1, keepdims=True))


# ----------------------------------------------------------------------------------------------------------------------
# LayerNorm (Ba, Kiros & Hinton 2016, eq. 4): y = (x - mean(x)) / std(x) * gamma + beta
# ----------------------------------------------------------------------------------------------------------------------


class LayerNormCache(NamedTuple):
    x: np.ndarray  # (N, D)
    mean: np.ndarray  # (N, 1)
    rstd: np.ndarray  # (N, 1)  1 / sqrt(var(x) + eps)
    gamma: np.ndarray  # (D,)


def layer_norm(x: Array, gamma: Array, beta: Array, eps: float = 1e-5) -> tuple[Array, LayerNormCache]:
    """x: (N, D), gamma and beta: (D,) -> (N, D). The variance is the biased one (divided by D)."""
    mean = x.mean(axis=1, keepdims=True)  # (N, 1)
    centred = x - mean
    rstd = 1.0 / np.sqrt(np.mean(centred * centred, axis=1, keepdims=True) + x.dtype.type(eps))  # (N, 1)
    return centred * rstd * gamma + beta, LayerNormCache(x, mean, rstd, gamma)


def layer_norm_backward(d_y: Array, cache: LayerNormCache, d_gamma: Array | None, d_beta: Array | None) -> Array:
    """d_y: (N, D) -> d_x (N, D). Adds into d_gamma and d_beta (D,)."""
    x, mean, rstd, gamma = cache
    x_hat = (x - mean) * rstd  # (N, D)
    if d_gamma is not None:
        d_gamma += (d_y * x_hat).sum(axis=0)
    if d_beta is not None:
        d_beta += d_y.sum(axis=0)
    d_x_hat = d_y * gamma  # (N, D)
    # the mean and the std both depend on every element of the row: one projection for each
    return rstd * (
        d_x_hat - d_x_hat.mean(axis=1, keepdims=True) - x_hat * np.mean(d_x_hat * x_hat, axis=1, keepdims=True)
    )


# ----------------------------------------------------------------------------------------------------------------------
# GELU, tanh form (Hendrycks & Gimpel 2016, section 2): y = x/2 * (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
# ----------------------------------------------------------------------------------------------------------------------

_GELU_SCALE = 0.7978845608028654  # sqrt(2/pi)
_GELU_CUBIC = 0.044715


class GELUCache(NamedTuple):
    x: np.ndarray  # (N, F)


def gelu(x: Array) -> tuple[Array, GELUCache]:
    """x: (N, F) -> (N, F)."""
    tanh = np.tanh(_GELU_SCALE * (x + _GELU_CUBIC * x * x * x))
    return 0.5 * x * (1.0 + tanh), GELUCache(x)


def gelu_backward(d_y: Array, cache: GELUCache) -> Array:
    """d_y: (N, F) -> d_x (N, F)."""
    x = cache.x
    tanh = np.tanh(_GELU_SCALE * (x + _GELU_CUBIC * x * x * x))
    d_inner = _GELU_SCALE * (1.0 + 3.0 * _GELU_CUBIC * x * x)
    return d_y * (0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * d_inner)


# ----------------------------------------------------------------------------------------------------------------------
# GEGLU (Shazeer 2020, eq. 5): y = gelu(gate) * up
# ----------------------------------------------------------------------------------------------------------------------


class GEGLUCache(NamedTuple):
    gate: np.ndarray  # (N, F)
    up: np.ndarray  # (N, F)


def geglu(gate: Array, up: Array) -> tuple[Array, GEGLUCache]:
    """gate, up: (N, F) -> (N, F)."""
    return gelu(gate)[0] * up, GEGLUCache(gate, up)


def geglu_backward(d_y: Array, cache: GEGLUCache) -> tuple[Array, Array]:
    """d_y: (N, F) -> d_gate, d_up, both (N, F)."""
    activation, of_gate = gelu(cache.gate)
    return gelu_backward(d_y * cache.up, of_gate), d_y * activation


# ----------------------------------------------------------------------------------------------------------------------
# a cap: y = cap * tanh(x / cap), x itself where it is small (Gemma 2)
# ----------------------------------------------------------------------------------------------------------------------


class SoftcapCache(NamedTuple):
    y: np.ndarray  # (N, F)
    cap: float


def softcap(x: Array, cap: float = 30.0) -> tuple[Array, SoftcapCache]:
    """x: (N, F) -> (N, F), all between -cap and cap. cap: a number above 0."""
    y = x.dtype.type(cap) * np.tanh(x / x.dtype.type(cap))
    return y, SoftcapCache(y, cap)


def softcap_backward(d_y: Array, cache: SoftcapCache) -> Array:
    """d_y: (N, F) -> d_x (N, F)."""
    return d_y * (1 - np.square(cache.y / cache.y.dtype.type(cache.cap)))


# ----------------------------------------------------------------------------------------------------------------------
# SiLU: y = x sigmoid(x), and SwiGLU (Shazeer 2020, eq. 6): y = silu(gate) * up
# ----------------------------------------------------------------------------------------------------------------------


class SiLUCache(NamedTuple):
    x: np.ndarray  # (N, F)


class SwiGLUCache(NamedTuple):
    gate: np.ndarray  # (N, F)
    up: np.ndarray  # (N, F)


def _sigmoid(x: Array) -> Array:
    # exp of a non-positive number only, so that no x overflows
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, small) / (1.0 + small)


def silu(x: Array) -> tuple[Array, SiLUCache]:
    """x: (N, F) -> (N, F)."""
    return x * _sigmoid(x), SiLUCache(x)


def silu_backward(d_y: Array, cache: SiLUCache) -> Array:
    """d_y: (N, F) -> d_x (N, F)."""
    sigmoid = _sigmoid(cache.x)
    return d_y * sigmoid * (1.0 + cache.x * (1.0 - sigmoid))


def swiglu(gate: Array, up: Array) -> tuple[Array, SwiGLUCache]:
    """gate, up: (N, F) -> (N, F)."""
    return gate * _sigmoid(gate) * up, SwiGLUCache(gate, up)


def swiglu_backward(d_y: Array, cache: SwiGLUCache) -> tuple[Array, Array]:
    """d_y: (N, F) -> d_gate, d_up, both (N, F)."""
    gate, up = cache
    sigmoid = _sigmoid(gate)
    d_gate = d_y * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    return d_gate, d_y * gate * sigmoid


# ----------------------------------------------------------------------------------------------------------------------
# RoPE (Su et al. 2021, eq. 34): pair i of every head is turned by the angle position * base^(-2i/d_head) / factors[i].
# Which two numbers are a pair: (x[2i], x[2i+1]), interleaved, as in GGUF "llama" files, or (x[i], x[i + d_head/2]), halves,
# as in "qwen2" files
# ----------------------------------------------------------------------------------------------------------------------


class RopeCache(NamedTuple):
    cos: np.ndarray  # (N, 1, d_head/2)
    sin: np.ndarray  # (N, 1, d_head/2)
    halves: bool


def rope(
    x: Array,
    positions: Array,
    n_heads: int,
    base: float = 10000.0,
    halves: bool = False,
    factors: Sequence[float] | None = None,
    magnitude: float = 1.0,
) -> tuple[Array, RopeCache]:
    """x: (N, n_heads*d_head), positions: int (N,) -> (N, n_heads*d_head). d_head must be even.

    halves: which numbers are a pair, see above. factors: (d_head/2,) numbers above 0 that divide the frequencies, None: 1
    each. magnitude: multiplies what was turned (Peng et al. 2023 make attention sharper with it).
    """
    d_head = x.shape[1] // n_heads
    frequencies = float(base) ** (-np.arange(0, d_head, 2) / d_head)  # (d_head/2,) float64
    if factors is not None:
        frequencies = frequencies / np.asarray(factors, np.float64)
    angles = np.asarray(positions)[:, None] * frequencies  # (N, d_head/2)
    cos = (magnitude * np.cos(angles))[:, None, :].astype(x.dtype)
    sin = (magnitude * np.sin(angles))[:, None, :].astype(x.dtype)
    return _rotate_pairs(x, cos, sin, halves), RopeCache(cos, sin, halves)


def rope_backward(d_y: Array, cache: RopeCache) -> Array:
    """d_y: (N, n_heads*d_head) -> d_x. A rotation is orthogonal: its transpose turns back by the same angle."""
    return _rotate_pairs(d_y, cache.cos, -cache.sin, cache.halves)


def _rotate_pairs(x: Array, cos: Array, sin: Array, halves: bool) -> Array:
    n, half = x.shape[0], cos.shape[2]
    of_a_pair = 2 if halves else 3  # the axis of the two numbers
    pairs = x.reshape(n, x.shape[1] // (2 * half), *((2, half) if halves else (half, 2)))  # (N, heads, ...)
    a, b = pairs.take(0, of_a_pair), pairs.take(1, of_a_pair)  # (N, heads, d_head/2) each
    turned = np.stack([a * cos - b * sin, a * sin + b * cos], axis=of_a_pair)
    return turned.reshape(x.shape)


# ----------------------------------------------------------------------------------------------------------------------
# softmax over the last axis: p_i = exp(s_i) / sum_j exp(s_j)
# ----------------------------------------------------------------------------------------------------------------------


def softmax(scores: Array) -> Array:
    """scores: (..., V) -> probabilities (..., V). -inf among the scores gives probability 0."""
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))  # the largest is exp(0): nothing overflows
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def softmax_backward(d_probabilities: Array, probabilities: Array) -> Array:
    """d_probabilities: (..., V) -> d_scores (..., V). A masked score has p = 0 and so gets no gradient."""
    # every p depends on every score of its row, hence the mean (weighted with p) that is subtracted
    return probabilities * (d_probabilities - (d_probabilities * probabilities).sum(axis=-1, keepdims=True))


# ----------------------------------------------------------------------------------------------------------------------
# multi-head attention (Vaswani et al. 2017, eq. 1): softmax(q k^T / sqrt(d_head)) v, each head by itself
# ----------------------------------------------------------------------------------------------------------------------


def multi_head_attention(q: Array, k: Array, v: Array, hidden: Array | None) -> tuple[Array, Array]:
    """q: (B, H, Tq, d_head), k and v: (B, H, Tk, d_head) -> (B, H, Tq, d_head), probabilities (B, H, Tq, Tk).

    hidden: bool (Tq, Tk), the keys that a query must not see; None: it sees all.
    """
    scores = (q @ k.swapaxes(-1, -2)) * q.shape[-1] ** -0.5  # (B, H, Tq, Tk)
    if hidden is not None:
        scores = np.where(hidden, -np.inf, scores).astype(q.dtype)
    probabilities = softmax(scores)  # (B, H, Tq, Tk)
    return probabilities @ v, probabilities  # (B, H, Tq, d_head)


def multi_head_attention_backward(
    d_out: Array, q: Array, k: Array, v: Array, probabilities: Array
) -> tuple[Array, Array, Array]:
    """d_out: (B, H, Tq, d_head) -> d_q, d_k, d_v in the shapes of q, k, v."""
    d_probabilities = d_out @ v.swapaxes(-1, -2)  # (B, H, Tq, Tk)
    d_v = probabilities.swapaxes(-1, -2) @ d_out  # (B, H, Tk, d_head)
    d_scores = softmax_backward(d_probabilities, probabilities)  # (B, H, Tq, Tk)
    d_scores *= q.shape[-1] ** -0.5
    return d_scores @ k, d_scores.swapaxes(-1, -2) @ q, d_v


# ----------------------------------------------------------------------------------------------------------------------
# attention as models call it: on rows, and with what some models add to the plain one:
# grouped-query (Ainslie et al. 2023): query head h reads key/value head h // (H/G). The heads get one axis more,
# (B, G, H/G, T, d_head), on which k and v have a length of 1: numpy lends it to all query heads of the group
# ----------------------------------------------------------------------------------------------------------------------


class AttentionCache(NamedTuple):
    q: np.ndarray  # (B, G, H/G, Tq, d_head)
    k: np.ndarray  # (B, G, 1, Tk, d_head)
    v: np.ndarray  # (B, G, 1, Tk, d_head)
    probabilities: np.ndarray  # (B, G, H/G, Tq, Tk); reshape to (B, H, Tq, Tk) for a picture
    slope: np.ndarray | None  # (B, G, H/G, Tq, Tk) of the cap; None: no cap


def attention(
    q: Array,
    k: Array,
    v: Array,
    batch: int,
    n_heads: int,
    n_kv_heads: int | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Array, AttentionCache]:
    """Multi-head attention.

    q: (B*Tq, n_heads*d_head), k and v: (B*Tk, n_kv_heads*d_head) -> (B*Tq, n_heads*d_head), B = batch.
    Tk may exceed Tq (a key/value cache): the queries are then the *last* Tq of the Tk positions, and with `causal`
    query i sees keys 0 .. Tk-Tq+i, with a `window` the last so many of them (Beltagy et al. 2020). softcap: a bound of the
    scores' size, reached through a tanh: softcap * tanh(s / softcap) (Gemma 2).
    """
    n_kv_heads = n_kv_heads or n_heads
    q = _to_heads(q, batch, n_kv_heads, n_heads // n_kv_heads)  # (B, G, H/G, Tq, d_head)
    k, v = (_to_heads(a, batch, n_kv_heads, 1) for a in (k, v))  # (B, G, 1, Tk, d_head) each
    hidden = _hidden_keys(q.shape[3], k.shape[3], window) if causal else None
    if softcap is None:
        out, probabilities = multi_head_attention(q, k, v, hidden)
        return _from_heads(out), AttentionCache(q, k, v, probabilities, None)
    out, probabilities, slope = _capped_attention(q, k, v, hidden, softcap)
    return _from_heads(out), AttentionCache(q, k, v, probabilities, slope)


def attention_backward(d_out: Array, cache: AttentionCache) -> tuple[Array, Array, Array]:
    """d_out: (B*Tq, n_heads*d_head) -> d_q, d_k, d_v in the shapes of q, k, v."""
    q, k, v, probabilities, slope = cache
    d_out = _to_heads(d_out, q.shape[0], q.shape[1], q.shape[2])  # (B, G, H/G, Tq, d_head)
    if slope is None:
        d_q, d_k, d_v = multi_head_attention_backward(d_out, q, k, v, probabilities)
    else:
        d_q, d_k, d_v = _capped_attention_backward(d_out, q, k, v, probabilities, slope)
    # the query heads of a group share one key/value head: its gradient is their sum
    return _from_heads(d_q), _from_heads(d_k.sum(axis=2, keepdims=True)), _from_heads(d_v.sum(axis=2, keepdims=True))


def _capped_attention(q: Array, k: Array, v: Array, hidden: Array | None, cap: float) -> tuple[Array, Array, Array]:
    """`multi_head_attention` of scores with a cap, and the cap's slope at each score."""
    scores = (q @ k.swapaxes(-1, -2)) * q.shape[-1] ** -0.5
    capped = np.tanh(scores / q.dtype.type(cap))
    scores, slope = q.dtype.type(cap) * capped, 1 - capped * capped
    if hidden is not None:
        scores = np.where(hidden, -np.inf, scores).astype(q.dtype)
    probabilities = softmax(scores)
    return probabilities @ v, probabilities, slope


def _capped_attention_backward(
    d_out: Array, q: Array, k: Array, v: Array, probabilities: Array, slope: Array
) -> tuple[Array, Array, Array]:
    d_v = probabilities.swapaxes(-1, -2) @ d_out
    d_scores = softmax_backward(d_out @ v.swapaxes(-1, -2), probabilities)
    d_scores *= slope
    d_scores *= q.shape[-1] ** -0.5
    return d_scores @ k, d_scores.swapaxes(-1, -2) @ q, d_v


def _hidden_keys(t_q: int, t_k: int, window: int | None = None) -> np.ndarray:
    """bool (Tq, Tk): the keys that a causal query does not see, those after it and those that left the window."""
    hidden = np.triu(np.ones((t_q, t_k), bool), k=t_k - t_q + 1)
    if window is not None:
        hidden |= np.tril(np.ones((t_q, t_k), bool), k=t_k - t_q - window)
    return hidden


def _to_heads(x: Array, batch: int, n_kv_heads: int, group: int) -> Array:
    """(B*T, H*d_head) -> (B, G, H/G, T, d_head)."""
    rows, width = x.shape
    heads = x.reshape(batch, rows // batch, n_kv_heads, group, width // (n_kv_heads * group))
    return heads.transpose(0, 2, 3, 1, 4)


def _from_heads(x: Array) -> Array:
    """(B, G, H/G, T, d_head) -> (B*T, H*d_head)."""
    batch, n_kv_heads, group, t, d_head = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch * t, n_kv_heads * group * d_head)


# ----------------------------------------------------------------------------------------------------------------------
# softmax cross-entropy, mean over the rows that count
# ----------------------------------------------------------------------------------------------------------------------


class CrossEntropyCache(NamedTuple):
    probabilities: np.ndarray  # (N, V)
    labels: np.ndarray  # int (N,) or float (N, V)
    n_counted: int


def cross_entropy(logits: Array, labels: Array) -> tuple[float, CrossEntropyCache]:
    """Mean of -log softmax(logits)[label].

    logits: (N, V). labels: int (N,) with -1 = this row is not counted, or float rows (N, V) (a distribution per row;
    a row of zeros is not counted). Returns (loss as a Python float, cache); the loss of no counted row is 0.
    """
    shifted = logits - logits.max(axis=1, keepdims=True)  # (N, V)
    exponentials = np.exp(shifted)
    total = exponentials.sum(axis=1, keepdims=True)  # (N, 1)
    log_total = np.log(total)
    if labels.ndim == 1:
        labels = whole_numbers("labels", labels, -1, logits.shape[1])
        counted = np.flatnonzero(labels >= 0)
        losses = log_total[counted, 0] - shifted[counted, labels[counted]]
        n_counted = len(counted)
    else:
        labels = np.array(labels)
        losses = (labels * (log_total - shifted)).sum(axis=1)
        n_counted = int(np.any(labels != 0, axis=1).sum())
    loss = float(losses.sum(dtype=np.float64)) / max(n_counted, 1)
    return loss, CrossEntropyCache(exponentials / total, labels, n_counted)


def cross_entropy_backward(cache: CrossEntropyCache) -> Array:
    """-> d_logits (N, V): softmax - one_hot(label), divided by the number of counted rows; 0 in rows not counted."""
    probabilities, labels, n_counted = cache
    if labels.ndim == 1:
        d_logits = probabilities * (labels >= 0)[:, None].astype(probabilities.dtype)
        counted = np.flatnonzero(labels >= 0)
        d_logits[counted, labels[counted]] -= 1.0
    else:
        # sum over the row first: labels need not sum to 1
        d_logits = probabilities * labels.sum(axis=1, keepdims=True) - labels
    return d_logits / probabilities.dtype.type(max(n_counted, 1))


# ----------------------------------------------------------------------------------------------------------------------
# the optimizer
# ----------------------------------------------------------------------------------------------------------------------


def adamw_step(weight: Array, gradient: Array, m: Array, v: Array, hp: Array, factor: float | None = None) -> None:
    """One AdamW update (Loshchilov & Hutter 2019, algorithm 2), in place on weight, m and v; all of one shape.

    hp: the seven numbers [lr, beta1, beta2, eps, weight_decay, s5, s6] of `toy.AdamW`, shape (1, 7) or (7,). factor: what
    clipping multiplies the gradient by, None = 1.
    Raises ValueError when two of the four arrays share memory.
    """
    if any(np.shares_memory(a, b) for a, b in itertools.combinations((weight, gradient, m, v), 2)):
        raise ValueError("weight, gradient, m and v must be four arrays: two of them share memory")
    lr, beta1, beta2, eps, weight_decay, s5, s6 = (weight.dtype.type(number) for number in np.ravel(hp))
    if factor is not None:
        gradient = gradient * weight.dtype.type(factor)
    m *= beta1
    m += (1 - beta1) * gradient
    v *= beta2
    v += (1 - beta2) * gradient * gradient
    weight *= 1 - lr * weight_decay
    weight -= lr * (m * s5) / (np.sqrt(v * s6) + eps)


def sum_of_squares(x: Array) -> float:
    """Sum of x^2 over all elements of x (any shape), added up in double precision -> float. For the gradient norm."""
    return float(np.sum(np.square(x, dtype=np.float64)))


# ----------------------------------------------------------------------------------------------------------------------
# linear, softcap and cross_entropy in one, forward and backward: the logits (N, V) of a large vocabulary, and their gradient,
# are the largest matrices of a step. Here they are never whole: a band of rows is forgotten before the next one begins
# ----------------------------------------------------------------------------------------------------------------------


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
    labels, n_counted = _checked_labels(labels, len(x), weight.shape[0])
    loss, d_x = 0.0, np.zeros_like(x)
    for rows in row_bands(len(x), weight.shape[0]):
        logits, product = linear(x[rows], weight)  # (n, V)
        logits, capped = (logits, None) if cap is None else softcap(logits, cap)
        mean, of_band = cross_entropy(logits, labels[rows])
        share = of_band.n_counted / max(n_counted, 1)  # of the rows that the mean is over
        loss += mean * share
        if backward:
            d_logits = scale(cross_entropy_backward(of_band), share)  # (n, V)
            d_logits = d_logits if capped is None else softcap_backward(d_logits, capped)
            d_x[rows] = linear_backward(d_logits, product, d_weight)
    return loss, d_x if backward else None


def _checked_labels(labels: Array, rows: int, classes: int) -> tuple[Array, int]:
    """The labels of `linear_cross_entropy`, copied where they are integers, and how many of their rows count."""
    if labels.shape not in ((rows,), (rows, classes)):
        raise ValueError(f"labels must be {(rows,)} integers or float rows {(rows, classes)}, got {labels.shape}")
    if labels.ndim == 1:
        labels = whole_numbers("labels", labels, -1, classes)
        return labels, int((labels >= 0).sum())
    return labels, int(np.any(labels != 0, axis=1).sum())


# ----------------------------------------------------------------------------------------------------------------------
# a forward that is run once more, because its caches were not kept
# ----------------------------------------------------------------------------------------------------------------------


def again(forward: Callable[[], Result]) -> Result:
    """forward(), which calls ops that have been called before with the same arguments (graphs count uses of parameters)."""
    return forward()
