"""Learning-rate schedules: pure functions of the step, counted from 0.

All warm up linearly over the first `warmup` steps and reach the full rate at step `warmup`.
"""

import math
from collections.abc import Callable

Schedule = Callable[[int], float]  # the learning rate of a step
NAMES = ("constant", "cosine", "wsd")


def constant(step: int, lr: float, warmup: int = 0) -> float:
    """`lr` after the warm-up."""
    return lr * _warmup_factor(step, warmup)


def cosine(step: int, lr: float, steps: int, warmup: int = 0, floor: float = 0.1) -> float:
    """Half a cosine from `lr` at step `warmup` down to floor*lr at step `steps - 1`, and floor*lr after it.

    The cosine is from Loshchilov & Hutter 2017 (SGDR, eq. 5, one cycle). Going down to a tenth of the peak, over as many
    steps as the run has, is what GPT-3 (Brown et al. 2020, appendix B) and Chinchilla (Hoffmann et al. 2022) do.
    """
    if step < warmup:
        return lr * _warmup_factor(step, warmup)
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return lr * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)))


def wsd(step: int, lr: float, steps: int, warmup: int = 0, floor: float = 0.1, cooldown: float = 0.2) -> float:
    """Warm-up, stable, decay: `lr` until the last `cooldown` (a fraction of the steps), then a straight line down to floor*lr
    at step `steps - 1`.

    From MiniCPM (Hu et al. 2024, section 4); that a straight line serves as well as the cosine is measured in Hägele et al.
    2024. A run that is to be made longer can go on from any checkpoint of the stable part as if it had always been longer.
    """
    if step < warmup:
        return lr * _warmup_factor(step, warmup)
    progress = (step - cooldown_start(steps, cooldown)) / max(1, steps - 1 - cooldown_start(steps, cooldown))
    return lr * (1.0 - (1.0 - floor) * min(1.0, max(0.0, progress)))


def cooldown_start(steps: int, cooldown: float) -> int:
    """The last step of `wsd` at the full rate."""
    return max(0, steps - 1 - round(cooldown * steps))


def make_schedule(
    name: str, lr: float, steps: int, warmup: int = 0, floor: float = 0.1, cooldown: float = 0.2
) -> Schedule:
    """The schedule `name` ("constant", "cosine" or "wsd") as a function of the step.

    Raises ValueError for an unknown name, a rate that is not a positive number, a negative warm-up, a warm-up that leaves
    no step for the way down, a floor outside [0, 1] and a cooldown outside (0, 1].
    """
    if name not in NAMES:
        raise ValueError(f"schedule must be one of {', '.join(NAMES)}, got {name!r}")
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr must be a positive number, got {lr}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if warmup < 0:
        raise ValueError(f"warmup must be at least 0 steps, got {warmup}")
    if not 0.0 <= floor <= 1.0:
        raise ValueError(f"floor must lie in [0, 1], a fraction of lr, got {floor}")
    if not 0.0 < cooldown <= 1.0:
        raise ValueError(f"cooldown must lie in (0, 1], a fraction of the steps, got {cooldown}")
    if name == "constant":
        return lambda step: constant(step, lr, warmup)
    if warmup >= steps:
        raise ValueError(f"a warmup of {warmup} steps leaves none of {steps} steps for the {name}: shorten the warmup")
    if name == "wsd":
        if warmup > cooldown_start(steps, cooldown):
            raise ValueError(
                f"a warmup of {warmup} steps reaches into the last {cooldown:g} of {steps} steps, in which the wsd goes "
                "down: shorten the warmup or the cooldown"
            )
        return lambda step: wsd(step, lr, steps, warmup, floor, cooldown)
    return lambda step: cosine(step, lr, steps, warmup, floor)


def _warmup_factor(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / (warmup + 1))
