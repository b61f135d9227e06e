"""Lesson 2: the backward of every op. What is right is said by central differences of the forward in toy/ops/reference.py.

As there, a backward gets the cache of its forward, returns the gradients of activations and adds those of parameters into
the arrays it is given; so the functions of that file are right answers.
"""

import numpy as np

from toy.checks.exercises.engine import GRADIENT_BAR, Mistake, Task, derivatives
from toy.checks.exercises.lesson_1 import attention_on_four_axes
from toy.ops import reference


def _embedding(rng):
    for n, vocab, d in ((6, 4, 3), (5, 5, 5), (1, 3, 2)):
        _, cache = reference.embedding(rng.integers(0, vocab, n), np.zeros((vocab, d)))
        yield {"d_out": rng.normal(size=(n, d)), "cache": cache, "d_table": rng.normal(size=(vocab, d))}


def _embedding_backward(d_out, cache, d_table):
    (of_table,) = derivatives(lambda table: table[cache.token_ids], d_out, np.zeros_like(d_table))
    d_table += of_table


def _linear(rng):
    for n, n_in, n_out in ((5, 4, 3), (4, 4, 4), (1, 2, 5)):
        _, cache = reference.linear(rng.normal(size=(n, n_in)), rng.normal(size=(n_out, n_in)))
        gradients = {"d_weight": rng.normal(size=(n_out, n_in)), "d_bias": rng.normal(size=n_out)}
        yield {"d_y": rng.normal(size=(n, n_out)), "cache": cache} | gradients


def _linear_backward(d_y, cache, d_weight, d_bias):
    inputs = cache.x, cache.weight, np.zeros_like(d_bias)
    d_x, of_weight, of_bias = derivatives(lambda *inputs: reference.linear(*inputs)[0], d_y, *inputs)
    d_weight += of_weight
    d_bias += of_bias
    return d_x


def softmax_of(scores):
    """scores: (..., V) -> probabilities of the last axis."""
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def _softmax(rng):
    for shape in ((4, 5), (3, 3), (1, 7)):
        yield {"d_probabilities": rng.normal(size=shape), "probabilities": softmax_of(rng.normal(size=shape))}


def _softmax_backward(d_probabilities, probabilities):
    (d_scores,) = derivatives(softmax_of, d_probabilities, np.log(probabilities))
    return d_scores


def _norm(rng, op):
    for n, d in ((4, 6), (5, 5), (1, 3)):
        x, parameters = (
            rng.normal(size=(n, d)) + 0.5,
            [rng.normal(size=d) for _ in range(2 if op == "layer_norm" else 1)],
        )
        _, cache = getattr(reference, op)(x, *parameters)
        gradients = {name: rng.normal(size=d) for name, _ in zip(("d_gamma", "d_beta"), parameters)}
        yield {"d_y": rng.normal(size=(n, d)), "cache": cache} | gradients


def _rms_norm_backward(d_y, cache, d_gamma):
    d_x, of_gamma = derivatives(lambda *inputs: reference.rms_norm(*inputs)[0], d_y, cache.x, cache.gamma)
    d_gamma += of_gamma
    return d_x


def _layer_norm_backward(d_y, cache, d_gamma, d_beta):
    inputs = cache.x, cache.gamma, np.zeros_like(d_beta)
    d_x, of_gamma, of_beta = derivatives(lambda *inputs: reference.layer_norm(*inputs)[0], d_y, *inputs)
    d_gamma += of_gamma
    d_beta += of_beta
    return d_x


def elementwise_backward_cases(op):
    """The cases of the backward of an op on one matrix (N, F), from its forward in the reference."""

    def cases(rng):
        for shape in ((4, 5), (1, 3), (2, 2)):
            _, cache = getattr(reference, op)(2 * rng.normal(size=shape))
            yield {"d_y": rng.normal(size=shape), "cache": cache}

    return cases


def _attention(rng):
    for shape in ((2, 2, 3, 4), (1, 1, 4, 4), (2, 3, 5, 2)):
        q, k, v = (rng.normal(size=shape) for _ in range(3))
        scores = np.where(
            np.triu(np.ones((shape[2], shape[2]), bool), k=1), -np.inf, q @ k.swapaxes(2, 3) / shape[3] ** 0.5
        )
        yield {"d_out": rng.normal(size=shape), "q": q, "k": k, "v": v, "probabilities": softmax_of(scores)}


def _cross_entropy(rng):
    for n, vocab in ((5, 4), (4, 4), (1, 6)):
        labels = rng.integers(0, vocab, n)
        labels[3:4] = -1
        yield {"cache": reference.cross_entropy(rng.normal(size=(n, vocab)), labels)[1]}


def _cross_entropy_backward(cache):
    forward = lambda logits: reference.cross_entropy(logits, cache.labels)[0]  # noqa: E731
    return derivatives(forward, 1.0, np.log(cache.probabilities))[0]


TASKS = (
    Task(
        name="embedding_backward",
        lesson=2,
        statement=(
            "The gradient of a look-up: row n of d_out (N, D) belongs to row token_ids[n] of the table, so it is added "
            "to that row of d_table (V, D). A token that occurs k times collects k rows. The ids (N,) are in "
            "cache.token_ids."
        ),
        source='''
def embedding_backward(d_out, cache, d_table):
    """d_out: (N, D). Adds into d_table (V, D)."""
    np.add.at(d_table, cache.token_ids, d_out)  #?
''',
        cases=_embedding,
        returns=(),
        changes=("d_table",),
        judge=_embedding_backward,
        bar=GRADIENT_BAR,
        mistakes=(
            Mistake(
                "np.add.at(d_table, cache.token_ids, d_out)", "d_table[cache.token_ids] += d_out",
                "d_table[ids] += d_out keeps one row of a token that occurs several times: numpy reads, adds and writes"
                " once for each id. np.add.at adds all of them.",
            ),
            Mistake(
                "np.add.at(d_table, cache.token_ids, d_out)", "d_table[cache.token_ids] = d_out",
                "The rows are overwritten: what d_table held before is lost. A gradient is added (np.add.at).",
            ),
            Mistake(
                "    np.add.at", "    d_table[...] = 0\n    np.add.at",
                "d_table is set to zero first: a gradient adds to what is there already (the tied output layer wrote "
                "into it).",
            ),
        ),
    ),
    Task(
        name="linear_backward",
        lesson=2,
        statement=(
            "The backward of y = x W^T + b: d_x = d_y W is returned; d_W = d_y^T x and d_b = the sum of d_y over the "
            "rows are added into the arrays given. d_y (N, out); x (N, in) and weight (out, in) are in the cache; "
            "d_weight (out, in), d_bias (out,)."
        ),
        source='''
def linear_backward(d_y, cache, d_weight, d_bias):
    """d_y: (N, out) -> d_x (N, in). Adds into d_weight (out, in) and d_bias (out,)."""
    x, weight = cache
    d_weight += d_y.T @ x  #? (out, N) @ (N, in)
    d_bias += d_y.sum(axis=0)  #?
    return d_y @ weight  #? (N, out) @ (out, in)
''',
        cases=_linear,
        returns=("d_x",),
        changes=("d_weight", "d_bias"),
        judge=_linear_backward,
        bar=GRADIENT_BAR,
        mistakes=(
            Mistake(
                "d_y @ weight", "d_y @ weight.T",
                "d_x uses W transposed: the forward was x W^T, so the way back is d_y (N, out) @ W (out, in).",
            ),
            Mistake(
                "d_y.T @ x", "x.T @ d_y",
                "d_weight is transposed: it has the shape of the weight, (out, in), which is d_y^T (out, N) @ x (N, "
                "in).",
            ),
            Mistake(
                "d_weight += d_y.T", "d_weight[...] = d_y.T",
                "d_weight is overwritten: gradients of parameters are added (+=) to what is there.",
            ),
            Mistake(
                "d_bias += d_y.sum(axis=0)", "d_bias = d_bias + d_y.sum(axis=0)",
                "d_bias = d_bias + ... makes a new array and leaves the caller's as it was: write into it with +=.",
            ),
            Mistake(
                "d_y.sum(axis=0)", "d_y.mean(axis=0)",
                "d_bias is the mean over the rows: the bias was added to each row, so their gradients add up.",
            ),
            Mistake(
                "d_weight += d_y.T @ x", "d_weight += d_y.T @ x / len(x)",
                "d_weight is divided by N: the mean, if there is one, is in d_y already.",
            ),
        ),
    ),
    Task(
        name="softmax_backward",
        lesson=2,
        statement=(
            "The backward of p = softmax(s), row by row: d_s = p * (d_p - sum(d_p * p)). Each score moves all "
            "probabilities of its row, that is the sum. d_probabilities and probabilities are (N, V)."
        ),
        source='''
def softmax_backward(d_probabilities, probabilities):
    """d_probabilities, probabilities: (N, V) -> d_scores (N, V)."""
    weighted = (d_probabilities * probabilities).sum(axis=1, keepdims=True)  #? (N, 1)
    return probabilities * (d_probabilities - weighted)  #?
''',
        cases=_softmax,
        returns=("d_scores",),
        judge=_softmax_backward,
        bar=GRADIENT_BAR,
        mistakes=(
            Mistake(
                "d_probabilities - weighted", "d_probabilities + weighted",
                "The sum has the wrong sign: raising one score takes probability away from the others, so it is "
                "subtracted.",
            ),
            Mistake(
                "(d_probabilities - weighted)", "d_probabilities",
                "The sum over the row is missing: a score changes every probability of its row through the common "
                "denominator.",
            ),
            Mistake(
                "(d_probabilities * probabilities).sum", "d_probabilities.sum",
                "The sum is not weighted: it is that of d_p * p, not of d_p.",
            ),
            Mistake(
                "weighted)", "d_probabilities * probabilities)",
                "Only the diagonal of the derivative is used, p(1 - p): the other probabilities of the row depend on "
                "the score too.",
            ),
            Mistake(
                "axis=1", "axis=0",
                "The sum runs over the tokens (axis 0): a softmax is one row, so sum over axis 1.",
            ),
        ),
    ),
    Task(
        name="cross_entropy_backward",
        lesson=2,
        statement=(
            "Softmax and cross-entropy together have a simple gradient: (softmax - one_hot(label)) / n_counted. A row "
            "with label -1 is not counted and its gradient is 0. The cache has probabilities (N, V), labels int (N,) "
            "and n_counted."
        ),
        source='''
def cross_entropy_backward(cache):
    """-> d_logits (N, V)."""
    probabilities, labels, n_counted = cache
    counted = np.flatnonzero(labels >= 0)  # the rows that have a label
    d_logits = np.zeros_like(probabilities)
    d_logits[counted] = probabilities[counted]  #?
    d_logits[counted, labels[counted]] -= 1  #?
    return d_logits / n_counted  #?
''',
        cases=_cross_entropy,
        returns=("d_logits",),
        judge=_cross_entropy_backward,
        bar=GRADIENT_BAR,
        mistakes=(
            Mistake(
                "return d_logits / n_counted", "return d_logits",
                "This is the gradient of the sum: the loss is a mean, divide by n_counted.",
            ),
            Mistake(
                "d_logits / n_counted", "d_logits / len(labels)",
                "This divides by N: rows with label -1 are not counted in the mean, take n_counted.",
            ),
            Mistake(
                "return d_logits / n_counted", "return -d_logits / n_counted",
                "The sign is wrong: it is softmax - one_hot, the label's logit has a negative slope.",
            ),
            Mistake(
                "    d_logits[counted, labels[counted]] -= 1\n", "",
                "The one_hot term is missing: subtract 1 at the label of each row.",
            ),
            Mistake(
                "np.flatnonzero(labels >= 0)", "np.arange(len(labels))",
                "A row with label -1 gets a gradient (and -1 is the last column in numpy): its gradient is 0.",
            ),
        ),
    ),
    Task(
        name="rms_norm_backward",
        lesson=2,
        statement=(
            "The backward of y = x_hat * gamma with x_hat = x * rstd and rstd = 1/sqrt(mean(x^2) + eps). d_gamma (D,) "
            "collects d_y * x_hat of all rows; d_x = rstd * (d_x_hat - x_hat * mean(d_x_hat * x_hat)), because rstd "
            "depends on every x of the row. d_y (N, D); the cache has x (N, D), rstd (N, 1), gamma (D,)."
        ),
        source='''
def rms_norm_backward(d_y, cache, d_gamma):
    """d_y: (N, D) -> d_x (N, D). Adds into d_gamma (D,)."""
    x, rstd, gamma = cache
    x_hat = x * rstd  #? (N, D)
    d_gamma += (d_y * x_hat).sum(axis=0)  #?
    d_x_hat = d_y * gamma  #? (N, D)
    projection = np.mean(d_x_hat * x_hat, axis=1, keepdims=True)  #? (N, 1)
    return rstd * (d_x_hat - x_hat * projection)  #?
''',
        cases=lambda rng: _norm(rng, "rms_norm"),
        returns=("d_x",),
        changes=("d_gamma",),
        judge=_rms_norm_backward,
        bar=GRADIENT_BAR,
        mistakes=(
            Mistake(
                " - x_hat * projection", "",
                "The projection is missing in d_x: rstd depends on every x of the row, so subtract x_hat * mean(d_x_hat"
                " * x_hat).",
            ),
            Mistake(
                "d_x_hat - x_hat", "d_x_hat + x_hat",
                "The projection has the wrong sign: it is subtracted, rstd falls when x grows.",
            ),
            Mistake("d_x_hat = d_y * gamma", "d_x_hat = d_y", "The gain is missing in d_x: d_x_hat = d_y * gamma."),
            Mistake(
                "(d_y * x_hat).sum(axis=0)", "(d_y * x).sum(axis=0)",
                "d_gamma uses x: the gain multiplies x_hat = x * rstd, so its gradient is d_y * x_hat.",
            ),
            Mistake(
                "(d_y * x_hat).sum(axis=0)", "(d_y * x_hat)",
                "d_gamma is not summed over the rows: gamma (D,) is used by every row, so their (N, D) gradients add "
                "up.",
            ),
            Mistake(
                "np.mean(d_x_hat", "np.sum(d_x_hat",
                "The projection is a sum: it comes from mean(x^2), so it is a mean over the D numbers too.",
            ),
            Mistake(
                "axis=1, keepdims=True", "axis=0",
                "The mean in d_x runs over the tokens (axis 0): each row has its own rstd, so it is axis 1.",
            ),
            Mistake(
                "d_gamma += ", "d_gamma[...] = ",
                "d_gamma is overwritten: a gradient is added (+=) to what is there.",
            ),
        ),
    ),
    Task(
        name="layer_norm_backward",
        lesson=2,
        statement=(
            "The backward of LayerNorm: as RMSNorm's, but the mean of the row depends on every x too, which subtracts "
            "mean(d_x_hat) as well: d_x = rstd * (d_x_hat - mean(d_x_hat) - x_hat * mean(d_x_hat * x_hat)). d_y (N, D);"
            " the cache has x (N, D), mean and rstd (N, 1), gamma (D,); d_gamma and d_beta (D,) are added to."
        ),
        source='''
def layer_norm_backward(d_y, cache, d_gamma, d_beta):
    """d_y: (N, D) -> d_x (N, D). Adds into d_gamma and d_beta (D,)."""
    x, mean, rstd, gamma = cache
    x_hat = (x - mean) * rstd  #? (N, D)
    d_gamma += (d_y * x_hat).sum(axis=0)  #?
    d_beta += d_y.sum(axis=0)  #?
    d_x_hat = d_y * gamma  #? (N, D)
    of_mean = d_x_hat.mean(axis=1, keepdims=True)  #? (N, 1)
    of_rstd = np.mean(d_x_hat * x_hat, axis=1, keepdims=True)  #? (N, 1)
    return rstd * (d_x_hat - of_mean - x_hat * of_rstd)  #?
''',
        cases=lambda rng: _norm(rng, "layer_norm"),
        returns=("d_x",),
        changes=("d_gamma", "d_beta"),
        judge=_layer_norm_backward,
        bar=GRADIENT_BAR,
        mistakes=(
            Mistake(" - of_mean", "", "mean(d_x_hat) is missing in d_x: the mean of the row depends on every x of it."),
            Mistake(
                " - x_hat * of_rstd", "",
                "x_hat * mean(d_x_hat * x_hat) is missing in d_x: the standard deviation depends on every x of the row.",
            ),
            Mistake("(x - mean) * rstd", "x * rstd", "x_hat is not centred: it is (x - mean) * rstd."),
            Mistake("d_x_hat = d_y * gamma", "d_x_hat = d_y", "The gain is missing in d_x: d_x_hat = d_y * gamma."),
            Mistake(
                "d_beta += d_y.sum(axis=0)", "d_beta += d_y.mean(axis=0)",
                "d_beta is a mean: beta was added to every row, so their gradients add up.",
            ),
            Mistake(
                "(d_y * x_hat).sum(axis=0)", "d_y.sum(axis=0)",
                "d_gamma lacks x_hat: gamma multiplies it, so its gradient is d_y * x_hat, summed over the rows.",
            ),
            Mistake(
                "- x_hat * of_rstd", "+ x_hat * of_rstd",
                "The last term of d_x has the wrong sign: it is subtracted.",
            ),
        ),
    ),
    Task(
        name="gelu_backward",
        lesson=2,
        statement=(
            "The backward of y = x/2 * (1 + tanh(u)) with u = sqrt(2/pi) (x + 0.044715 x^3): the product rule gives two"
            " terms, and tanh' = 1 - tanh^2. d_y (N, F) and cache.x (N, F) give d_x (N, F)."
        ),
        source='''
def gelu_backward(d_y, cache):
    """d_y: (N, F) -> d_x (N, F)."""
    x = cache.x
    tanh = np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
    d_inner = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)  #? du/dx
    return d_y * (0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * d_inner)  #?
''',
        cases=elementwise_backward_cases("gelu"),
        returns=("d_x",),
        judge=lambda d_y, cache: derivatives(lambda x: reference.gelu(x)[0], d_y, cache.x)[0],
        bar=GRADIENT_BAR,
        mistakes=(
            Mistake(
                "0.5 * (1 + tanh) + ", "",
                "The first term of the product rule is missing: x itself has a derivative, 0.5 * (1 + tanh).",
            ),
            Mistake(
                " + 0.5 * x * (1 - tanh**2) * d_inner", "",
                "The second term of the product rule is missing: the tanh depends on x as well.",
            ),
            Mistake("(1 - tanh**2)", "(1 - tanh)", "The derivative of tanh is 1 - tanh^2: the square is missing."),
            Mistake(
                "(1 + 3 * 0.044715 * x**2)", "(1 + 0.044715 * x**2)",
                "The derivative of x^3 is 3 x^2: the 3 is missing in du/dx.",
            ),
            Mistake(
                "* d_inner", "* 1",
                "The inner derivative du/dx is missing behind 1 - tanh^2: that is the chain rule.",
            ),
            Mistake("return d_y * ", "return ", "d_y is missing: this is dy/dx, and the gradient is d_y times it."),
        ),
    ),
    Task(
        name="attention_backward",
        lesson=2,
        statement=(
            "The backward of out = P v with P = softmax(q k^T / sqrt(d_head)) and the causal mask in it (P is 0 there, "
            "so nothing more is needed). All of d_out, q, k, v and the three gradients are (B, H, T, d_head), "
            "probabilities are (B, H, T, T)."
        ),
        source='''
def attention_backward(d_out, q, k, v, probabilities):
    """d_out, q, k, v: (B, H, T, d_head), probabilities: (B, H, T, T) -> d_q, d_k, d_v (B, H, T, d_head)."""
    d_v = probabilities.swapaxes(2, 3) @ d_out  #? (B, H, T, d_head)
    d_probabilities = d_out @ v.swapaxes(2, 3)  #? (B, H, T, T)
    weighted = (d_probabilities * probabilities).sum(axis=3, keepdims=True)  #? (B, H, T, 1)
    d_scores = probabilities * (d_probabilities - weighted) / np.sqrt(q.shape[3])  #? (B, H, T, T)
    d_q = d_scores @ k  #?
    d_k = d_scores.swapaxes(2, 3) @ q  #?
    return d_q, d_k, d_v
''',
        cases=_attention,
        returns=("d_q", "d_k", "d_v"),
        judge=lambda d_out, q, k, v, probabilities: derivatives(attention_on_four_axes, d_out, q, k, v),
        bar=GRADIENT_BAR,
        mistakes=(
            Mistake(
                " / np.sqrt(q.shape[3])", "",
                "1/sqrt(d_head) is missing in d_q and d_k: the scores were divided by it, so their gradients are.",
            ),
            Mistake(
                "d_probabilities - weighted", "d_probabilities + weighted",
                "The softmax term has the wrong sign: d_s = p * (d_p - sum(d_p * p)).",
            ),
            Mistake(
                "(d_probabilities - weighted)", "d_probabilities",
                "The softmax term is missing: d_s = p * (d_p - sum(d_p * p)), over the keys.",
            ),
            Mistake(
                "d_scores.swapaxes(2, 3) @ q", "d_scores @ q",
                "d_k uses the scores' gradient untransposed: its rows are queries, and d_k has a row for each key.",
            ),
            Mistake(
                "probabilities.swapaxes(2, 3) @ d_out", "probabilities @ d_out",
                "d_v uses P untransposed: key j collects from the queries that looked at it, column j of P.",
            ),
            Mistake(
                "sum(axis=3", "sum(axis=2",
                "The softmax term is summed over the queries: the softmax went over the keys, the last axis.",
            ),
            Mistake(
                "return d_q, d_k, d_v", "return d_k, d_q, d_v",
                "d_q and d_k are exchanged: the order is d_q, d_k, d_v.",
            ),
        ),
    ),
)  # fmt: skip
