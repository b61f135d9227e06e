"""Lesson 1: every op of a forward pass. What is right is said by toy/ops/reference.py."""

import numpy as np

from toy.checks.exercises.engine import Mistake, Task
from toy.ops import reference


def _ids_and_table(rng):
    for n, vocab, d in ((5, 4, 3), (6, 6, 6), (1, 7, 2)):
        yield {"token_ids": rng.integers(0, vocab, n), "table": rng.normal(size=(vocab, d))}


def _linear(rng):
    for n, n_in, n_out in ((5, 4, 3), (4, 4, 4), (1, 2, 5)):
        yield {
            "x": rng.normal(size=(n, n_in)),
            "weight": rng.normal(size=(n_out, n_in)),
            "bias": rng.normal(size=n_out),
        }


def _scores(rng):
    for shape in ((4, 5), (3, 3), (1, 7)):
        yield {"scores": rng.normal(size=shape)}
    yield {"scores": rng.normal(size=(3, 4)) + np.array([[1000.0], [0.0], [-1000.0]])}


def _softmax(scores):
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def _logits_and_labels(rng):
    for n, vocab, size in ((5, 4, 1.0), (4, 4, 3.0), (1, 6, 1.0), (3, 5, 1000.0)):
        yield {"logits": size * rng.normal(size=(n, vocab)), "labels": rng.integers(0, vocab, n)}
    yield {
        "logits": np.array([[1000.0, -1000.0, 0.0]]),
        "labels": np.array([1]),
    }  # its probability is too small for a float
    yield {"logits": rng.normal(size=(3, 4)) - 1000, "labels": rng.integers(0, 4, 3)}


def _norm(rng, beta):
    for n, d, size in ((4, 6, 1.0), (5, 5, 0.01), (1, 3, 2.0)):
        case = {"x": size * (rng.normal(size=(n, d)) + 0.5), "gamma": rng.normal(size=d)}
        yield case | ({"beta": rng.normal(size=d)} if beta else {}) | {"eps": 1e-5}


def _activations(rng):
    for shape in ((4, 5), (1, 3), (2, 2)):
        yield {"x": 2 * rng.normal(size=shape)}


def _heads(rng):
    for batch, t, n_heads, d_head in ((2, 3, 2, 4), (1, 4, 4, 4), (3, 1, 2, 2), (2, 5, 1, 3)):
        yield {"x": rng.normal(size=(batch * t, n_heads * d_head)), "batch": batch, "n_heads": n_heads}


def _qkv(rng):
    for shape in ((2, 2, 3, 4), (1, 1, 4, 4), (2, 3, 5, 2)):
        yield {name: 2 * rng.normal(size=shape) for name in "qkv"}


def attention_on_four_axes(q, k, v, causal=True):
    """The reference's attention for q (B, H, T, d_head) and k, v (B, G, T, d_head) -> (B, H, T, d_head)."""
    (batch, n_heads, t, d_head), n_kv_heads = q.shape, k.shape[1]
    q, k, v = (a.transpose(0, 2, 1, 3).reshape(batch * t, -1) for a in (q, k, v))
    out, _ = reference.attention(q, k, v, batch=batch, n_heads=n_heads, n_kv_heads=n_kv_heads, causal=causal)
    return out.reshape(batch, t, n_heads, d_head).transpose(0, 2, 1, 3)


NO_SCALE = (
    "The scores are not divided by sqrt(d_head). A dot product of d_head random terms is about sqrt(d_head) large, "
    "and the softmax gets too sharp."
)

TASKS = (
    Task(
        name="embedding",
        lesson=1,
        statement=(
            "Look up the row of each token: token_ids int (N,) and the table (V, D) give (N, D), a row for each token."
        ),
        source='''
def embedding(token_ids, table):
    """token_ids: int (N,), table: (V, D) -> (N, D)."""
    return table[token_ids]  #?
''',
        cases=_ids_and_table,
        returns=("x",),
        judge=lambda token_ids, table: reference.embedding(token_ids, table)[0],
        mistakes=(
            Mistake(
                "table[token_ids]", "table[:, token_ids]",
                "This takes columns of the table: a token has a row, table[token_ids].",
            ),
            Mistake(
                "table[token_ids]", "table[token_ids - 1]",
                "The row before is taken: ids are counted from 0, as rows are.",
            ),
            Mistake(
                "table[token_ids]", "table[np.sort(token_ids)]",
                "The rows come in the order of the ids: they belong in the text's order.",
            ),
            Mistake(
                "table[token_ids]", "table[np.unique(token_ids)]",
                "A token that occurs twice has one row here: it is looked up each time.",
            ),
        ),
    ),
    Task(
        name="linear",
        lesson=1,
        statement="A linear layer: y = x W^T + b, with x (N, in), weight (out, in) and bias (out,); y is (N, out).",
        source='''
def linear(x, weight, bias):
    """x: (N, in), weight: (out, in), bias: (out,) -> (N, out)."""
    return x @ weight.T + bias  #?
''',
        cases=_linear,
        returns=("y",),
        judge=lambda x, weight, bias: reference.linear(x, weight, bias)[0],
        mistakes=(
            Mistake(
                "weight.T", "weight",
                "W is not transposed: it is stored as (out, in), so the product that fits is x (N, in) @ W^T (in, out).",
            ),
            Mistake(
                " + bias", "",
                "The bias is missing: one number for each of the `out` columns, the same in all rows.",
            ),
            Mistake(
                "x @ weight.T + bias", "weight @ x.T + bias[:, None]",
                "The result is transposed, (out, N): activations have one row for each token, (N, out).",
            ),
            Mistake("+ bias", "- bias", "The bias is subtracted: y = x W^T + b."),
        ),
    ),
    Task(
        name="softmax",
        lesson=1,
        statement=(
            "Turn each row of scores (N, V) into probabilities: exp, divided by the sum of the row. It has to stand "
            "scores of 1000, whose exp is not a number a computer has: subtract the largest of the row first, which "
            "changes nothing else."
        ),
        source='''
def softmax(scores):
    """scores: (N, V) -> (N, V), every row sums to 1."""
    shifted = scores - scores.max(axis=1, keepdims=True)  #? no exp of a large number
    exponentials = np.exp(shifted)  #? (N, V)
    return exponentials / exponentials.sum(axis=1, keepdims=True)  #?
''',
        cases=_scores,
        returns=("probabilities",),
        judge=_softmax,
        mistakes=(
            Mistake(
                "scores - scores.max(axis=1, keepdims=True)", "scores",
                "exp of a score of 1000 is infinite, and infinity through infinity is not a number: subtract the row's "
                "maximum first.",
            ),
            Mistake(
                "exponentials.sum(axis=1", "exponentials.sum(axis=0",
                "The sum runs down the columns (axis 0): a softmax is taken over the row, axis 1.",
            ),
            Mistake(
                "exponentials.sum(axis=1, keepdims=True)", "exponentials.sum()",
                "The whole matrix sums to 1: every row is to sum to 1 by itself (axis=1, keepdims=True).",
            ),
            Mistake(
                "scores.max(axis=1, keepdims=True)", "scores.max()",
                "The largest score of the whole matrix is subtracted. In a row far below it every exp is 0 and so is "
                "the sum: subtract each row's own maximum.",
            ),
        ),
    ),
    Task(
        name="cross_entropy",
        lesson=1,
        statement=(
            "The loss: the mean over the rows of -log softmax(logits)[label]. logits (N, V), labels int (N,). Logits of"
            " 1000 are to be no problem, so take log(sum(exp)) - logit, with the row's maximum subtracted, and not the "
            "log of a softmax."
        ),
        source='''
def cross_entropy(logits, labels):
    """logits: (N, V), labels: int (N,) -> a number in nats."""
    shifted = logits - logits.max(axis=1, keepdims=True)  #? (N, V)
    log_total = np.log(np.exp(shifted).sum(axis=1))  #? (N,)
    losses = log_total - shifted[np.arange(len(labels)), labels]  #? (N,)
    return np.mean(losses)  #?
''',
        cases=_logits_and_labels,
        returns=("loss",),
        judge=lambda logits, labels: reference.cross_entropy(logits, labels)[0],
        mistakes=(
            Mistake(
                "log_total - shifted[np.arange(len(labels)), labels]",
                "-np.log((np.exp(shifted) / np.exp(log_total)[:, None])[np.arange(len(labels)), labels])",
                "This is the logarithm of a softmax: a probability too small for a computer becomes 0 and its logarithm"
                " infinite. log(sum(exp)) - logit needs no probability.",
            ),
            Mistake(
                "logits - logits.max(axis=1, keepdims=True)", "logits",
                "exp of a logit of 1000 is infinite: subtract the row's maximum first, which cancels in the difference.",
            ),
            Mistake(
                "np.mean(losses)", "np.sum(losses)",
                "The losses of the rows are added up: the loss is their mean, divided by N.",
            ),
            Mistake(
                "np.mean(losses)", "-np.mean(losses)",
                "The sign is wrong: the loss is the mean of -log p, never below 0.",
            ),
            Mistake(
                "np.mean(losses)", "np.sum(losses) / logits.size",
                "This divides by N x V: the mean is over the N rows alone.",
            ),
        ),
    ),
    Task(
        name="rms_norm",
        lesson=1,
        statement=(
            "RMSNorm divides each row by its root mean square and multiplies column by column with a gain: "
            "y = x / sqrt(mean(x^2) + eps) * gamma. x (N, D), gamma (D,)."
        ),
        source='''
def rms_norm(x, gamma, eps):
    """x: (N, D), gamma: (D,), eps: a small number -> (N, D)."""
    mean_square = np.mean(x * x, axis=1, keepdims=True)  #? (N, 1)
    return x / np.sqrt(mean_square + eps) * gamma  #?
''',
        cases=lambda rng: _norm(rng, beta=False),
        returns=("y",),
        judge=lambda x, gamma, eps: reference.rms_norm(x, gamma, eps)[0],
        mistakes=(
            Mistake(
                "axis=1", "axis=0",
                "The mean runs over the tokens (axis 0): each row is normalised by itself, over its D numbers (axis 1).",
            ),
            Mistake(
                "np.mean(x * x", "np.var(x",
                "The mean of x is subtracted before squaring: that is LayerNorm. RMSNorm takes mean(x^2) as it is.",
            ),
            Mistake(
                "np.sqrt(mean_square + eps)", "(np.sqrt(mean_square) + eps)",
                "eps belongs under the root: sqrt(mean(x^2) + eps).",
            ),
            Mistake(
                "np.mean(x * x", "np.sum(x * x",
                "This is the sum of the squares: the root *mean* square divides it by D.",
            ),
            Mistake(" * gamma", "", "The gain is missing: column j is multiplied with gamma[j]."),
        ),
    ),
    Task(
        name="layer_norm",
        lesson=1,
        statement=(
            "LayerNorm subtracts the mean of each row, divides by its standard deviation, and then scales and shifts "
            "the columns: y = (x - mean) / sqrt(var + eps) * gamma + beta. The variance is divided by D. x (N, D), "
            "gamma and beta (D,)."
        ),
        source='''
def layer_norm(x, gamma, beta, eps):
    """x: (N, D), gamma, beta: (D,), eps: a small number -> (N, D)."""
    centred = x - x.mean(axis=1, keepdims=True)  #? (N, D)
    variance = np.mean(centred * centred, axis=1, keepdims=True)  #? (N, 1)
    return centred / np.sqrt(variance + eps) * gamma + beta  #?
''',
        cases=lambda rng: _norm(rng, beta=True),
        returns=("y",),
        judge=lambda x, gamma, beta, eps: reference.layer_norm(x, gamma, beta, eps)[0],
        mistakes=(
            Mistake(
                "np.mean(centred * centred, axis=1, keepdims=True)",
                "np.sum(centred**2, axis=1, keepdims=True) / (x.shape[1] - 1)",
                "The variance is divided by D - 1: a norm takes the plain mean of the squares, divided by D.",
            ),
            Mistake(
                "x.mean(axis=1, keepdims=True)", "x.mean(axis=0)",
                "The mean is that of each column, over the tokens: every row has its own, over axis 1.",
            ),
            Mistake(
                "np.sqrt(variance + eps)", "(np.sqrt(variance) + eps)",
                "eps belongs under the root: sqrt(var + eps).",
            ),
            Mistake(" + beta", "", "The shift is missing: beta[j] is added to column j."),
            Mistake(
                "return centred", "return x",
                "The mean is not subtracted in the numerator: (x - mean) is what is divided.",
            ),
            Mistake(
                "np.sqrt(variance + eps)", "(variance + eps)",
                "The root is missing: divide by the standard deviation, not by the variance.",
            ),
        ),
    ),
    Task(
        name="gelu",
        lesson=1,
        statement=(
            "GELU in its tanh form, element by element: y = x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))). x may "
            "have any shape (N, F)."
        ),
        source='''
def gelu(x):
    """x: (N, F) -> (N, F)."""
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)  #?
    return 0.5 * x * (1 + np.tanh(inner))  #?
''',
        cases=_activations,
        returns=("y",),
        judge=lambda x: reference.gelu(x)[0],
        mistakes=(
            Mistake(
                "0.5 * x", "x",
                "The factor 1/2 is missing: 1 + tanh goes up to 2, and for large x the result is x.",
            ),
            Mistake(
                "0.044715 * x**3", "0.044715 * x**2",
                "The small term is x cubed: with the square the curve is not the same on both sides.",
            ),
            Mistake(
                "np.sqrt(2 / np.pi)", "2 / np.pi",
                "The root is missing: the factor inside of the tanh is sqrt(2/pi) = 0.798.",
            ),
            Mistake(
                "0.5 * x * (1 + np.tanh(inner))", "x / (1 + np.exp(-1.702 * x))",
                "This is the approximation by a sigmoid, x sigmoid(1.702 x): the tanh form is asked for.",
            ),
            Mistake("(1 + np.tanh(inner))", "np.tanh(inner)", "The 1 is missing: 1 + tanh lies between 0 and 2."),
        ),
    ),
    Task(
        name="split_heads",
        lesson=1,
        statement=(
            "The rows of q are tokens, batch after batch, and their columns are heads side by side: (B*T, H*d_head). "
            "Bring them to four axes (B, H, T, d_head), so that every head of every sequence is one matrix."
        ),
        source='''
def split_heads(x, batch, n_heads):
    """x: (B*T, H*d_head) -> (B, H, T, d_head)."""
    rows, width = x.shape
    four_axes = x.reshape(batch, rows // batch, n_heads, width // n_heads)  #? (B, T, H, d_head)
    return four_axes.transpose(0, 2, 1, 3)  #? (B, H, T, d_head)
''',
        cases=_heads,
        returns=("heads",),
        mistakes=(
            Mistake(
                "four_axes.transpose(0, 2, 1, 3)",
                "four_axes.reshape(batch, n_heads, rows // batch, width // n_heads)",
                "A reshape does not move numbers, so the heads are mixed with the tokens: exchange the two axes with "
                "transpose.",
            ),
            Mistake(
                "four_axes.transpose(0, 2, 1, 3)", "four_axes",
                "The axes are (B, T, H, d_head) still: H has to stand before T.",
            ),
            Mistake(
                "x.reshape(batch, rows // batch, n_heads, width // n_heads)",
                "x.reshape(batch, rows // batch, width // n_heads, n_heads).swapaxes(2, 3)",
                "Head h gets every H-th column: the heads lie side by side, head 0 owns the first d_head columns.",
            ),
            Mistake(
                "x.reshape(batch, rows // batch, n_heads, width // n_heads)",
                "x.reshape(rows // batch, batch, n_heads, width // n_heads).swapaxes(0, 1)",
                "Tokens of different sequences are mixed: the rows are batch after batch, row b*T + t is token t of "
                "sequence b.",
            ),
        ),
    ),
    Task(
        name="attention",
        lesson=1,
        statement=(
            "Multi-head attention without a mask: softmax(q k^T / sqrt(d_head)) v for every head of every sequence. "
            "q, k, v and the result are (B, H, T, d_head)."
        ),
        source='''
def attention(q, k, v):
    """q, k, v: (B, H, T, d_head) -> (B, H, T, d_head)."""
    scores = q @ k.swapaxes(2, 3) / np.sqrt(q.shape[3])  #? (B, H, T, T): a row for each query
    exponentials = np.exp(scores - scores.max(axis=3, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=3, keepdims=True)  #?
    return probabilities @ v  #?
''',
        cases=_qkv,
        returns=("out",),
        judge=lambda q, k, v: attention_on_four_axes(q, k, v, causal=False),
        mistakes=(
            Mistake(" / np.sqrt(q.shape[3])", "", NO_SCALE),
            Mistake(
                "np.sqrt(q.shape[3])", "q.shape[3]",
                "The scores are divided by d_head: its root is meant, sqrt(d_head).",
            ),
            Mistake(
                "np.sqrt(q.shape[3])", "np.sqrt(q.shape[2])",
                "The scores are divided by sqrt(T): d_head is the last axis of q, shape[3].",
            ),
            Mistake(
                "exponentials.sum(axis=3", "exponentials.sum(axis=2",
                "The probabilities sum to 1 over the queries: each query distributes 1 over the keys, the last axis.",
            ),
            Mistake(
                "q @ k.swapaxes(2, 3)", "k @ q.swapaxes(2, 3)",
                "The scores are transposed: rows are queries and columns keys, q k^T.",
            ),
        ),
    ),
    Task(
        name="causal_attention",
        lesson=1,
        statement=(
            "The same with the causal mask: a query sees the keys up to its own position and none after it. "
            "Set the other scores to -infinity before the softmax. q, k, v and the result are (B, H, T, d_head)."
        ),
        source='''
def causal_attention(q, k, v):
    """q, k, v: (B, H, T, d_head) -> (B, H, T, d_head)."""
    t, d_head = q.shape[2:]
    scores = q @ k.swapaxes(2, 3) / np.sqrt(d_head)  #? (B, H, T, T)
    hidden = np.triu(np.ones((t, t), bool), k=1)  #? (T, T): True where the key comes after the query
    scores = np.where(hidden, -np.inf, scores)  #?
    exponentials = np.exp(scores - scores.max(axis=3, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=3, keepdims=True)
    return probabilities @ v
''',
        cases=_qkv,
        returns=("out",),
        judge=attention_on_four_axes,
        mistakes=(
            Mistake(
                "np.where(hidden, -np.inf, scores)", "scores",
                "The causal mask is forgotten: every query reads the keys after it, and so its own label.",
            ),
            Mistake(
                "np.triu(np.ones((t, t), bool), k=1)", "np.tril(np.ones((t, t), bool), k=-1)",
                "The mask hides the past and shows the future: what is above the diagonal (key after query) has to be "
                "hidden.",
            ),
            Mistake(
                "k=1)", "k=0)",
                "A token may not look at itself here, and the first one sees nothing (not a number): the diagonal "
                "stays, k=1.",
            ),
            Mistake(
                "np.where(hidden, -np.inf, scores)", "np.where(hidden, 0, scores)",
                "A score of 0 is not hidden: exp(0) is 1. Set hidden scores to -infinity, whose exp is 0.",
            ),
            Mistake(
                "    return probabilities @ v", "    scores = q @ k.swapaxes(2, 3) / np.sqrt(d_head)\n"
                "    exponentials = np.exp(scores - scores.max(axis=3, keepdims=True))\n"
                "    return np.where(hidden, 0, exponentials / exponentials.sum(axis=3, keepdims=True)) @ v",
                "The mask comes after the softmax, so the rows no longer sum to 1: hide the scores before it.",
            ),
            Mistake(" / np.sqrt(d_head)", "", NO_SCALE),
        ),
    ),
)  # fmt: skip
