"""Lesson 5: what the engines do to be fast, and how their numbers are compared."""

import numpy as np

from toy.checks.exercises.engine import Mistake, Task


def _products(rng):
    for n, k, m, block in ((4, 6, 5, 2), (3, 7, 3, 3), (1, 5, 2, 8)):
        yield {"a": rng.normal(size=(n, k)), "b": rng.normal(size=(k, m)), "block": block}


def _micro_batches(rng):
    for n in (3, 1, 5):
        yield {"losses": rng.uniform(1, 3, n), "counts": rng.integers(1, 20, n)}
    yield {"losses": np.array([2.0, 0.0]), "counts": np.array([7, 0])}


def _two_answers(rng):
    for shape in ((4, 3), (1, 5), (6,)):
        expected = rng.normal(size=shape)
        yield {"given": expected + 1e-3 * rng.normal(size=shape), "expected": expected}
    yield {"given": np.array([1.0, -2.5, 0.5]), "expected": np.array([1.0, -2.0, 0.5])}  # the largest are below 0


TASKS = (
    Task(
        name="matmul_in_blocks",
        lesson=5,
        statement=(
            "A fast matrix product works on blocks that fit into the processor's cache. Compute a (N, K) @ b (K, M) by "
            "cutting the K axis into pieces of `block` (the last may be shorter) and adding up the products of the "
            "pieces."
        ),
        source='''
def matmul_in_blocks(a, b, block):
    """a: (N, K), b: (K, M), block: a whole number -> (N, M)."""
    product = np.zeros((a.shape[0], b.shape[1]))
    for start in range(0, a.shape[1], block):
        piece = slice(start, start + block)
        product += a[:, piece] @ b[piece]  #?
    return product
''',
        cases=_products,
        returns=("product",),
        mistakes=(
            Mistake(
                "product += ", "product = ",
                "Only the last piece is left: the products of the pieces are added up (+=).",
            ),
            Mistake(
                "range(0, a.shape[1], block)", "range(0, a.shape[1] - block + 1, block)",
                "What is left over at the end is skipped: the last piece may be shorter than `block`.",
            ),
            Mistake(
                "range(0, a.shape[1], block)", "range(0, a.shape[1])",
                "The pieces overlap, so numbers count several times: the next piece begins `block` further on.",
            ),
            Mistake(
                "slice(start, start + block)", "slice(start, start + block - 1)",
                "Each piece lacks its last number: a slice ends before its end, start + block.",
            ),
        ),
    ),
    Task(
        name="loss_of_micro_batches",
        lesson=5,
        statement=(
            "A batch that does not fit into memory is computed in parts, and the result is to be that of the whole. "
            "Each part has the mean loss of its counted tokens (losses, (P,)) and their number (counts, int (P,), may "
            "be 0). Return the mean loss over all counted tokens."
        ),
        source='''
def loss_of_micro_batches(losses, counts):
    """losses: (P,), counts: int (P,) -> a number."""
    return np.sum(losses * counts) / np.sum(counts)  #?
''',
        cases=_micro_batches,
        returns=("loss",),
        mistakes=(
            Mistake(
                "np.sum(losses * counts) / np.sum(counts)", "np.mean(losses)",
                "A mean of means: a part of two tokens weighs as much as one of a hundred. Weigh with the counts.",
            ),
            Mistake(
                "np.sum(losses * counts) / np.sum(counts)", "np.sum(losses)",
                "The means are added up: the loss is a mean over the tokens of all parts.",
            ),
            Mistake(
                "losses * counts", "losses",
                "The losses are not multiplied with their counts: the sum over a part is its mean times its tokens.",
            ),
            Mistake(
                "/ np.sum(counts)", "/ len(counts)",
                "The sum over all tokens is divided by the number of parts: divide by the number of tokens.",
            ),
        ),
    ),
    Task(
        name="error_of_max",
        lesson=5,
        statement=(
            "How far apart are two engines? Take the largest difference |given - expected| as a fraction of the largest"
            " |expected|: elements near 0 have no digits of their own to lose. given and expected have one shape, any."
        ),
        source='''
def error_of_max(given, expected):
    """given, expected: arrays of one shape -> a number, 0 where they are equal."""
    return np.abs(given - expected).max() / np.abs(expected).max()  #?
''',
        cases=_two_answers,
        returns=("error",),
        mistakes=(
            Mistake(
                "np.abs(given - expected).max() / np.abs(expected).max()",
                "(np.abs(given - expected) / np.abs(expected)).max()",
                "Each difference is divided by its own element, which blows up near 0: divide by the largest "
                "|expected|.",
            ),
            Mistake(
                "np.abs(given - expected)", "(given - expected)",
                "Differences below 0 are lost: take their size, np.abs, before the maximum.",
            ),
            Mistake(
                "np.abs(given - expected).max()", "np.abs(given - expected).mean()",
                "The mean hides one wrong element among many: take the largest.",
            ),
            Mistake(
                " / np.abs(expected).max()", "",
                "The difference is not put in proportion: divide by the largest |expected|.",
            ),
            Mistake(
                "np.abs(expected).max()", "expected.max()",
                "The largest |expected| may be a negative number: np.abs first.",
            ),
        ),
    ),
)  # fmt: skip
