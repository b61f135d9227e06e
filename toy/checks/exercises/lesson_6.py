"""Lesson 6: the conventions of a ggml graph."""

from toy.checks.exercises.engine import Mistake, Task


def _matrices(rng):
    for of_a, of_b in (((3, 4), (5, 4)), ((4, 4), (4, 4)), ((1, 2), (3, 2))):
        yield {"a": rng.normal(size=of_a), "b": rng.normal(size=of_b)}


def _stacks(rng):
    for g, h, n, m, k in ((2, 4, 3, 5, 4), (1, 3, 2, 2, 3), (2, 2, 4, 4, 4), (3, 6, 2, 1, 2)):
        yield {"a": rng.normal(size=(g, n, k)), "b": rng.normal(size=(h, m, k))}


def _rows(rng):
    for step, beta1, beta2 in ((1, 0.9, 0.95), (4, 0.8, 0.999), (50, 0.9, 0.99)):
        yield {"step": step, "lr": 0.003, "beta1": beta1, "beta2": beta2, "eps": 1e-8, "weight_decay": 0.1}


TASKS = (
    Task(
        name="mul_mat",
        lesson=6,
        statement=(
            "ggml's matrix product multiplies rows with rows: each result is the dot product of a row of a (N, K) with "
            "a row of b (M, K). In numpy's order of axes the result is (M, N): a row for each row of b. So "
            "mul_mat(weight, x) is a linear layer as it stands."
        ),
        source='''
def mul_mat(a, b):
    """a: (N, K), b: (M, K) -> (M, N)."""
    return b @ a.T  #?
''',
        cases=_matrices,
        returns=("product",),
        mistakes=(
            Mistake("b @ a.T", "a @ b.T", "The result is transposed, (N, M): it has a row for each row of b, (M, N)."),
            Mistake(
                "b @ a.T", "b @ a",
                "Rows of b are multiplied with columns of a: both have K numbers in a *row*, so a is transposed.",
            ),
            Mistake("b @ a.T", "a @ b", "This is numpy's product a b: ggml's is b a^T, rows with rows."),
        ),
    ),
    Task(
        name="mul_mat_of_groups",
        lesson=6,
        statement=(
            "On stacks ggml repeats the first factor: a (G, N, K) and b (H, M, K) with H a multiple of G, and matrix h "
            "of b is multiplied with matrix h // (H/G) of a, as query heads share a key head. The result is (H, M, N)."
        ),
        source='''
def mul_mat_of_groups(a, b):
    """a: (G, N, K), b: (H, M, K) -> (H, M, N)."""
    repeated = np.repeat(a, len(b) // len(a), axis=0)  #? (H, N, K)
    return b @ repeated.swapaxes(1, 2)  #?
''',
        cases=_stacks,
        returns=("product",),
        mistakes=(
            Mistake(
                "np.repeat(a, len(b) // len(a), axis=0)", "np.tile(a, (len(b) // len(a), 1, 1))",
                "The matrices of a come in turn, h % G: neighbours share one, h // (H/G), which is np.repeat and not "
                "np.tile.",
            ),
            Mistake(
                "b @ repeated.swapaxes(1, 2)", "repeated @ b.swapaxes(1, 2)",
                "Each result is transposed, (N, M): it has a row for each row of b.",
            ),
            Mistake(
                "b @ repeated.swapaxes(1, 2)", "b @ repeated",
                "Rows are multiplied with columns: exchange the last two axes of a, so that rows meet rows.",
            ),
            Mistake(
                "np.repeat(a, len(b) // len(a), axis=0)", "np.repeat(a[:1], len(b), axis=0)",
                "Every matrix of b meets the first of a: matrix h meets number h // (H/G).",
            ),
        ),
    ),
    Task(
        name="adamw_row",
        lesson=6,
        statement=(
            "A graph gets its optimizer's numbers as one row of seven: lr, beta1, beta2, eps, weight_decay, s5, s6. "
            "With bias correction s5 = 1/(1 - beta1^t) and s6 = 1/(1 - beta2^t), by which m and v are *multiplied*; t "
            "is the step, counted from 1. Return the row, shape (7,)."
        ),
        source='''
def adamw_row(step, lr, beta1, beta2, eps, weight_decay):
    """step: counted from 1; five numbers -> (7,)."""
    s5 = 1 / (1 - beta1**step)  #?
    s6 = 1 / (1 - beta2**step)  #?
    return np.array([lr, beta1, beta2, eps, weight_decay, s5, s6])  #?
''',
        cases=_rows,
        returns=("row",),
        mistakes=(
            Mistake(
                "1 / (1 - beta1**step)\n    s6 = 1 / (1 - beta2**step)", "1 - beta1**step\n    s6 = 1 - beta2**step",
                "s5 and s6 are the divisors: the graph multiplies with them, so they are 1/(1 - beta^t).",
            ),
            Mistake(
                "weight_decay, s5, s6]", "weight_decay, s6, s5]",
                "s5 and s6 are exchanged: slot 5 is for m (beta1), slot 6 for v (beta2).",
            ),
            Mistake("1 / (1 - beta2**step)", "1 / (1 - beta1**step)", "s6 is made of beta1: v has beta2."),
            Mistake(
                "weight_decay, s5, s6]", "weight_decay, beta1, beta2]",
                "Slots 5 and 6 are beta1 and beta2: that is the other convention, constant slots. Bias correction is "
                "asked for.",
            ),
            Mistake(
                "eps, weight_decay, s5", "weight_decay, eps, s5",
                "eps and the weight decay are exchanged: eps is slot 3, the decay slot 4.",
            ),
        ),
    ),
)  # fmt: skip
