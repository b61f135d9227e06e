"""Lesson 7: LoRA, forward, backward, and merged. y = x W^T + scale * (x A^T) B^T with scale = alpha / rank."""

from toy.checks.exercises.engine import GRADIENT_BAR, Mistake, Task, derivatives


def _layers(rng, names):
    for n, n_in, n_out, rank in ((5, 4, 3, 2), (3, 3, 3, 3), (1, 2, 5, 1)):
        shapes = {"d_y": (n, n_out), "x": (n, n_in), "weight": (n_out, n_in)}
        shapes |= {"a": (rank, n_in), "b": (n_out, rank), "d_a": (rank, n_in), "d_b": (n_out, rank)}
        yield {name: 8.0 if name == "alpha" else rng.normal(size=shapes[name]) for name in names}


def _forward(x, weight, a, b, alpha):
    return x @ weight.T + alpha / len(a) * (x @ a.T) @ b.T


def _backward(d_y, x, weight, a, b, alpha, d_a, d_b):
    d_x, of_a, of_b = derivatives(lambda x, a, b: _forward(x, weight, a, b, alpha), d_y, x, a, b)
    d_a += of_a
    d_b += of_b
    return d_x


TASKS = (
    Task(
        name="lora",
        lesson=7,
        statement=(
            "A linear layer with a LoRA adapter (Hu et al. 2021): y = x W^T + alpha/rank * (x A^T) B^T. x (N, in), "
            "weight (out, in), a (rank, in), b (out, rank); y is (N, out)."
        ),
        source='''
def lora(x, weight, a, b, alpha):
    """x: (N, in), weight: (out, in), a: (rank, in), b: (out, rank), alpha: a number -> (N, out)."""
    low = x @ a.T  #? (N, rank)
    return x @ weight.T + alpha / len(a) * low @ b.T  #?
''',
        cases=lambda rng: _layers(rng, ("x", "weight", "a", "b", "alpha")),
        returns=("y",),
        judge=_forward,
        mistakes=(
            Mistake("alpha / len(a) * low", "low", "The factor alpha/rank is missing before the correction."),
            Mistake(
                "alpha / len(a)", "alpha",
                "The correction is multiplied with alpha: divide it by the rank, so that rank and step size do not "
                "depend on each other.",
            ),
            Mistake(
                "alpha / len(a)", "alpha / a.shape[1]",
                "alpha is divided by `in`: a is (rank, in), the rank is its first axis.",
            ),
            Mistake("x @ weight.T + ", "", "The frozen layer is missing: the correction is added to x W^T."),
            Mistake(
                "low @ b.T", "low @ b",
                "B is not transposed: it is (out, rank), so the product that fits is (N, rank) @ B^T.",
            ),
        ),
    ),
    Task(
        name="lora_backward",
        lesson=7,
        statement=(
            "Its backward, with W frozen: d_x has both ways, through W and through the adapter; the gradients of a "
            "(rank, in) and b (out, rank) are added into d_a and d_b. d_y is (N, out), x (N, in), weight (out, in)."
        ),
        source='''
def lora_backward(d_y, x, weight, a, b, alpha, d_a, d_b):
    """d_y: (N, out) -> d_x (N, in). Adds into d_a (rank, in) and d_b (out, rank)."""
    d_correction = alpha / len(a) * d_y  #? (N, out)
    d_b += d_correction.T @ (x @ a.T)  #? (out, N) @ (N, rank)
    d_low = d_correction @ b  #? (N, rank)
    d_a += d_low.T @ x  #? (rank, N) @ (N, in)
    return d_y @ weight + d_low @ a  #? (N, in)
''',
        cases=lambda rng: _layers(rng, ("d_y", "x", "weight", "a", "b", "alpha", "d_a", "d_b")),
        returns=("d_x",),
        changes=("d_a", "d_b"),
        judge=_backward,
        bar=GRADIENT_BAR,
        mistakes=(
            Mistake(
                "alpha / len(a) * d_y", "d_y",
                "The factor alpha/rank is missing: it multiplied the correction, so it multiplies its gradient.",
            ),
            Mistake(
                " + d_low @ a", "",
                "d_x has one of two ways: x went into the adapter as well, which adds d_low A.",
            ),
            Mistake(
                "d_y @ weight + ", "",
                "d_x lacks the way through W: it is frozen, but the gradient passes through it.",
            ),
            Mistake("d_b += ", "d_b[...] = ", "d_b is overwritten: a gradient is added (+=) to what is there."),
            Mistake(
                "d_low.T @ x", "x.T @ d_low",
                "d_a is transposed: it has the shape of a, (rank, in), which is d_low^T (rank, N) @ x (N, in).",
            ),
            Mistake(
                "d_y @ weight + d_low @ a", "d_correction @ weight + d_low @ a",
                "alpha/rank has got into the way through W: only the adapter has that factor.",
            ),
        ),
    ),
    Task(
        name="lora_merge",
        lesson=7,
        statement=(
            "After training the adapter is merged into the weight, and the layer is as fast as before: return the one "
            "matrix (out, in) that gives the same y for every x. weight (out, in), a (rank, in), b (out, rank); the "
            "weight itself stays as it is."
        ),
        source='''
def lora_merge(weight, a, b, alpha):
    """weight: (out, in), a: (rank, in), b: (out, rank), alpha: a number -> (out, in)."""
    return weight + alpha / len(a) * b @ a  #?
''',
        cases=lambda rng: _layers(rng, ("weight", "a", "b", "alpha")),
        returns=("merged",),
        mistakes=(
            Mistake(
                "b @ a", "a.T @ b.T",
                "The correction is transposed, (in, out): W is (out, in), so it is B (out, rank) @ A (rank, in).",
            ),
            Mistake("alpha / len(a) * b", "b", "The factor alpha/rank is missing before B A."),
            Mistake(
                "alpha / len(a)", "alpha",
                "The correction is multiplied with alpha: the rank that divides it is missing.",
            ),
            Mistake(
                "    return weight + alpha / len(a) * b @ a",
                "    weight += alpha / len(a) * b @ a\n    return weight",
                "The weight itself is changed: another adapter could not be put on it any more. Return a new matrix.",
            ),
            Mistake("weight + ", "weight - ", "The correction is subtracted: the layer computes x W^T *plus* it."),
        ),
    ),
)  # fmt: skip
