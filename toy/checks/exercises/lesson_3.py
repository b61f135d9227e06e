"""Lesson 3: optimizers, one step each, as in their papers: momentum, RMSProp, Adam, AdamW; clipping by the global norm."""

import numpy as np

from toy.checks.exercises.engine import Mistake, Task
from toy.ops import reference


def _state(rng, names, numbers):
    """Cases of a weight, its gradient and the optimizer's arrays, then the given numbers, each of a list."""
    for i, shape in enumerate(((3, 4), (5,), (1, 2))):
        arrays = {"weight": rng.normal(size=shape), "gradient": rng.normal(size=shape)}
        arrays |= {name: rng.uniform(0.1, 1, shape) if name == "v" else rng.normal(size=shape) for name in names}
        yield arrays | {name: values[i] for name, values in numbers.items()}


LR, BETA1, BETA2, EPS = [0.1, 0.01, 0.5], [0.9, 0.8, 0.95], [0.95, 0.999, 0.9], [1e-3, 0.1, 0.01]
DECAY = [0.1, 0.5, 0.01]
ADAM = {"t": [1, 3, 100], "lr": LR, "beta1": BETA1, "beta2": BETA2, "eps": EPS}


def _moments(rng):
    for shape, beta, t in (((3, 2), 0.9, 1), ((4,), 0.99, 3), ((1, 5), 0.5, 20)):
        yield {"moment": rng.normal(size=shape), "beta": beta, "t": t}


def _corrected(weight, gradient, m, v, t, lr, beta1, beta2, eps, weight_decay=0.0):
    row = np.array([lr, beta1, beta2, eps, weight_decay, 1 / (1 - beta1**t), 1 / (1 - beta2**t)])
    reference.adamw_step(weight, gradient, m, v, row)


def _gradients(rng):
    for size, largest in ((1.0, 1.0), (0.1, 5.0), (3.0, 0.5)):
        yield {"gradients": [size * rng.normal(size=shape) for shape in ((3, 4), (5,), (2, 2))], "largest": largest}


NEW_ARRAY = (
    "{0} is not changed: {0} = ... makes a new array, and the caller's stays as it was. "
    "Write into it ({0} *= and {0} +=)."
)


TASKS = (
    Task(
        name="momentum_step",
        lesson=3,
        statement=(
            "SGD with momentum: velocity = mu * velocity + gradient, then weight = weight - lr * velocity, both in "
            "place. The velocity remembers earlier gradients. weight, gradient and velocity have one shape."
        ),
        source='''
def momentum_step(weight, gradient, velocity, lr, mu):
    """Arrays of one shape, two numbers. Changes weight and velocity in place."""
    velocity *= mu  #?
    velocity += gradient  #?
    weight -= lr * velocity  #?
''',
        cases=lambda rng: _state(rng, ["velocity"], {"lr": LR, "mu": BETA1}),
        returns=(),
        changes=("weight", "velocity"),
        mistakes=(
            Mistake(
                "velocity += gradient", "velocity += (1 - mu) * gradient",
                "The gradient is multiplied with 1 - mu: that is Adam's mean. Here it is added as it is.",
            ),
            Mistake(
                "weight -= lr * velocity", "weight += lr * velocity",
                "The step goes uphill: subtract lr * velocity.",
            ),
            Mistake(
                "weight -= lr * velocity", "weight -= lr * gradient",
                "The weight moves along the gradient alone: the velocity is what it moves along.",
            ),
            Mistake(
                "    velocity *= mu\n    velocity += gradient", "    velocity = mu * velocity + gradient",
                NEW_ARRAY.format("velocity"),
            ),
            Mistake(
                "    velocity *= mu\n", "",
                "mu is missing: without it the velocity never forgets an old gradient.",
            ),
        ),
    ),
    Task(
        name="rms_prop_step",
        lesson=3,
        statement=(
            "RMSProp divides each weight's step by the size its gradients have had: v = beta * v + (1 - beta) * "
            "gradient^2, then weight = weight - lr * gradient / (sqrt(v) + eps), both in place and all of one shape."
        ),
        source='''
def rms_prop_step(weight, gradient, v, lr, beta, eps):
    """Arrays of one shape, three numbers. Changes weight and v in place."""
    v *= beta  #?
    v += (1 - beta) * gradient**2  #?
    weight -= lr * gradient / (np.sqrt(v) + eps)  #?
''',
        cases=lambda rng: _state(rng, ["v"], {"lr": LR, "beta": BETA2, "eps": EPS}),
        returns=(),
        changes=("weight", "v"),
        mistakes=(
            Mistake(
                "(np.sqrt(v) + eps)", "np.sqrt(v + eps)",
                "eps stands under the root: here it is added to sqrt(v).",
            ),
            Mistake(
                "(np.sqrt(v) + eps)", "(v + eps)",
                "The root is missing: v is a mean of squares, sqrt(v) has the size of a gradient.",
            ),
            Mistake("gradient**2", "np.abs(gradient)", "v collects sizes: it is the mean of the *squared* gradients."),
            Mistake(
                "    v *= beta\n    v += (1 - beta)", "    v *= 1 - beta\n    v += beta",
                "beta and 1 - beta are exchanged: the old v keeps the large part, beta.",
            ),
            Mistake(
                "    v *= beta\n    v += (1 - beta) * gradient**2", "    v = beta * v + (1 - beta) * gradient**2",
                NEW_ARRAY.format("v"),
            ),
        ),
    ),
    Task(
        name="bias_correction",
        lesson=3,
        statement=(
            "A running mean that begins at zero is too small at first: after t steps with a constant gradient it is 1 -"
            " beta^t of it. Return the moment divided by that factor (a new array of its shape). t is counted from 1."
        ),
        source='''
def bias_correction(moment, beta, t):
    """moment: an array, beta: a number in [0, 1), t: the step, counted from 1 -> the corrected moment."""
    return moment / (1 - beta**t)  #?
''',
        cases=_moments,
        returns=("corrected",),
        mistakes=(
            Mistake(
                "beta**t", "beta * t",
                "beta is multiplied with t: after t steps beta^t of the start is left, a power.",
            ),
            Mistake(
                "moment / (1 - beta**t)", "moment * (1 - beta**t)",
                "The moment gets smaller still: it is too small, so divide by 1 - beta^t.",
            ),
            Mistake(
                "beta**t", "beta ** (t + 1)",
                "The step is counted one too far: in the first step t is 1 and the factor 1 - beta.",
            ),
            Mistake(
                "(1 - beta**t)", "(1 - beta)",
                "The correction stays as it is in the first step: it has to fade, 1 - beta^t.",
            ),
            Mistake(
                "return moment / (1 - beta**t)", "moment /= 1 - beta**t\n    return moment",
                "The moment itself is changed: it is needed as it is in the next step. Return a new array.",
            ),
        ),
    ),
    Task(
        name="adam_step",
        lesson=3,
        statement=(
            "Adam (Kingma & Ba 2015, algorithm 1): m and v are the running means of the gradient and of its square, "
            "both corrected for their start at zero (divided by 1 - beta^t), and weight = weight - lr * m_hat / "
            "(sqrt(v_hat) + eps). weight, m and v are changed in place; t counts from 1."
        ),
        source='''
def adam_step(weight, gradient, m, v, t, lr, beta1, beta2, eps):
    """weight, gradient, m, v: arrays of one shape; t: the step, counted from 1. Changes weight, m and v in place."""
    m *= beta1
    m += (1 - beta1) * gradient  #?
    v *= beta2
    v += (1 - beta2) * gradient**2  #?
    m_hat = m / (1 - beta1**t)  #?
    v_hat = v / (1 - beta2**t)  #?
    weight -= lr * m_hat / (np.sqrt(v_hat) + eps)  #?
''',
        cases=lambda rng: _state(rng, "mv", ADAM),
        returns=(),
        changes=("weight", "m", "v"),
        judge=_corrected,
        mistakes=(
            Mistake(
                "m_hat / (np.sqrt(v_hat) + eps)", "m / (np.sqrt(v) + eps)",
                "The bias correction is missing: m and v are used as they are, not divided by 1 - beta^t.",
            ),
            Mistake("v / (1 - beta2**t)", "v", "v is not corrected: divide it by 1 - beta2^t, as m by 1 - beta1^t."),
            Mistake(
                "(np.sqrt(v_hat) + eps)", "np.sqrt(v_hat + eps)",
                "eps stands under the root: it is added to sqrt(v_hat).",
            ),
            Mistake(
                "(1 - beta2) * gradient**2", "(1 - beta2) * gradient",
                "v collects the gradient: it is the mean of its square.",
            ),
            Mistake(
                "v / (1 - beta2**t)", "v / (1 - beta1**t)",
                "v is corrected with beta1: its own factor is 1 - beta2^t.",
            ),
            Mistake("lr * m_hat", "lr * gradient", "The step goes along this gradient alone: m_hat is the direction."),
            Mistake("weight -= lr", "weight += lr", "The step goes uphill: subtract it."),
        ),
    ),
    Task(
        name="adamw_step",
        lesson=3,
        statement=(
            "AdamW (Loshchilov & Hutter 2019, algorithm 2): Adam's step, and beside it the weight shrinks by lr * "
            "weight_decay of itself, before the step. The decay is not part of the gradient: m and v know nothing of "
            "it. weight, m and v are changed in place; t counts from 1."
        ),
        source='''
def adamw_step(weight, gradient, m, v, t, lr, beta1, beta2, eps, weight_decay):
    """weight, gradient, m, v: arrays of one shape; t: the step, counted from 1. Changes weight, m and v in place."""
    m *= beta1
    m += (1 - beta1) * gradient
    v *= beta2
    v += (1 - beta2) * gradient**2
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    weight *= 1 - lr * weight_decay  #?
    weight -= lr * m_hat / (np.sqrt(v_hat) + eps)  #?
''',
        cases=lambda rng: _state(rng, "mv", ADAM | {"weight_decay": DECAY}),
        returns=(),
        changes=("weight", "m", "v"),
        judge=_corrected,
        mistakes=(
            Mistake(
                "    m *= beta1\n",
                "    gradient = gradient + weight_decay * weight\n    m *= beta1\n    weight_decay = 0\n",
                "The decay is added to the gradient and goes through m and v: that is L2 regularisation, which Adam "
                "divides away. AdamW shrinks the weight itself.",
            ),
            Mistake(
                "1 - lr * weight_decay", "1 - weight_decay",
                "The decay is not multiplied with lr: the weight shrinks by lr * weight_decay of itself.",
            ),
            Mistake(
                "    weight *= 1 - lr * weight_decay\n", "",
                "The weight decay is missing: weight *= 1 - lr * weight_decay.",
            ),
            Mistake(
                "    weight *= 1 - lr * weight_decay\n    weight -= lr * m_hat / (np.sqrt(v_hat) + eps)",
                "    weight -= lr * m_hat / (np.sqrt(v_hat) + eps)\n    weight *= 1 - lr * weight_decay",
                "The decay comes after the step and shrinks the step too: shrink the weight first.",
            ),
            Mistake(
                "m_hat / (np.sqrt(v_hat) + eps)", "m / (np.sqrt(v) + eps)",
                "The bias correction is missing: use m_hat and v_hat in the step.",
            ),
            Mistake(
                "1 - lr * weight_decay", "1 + lr * weight_decay",
                "The weight grows: decay means 1 - lr * weight_decay.",
            ),
        ),
    ),
    Task(
        name="clip_by_global_norm",
        lesson=3,
        statement=(
            "Clipping: take the norm of all gradients together, the root of the sum of all their squares. Where it is "
            "above `largest`, multiply every gradient, in place, by largest / norm; otherwise leave them. gradients: a "
            "list of arrays of any shapes. Return the norm as it was."
        ),
        source='''
def clip_by_global_norm(gradients, largest):
    """gradients: a list of arrays, changed in place; largest: a number -> the norm before clipping."""
    norm = np.sqrt(sum(np.sum(gradient**2) for gradient in gradients))  #?
    for gradient in gradients:
        gradient *= min(1.0, largest / norm)  #?
    return norm
''',
        cases=_gradients,
        returns=("norm",),
        changes=("gradients",),
        mistakes=(
            Mistake(
                "min(1.0, largest / norm)", "min(1.0, largest / np.sqrt(np.sum(gradient**2)))",
                "Each gradient is clipped by its own norm, which changes the direction: all get the same factor, of the"
                " global norm.",
            ),
            Mistake(
                "min(1.0, largest / norm)", "largest / norm",
                "Small gradients are blown up: nothing is done when the norm is below `largest` (a factor of at most "
                "1).",
            ),
            Mistake(
                "np.sqrt(sum(np.sum(gradient**2) for gradient in gradients))",
                "sum(np.sum(gradient**2) for gradient in gradients)",
                "The root is missing: the norm is sqrt(sum of squares).",
            ),
            Mistake(
                "gradient *= min(1.0, largest / norm)", "np.clip(gradient, -largest, largest, out=gradient)",
                "Every number is cut off by itself, which changes the direction: scale all by one factor.",
            ),
            Mistake(
                "    return norm", "    return min(norm, largest)",
                "The norm after clipping is returned: the one before is what one wants to see in a plot.",
            ),
            Mistake(
                "np.sqrt(sum(np.sum(gradient**2) for gradient in gradients))",
                "sum(np.sqrt(np.sum(gradient**2)) for gradient in gradients)",
                "The norms of the arrays are added up: add the squares of all numbers and take one root.",
            ),
        ),
    ),
)  # fmt: skip
