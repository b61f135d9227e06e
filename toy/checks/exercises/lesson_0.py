"""Lesson 0: a bigram model by counting and by training; a loss, its slope, the chain rule on numbers, and one step of SGD."""

import numpy as np

from toy.checks.exercises.engine import GRADIENT_BAR, Mistake, Task, derivatives


def _texts(rng):
    for vocab_size, n in ((4, 15), (7, 40), (3, 2)):
        yield {"ids": rng.integers(0, vocab_size, n), "vocab_size": vocab_size}


def _counts(rng):
    for vocab_size, smoothing in ((5, 1.0), (3, 0.5), (7, 2.0)):
        yield {"counts": rng.integers(0, 6, (vocab_size, vocab_size)), "smoothing": smoothing}


def _logits_and_text(rng):
    for vocab_size, n in ((5, 12), (3, 9), (6, 2)):
        yield {"logits": rng.normal(size=(vocab_size, vocab_size)), "ids": rng.integers(0, vocab_size, n)}


def _three_numbers(rng):
    for _ in range(3):
        yield dict(zip("abc", rng.normal(size=3).tolist()))


def _weight_and_gradient(rng):
    for shape, lr in (((3, 4), 0.1), ((1, 5), 2.0), ((6,), 0.01)):
        yield {"weight": rng.normal(size=shape), "gradient": rng.normal(size=shape), "lr": lr}


def _mean_loss(logits, ids):
    rows = logits[ids[:-1]]
    return np.mean(np.log(np.exp(rows).sum(axis=1)) - rows[np.arange(len(rows)), ids[1:]])


def _slope(logits, ids):
    (d_logits,) = derivatives(lambda table: _mean_loss(table, ids), 1.0, logits)
    return d_logits


TASKS = (
    Task(
        name="bigram_counts",
        lesson=0,
        statement=(
            "The simplest language model counts which token follows which. Make the table of these counts: counts[a, b]"
            " says how often token b stands right behind token a in the text. ids: int (N,); counts: int (V, V)."
        ),
        source='''
def bigram_counts(ids, vocab_size):
    """ids: int (N,) -> int (V, V), in [a, b] how often b stands right behind a."""
    counts = np.zeros((vocab_size, vocab_size), int)
    np.add.at(counts, (ids[:-1], ids[1:]), 1)  #? a pair that is there five times counts five times
    return counts
''',
        cases=_texts,
        returns=("counts",),
        mistakes=(
            Mistake(
                "np.add.at(counts, (ids[:-1], ids[1:]), 1)", "counts[ids[:-1], ids[1:]] += 1",
                "counts[...] += 1 with arrays of indices adds once however often a pair occurs, so no count gets above "
                "1. np.add.at adds for every occurrence (or count in a loop over the pairs).",
            ),
            Mistake(
                "(ids[:-1], ids[1:])", "(ids[1:], ids[:-1])",
                "The table is transposed: the row is the token that comes first, the column the one that follows it.",
            ),
            Mistake(
                "(ids[:-1], ids[1:])", "(ids, np.roll(ids, -1))",
                "One pair too many is counted: the last token is not followed by the first. N tokens have N - 1 pairs.",
            ),
            Mistake(
                "(ids[:-1], ids[1:])", "(ids[:-1:2], ids[1::2])",
                "Only every second pair is counted: the pairs overlap, ids[0] ids[1], then ids[1] ids[2].",
            ),
        ),
    ),
    Task(
        name="bigram_probabilities",
        lesson=0,
        statement=(
            "Turn the counts (V, V) into probabilities (V, V): row a holds the probabilities of what follows token a "
            "and sums to 1. So that nothing is impossible, `smoothing` is added to every count first."
        ),
        source='''
def bigram_probabilities(counts, smoothing):
    """counts: int (V, V), smoothing: a number above 0 -> (V, V), every row sums to 1."""
    smoothed = counts + smoothing  #? (V, V)
    return smoothed / smoothed.sum(axis=1, keepdims=True)  #?
''',
        cases=_counts,
        returns=("probabilities",),
        mistakes=(
            Mistake(
                "axis=1", "axis=0",
                "The columns sum to 1 here, the sum runs over the wrong axis. Row a is about what follows a: sum over "
                "axis 1.",
            ),
            Mistake(
                "smoothed.sum(axis=1, keepdims=True)", "smoothed.sum()",
                "All V x V numbers together sum to 1: that is the probability of a pair. Each row is to sum to 1 by "
                "itself.",
            ),
            Mistake(
                ", keepdims=True", "",
                "The sums of the rows have shape (V,), and numpy lays them along the columns: row a is divided by the "
                "sums of other rows. keepdims=True makes them (V, 1).",
            ),
            Mistake(
                "/ smoothed.sum", "/ counts.sum",
                "The rows sum to more than 1: the smoothing is in the numerator and not in the sum below it.",
            ),
            Mistake(
                "counts + smoothing", "counts",
                "The smoothing is missing: a pair that was never seen still gets probability 0.",
            ),
        ),
    ),
    Task(
        name="bigram_loss",
        lesson=0,
        statement=(
            "Now the table holds logits (V, V): row a, through a softmax, gives the probabilities of what follows a. "
            "The loss is the mean, over the N - 1 pairs of the text, of -log of the probability of what did follow, in "
            "nats."
        ),
        source='''
def bigram_loss(logits, ids):
    """logits: (V, V), ids: int (N,) -> a number, the mean of -log softmax(logits[first])[second] over all pairs."""
    rows = logits[ids[:-1]]  #? (N-1, V)
    log_total = np.log(np.exp(rows).sum(axis=1))  #? (N-1,)
    chosen = rows[np.arange(len(rows)), ids[1:]]  #? (N-1,) the logits of what did follow
    return np.mean(log_total - chosen)
''',
        cases=_logits_and_text,
        returns=("loss",),
        mistakes=(
            Mistake(
                "np.mean(log_total", "np.sum(log_total",
                "This is the sum over the pairs, the loss is their mean: divide by N - 1.",
            ),
            Mistake(
                "log_total - chosen", "chosen - log_total",
                "The sign is wrong: this is the mean of log p, the loss is that of -log p.",
            ),
            Mistake(
                "len(rows)), ids[1:]]", "len(rows)), ids[:-1]]",
                "The probability is taken of the token itself and not of the one that follows: the label of ids[t] is "
                "ids[t+1].",
            ),
            Mistake(
                "np.mean(log_total - chosen)", "np.mean(log_total - chosen) / np.log(2)",
                "These are bits (logarithm to base 2), the loss is in nats (natural logarithm).",
            ),
            Mistake(
                "np.log(np.exp(rows).sum(axis=1))", "np.log(np.exp(logits).sum())",
                "The softmax is taken over the whole table: each row has its own sum, over axis 1.",
            ),
        ),
    ),
    Task(
        name="bigram_slope",
        lesson=0,
        statement=(
            "To train the table of logits (V, V), one needs the slope of the loss of `bigram_loss` in each of them. For"
            " a pair the slope in the row of its first token is softmax(row) - one_hot(second), divided by the number "
            "of pairs; pairs with the same first token add up."
        ),
        source='''
def bigram_slope(logits, ids):
    """logits: (V, V), ids: int (N,) -> d_logits (V, V), the derivative of the mean loss in every logit."""
    first, second = ids[:-1], ids[1:]
    exponentials = np.exp(logits[first])  # (N-1, V)
    d_rows = exponentials / exponentials.sum(axis=1, keepdims=True)  #? the softmax, (N-1, V)
    d_rows[np.arange(len(second)), second] -= 1  #?
    d_logits = np.zeros_like(logits)
    np.add.at(d_logits, first, d_rows / len(second))  #?
    return d_logits
''',
        cases=_logits_and_text,
        returns=("d_logits",),
        judge=_slope,
        bar=GRADIENT_BAR,
        mistakes=(
            Mistake(
                "    d_rows[np.arange(len(second)), second] -= 1\n", "",
                "The one_hot term is missing: the softmax alone pushes every logit down. Subtract 1 where the token is "
                "that did follow.",
            ),
            Mistake(
                "d_rows / len(second)", "d_rows",
                "This is the slope of the sum: the loss is the mean over the pairs, divide by N - 1.",
            ),
            Mistake(
                "np.add.at(d_logits, first, d_rows / len(second))", "d_logits[first] += d_rows / len(second)",
                "d_logits[first] += ... keeps only one of the pairs that begin with the same token. np.add.at adds all "
                "of them.",
            ),
            Mistake(
                "np.add.at(d_logits, first, d_rows", "np.add.at(d_logits, first, -d_rows",
                "The sign is wrong: this is the direction downhill, the slope points uphill (softmax - one_hot).",
            ),
            Mistake(
                "np.add.at(d_logits, first", "np.add.at(d_logits, second",
                "The slopes lie in the rows of the second tokens: the loss of a pair read the row of its first token.",
            ),
        ),
    ),
    Task(
        name="chain_rule",
        lesson=0,
        statement=(
            "The chain rule on a graph of four numbers: s = a*b + c, y = tanh(s), loss = y*y + a. Go backwards from the"
            " loss and give its derivatives in a, b and c. a reaches the loss on two ways, and their derivatives add "
            "up."
        ),
        source='''
def chain_rule(a, b, c):
    """Three numbers -> d_a, d_b, d_c, the derivatives of the loss = tanh(a*b + c)**2 + a."""
    s = a * b + c
    y = np.tanh(s)
    d_y = 2 * y  #?
    d_s = d_y * (1 - y * y)  #? the derivative of tanh is 1 - tanh^2
    d_a = d_s * b + 1  #?
    d_b = d_s * a  #?
    d_c = d_s  #?
    return d_a, d_b, d_c
''',
        cases=_three_numbers,
        returns=("d_a", "d_b", "d_c"),
        judge=lambda a, b, c: derivatives(lambda a, b, c: np.tanh(a * b + c) ** 2 + a, 1.0, a, b, c),
        bar=GRADIENT_BAR,
        mistakes=(
            Mistake(
                "d_s * b + 1", "d_s * b",
                "d_a has one of its two ways: a also stands in the loss directly, which adds 1.",
            ),
            Mistake(
                "(1 - y * y)", "(1 - y)",
                "The derivative of tanh(s) is 1 - y^2 with y = tanh(s): the square is missing.",
            ),
            Mistake(
                "d_s * b + 1", "d_s * a + 1",
                "In a product each factor's derivative is the *other* factor: d_a gets d_s times b.",
            ),
            Mistake("d_y = 2 * y", "d_y = y", "The derivative of y*y is 2y: y stands there twice, so two ways add up."),
            Mistake(
                "d_c = d_s", "d_c = d_s * c",
                "c is added to the product: its derivative is 1, so d_c is d_s itself.",
            ),
        ),
    ),
    Task(
        name="sgd_step",
        lesson=0,
        statement=(
            "One step of stochastic gradient descent: move every weight against its gradient, lr times as far. The "
            "weight is changed in place, nothing is returned. weight and gradient have one shape, any."
        ),
        source='''
def sgd_step(weight, gradient, lr):
    """weight, gradient: arrays of one shape. Changes weight in place."""
    weight -= lr * gradient  #?
''',
        cases=_weight_and_gradient,
        returns=(),
        changes=("weight",),
        mistakes=(
            Mistake(
                "weight -= lr", "weight += lr",
                "The step goes uphill: the gradient points to where the loss grows, so subtract it.",
            ),
            Mistake(
                "weight -= lr * gradient", "weight = weight - lr * gradient",
                "weight = weight - ... makes a new array and leaves the caller's as it was. weight -= ... writes into "
                "it.",
            ),
            Mistake("lr * gradient", "gradient", "The learning rate is missing: the step is lr times the gradient."),
            Mistake(
                "lr * gradient", "lr * np.sign(gradient)",
                "Every weight moves by lr alike: only the gradient's sign is used. Its size belongs into the step.",
            ),
        ),
    ),
)  # fmt: skip
