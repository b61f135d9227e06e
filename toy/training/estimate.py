"""What a run will take: time and memory, by trying a few steps that change nothing."""

import sys
import time
from typing import NamedTuple, cast

import numpy as np

from toy.adamw import HyperParameterRow
from toy.training.options import RunOptions
from toy.training.start import Start

TRIED_SECONDS = 0.3  # how long steps are tried, if two of them do not take longer


class Estimate(NamedTuple):
    """seconds: of all that is left of a run; step_seconds: of one step; bytes: the largest memory of the process, None where
    the system does not say."""

    seconds: float
    step_seconds: float
    bytes: int | None


def measure(start: Start, step: int, writes: bool) -> Estimate:
    """What the run of a realized start takes from `step` on. writes: whether it saves checkpoints."""
    o, r = start.options, start.recipe
    step_seconds, left = seconds_of_a_step(start, step), o.steps - step
    seconds = left * step_seconds + (left // cast(int, o.eval_every) + 2) * start.validation_seconds()
    if every := getattr(o, "sample_every", None):
        seconds += (left // every + 1) * start.sample_seconds()
    memory = largest_memory()
    if memory is not None and writes:
        memory += 4 * (r.n_own + 2 * r.n_trained)  # copies of the weights and of both moments, in float32
    return Estimate(seconds, step_seconds, memory)


def seconds_of_a_step(start: Start, step: int) -> float:
    """Of one step and its batch, tried several times; weights, moments and everything random stay as they are."""
    # with a rate of 0 and betas of 1, AdamW leaves weights and moments as they are, to the bit
    row = np.array([[0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0]], np.float32).view(HyperParameterRow)
    row.step = step + 1  # dropout is drawn for it
    times: list[float] = []
    with np.errstate(all="ignore"):
        while len(times) < 3 or (sum(times) < TRIED_SECONDS and len(times) < 12):
            started = time.perf_counter()
            inputs, labels = start.training_batch(step)
            start.recipe.step(inputs, labels=labels, hp=row)
            times.append(time.perf_counter() - started)
            if len(times) == 2 and sum(times) > 10 * TRIED_SECONDS:
                break
    return float(np.median(times[1:]))  # the first one touches memory for the first time


def steps_in(start: Start, seconds: float, asked: RunOptions) -> int:
    """How many steps of a realized start, with their validations and samples, take these seconds; at least 1.

    asked: the options as they were given; by default there are ten validations and four samples, whatever the steps are.
    """
    step = seconds_of_a_step(start, 0)
    for every, default, cost in (
        (asked.eval_every, 11, start.validation_seconds()),
        (getattr(asked, "sample_every", None), 4, start.sample_seconds()),
    ):
        if every is None:
            seconds -= default * cost
        elif every:
            step += cost / every
    return max(1, round(seconds / step))


def largest_memory() -> int | None:
    """The most memory that this process has had so far, in bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_bytes(n: float) -> str:
    """123456789 -> "123 MB"."""
    return f"{n / 1e9:.2f} GB" if n >= 999.5e6 else f"{n / 1e6:.0f} MB"


def in_time(seconds: float) -> str:
    """0.041 -> "41 ms", 75 -> "75 s", 600 -> "10 minutes"."""
    for limit, unit, words in ((1.0, 1e-3, "ms"), (100.0, 1.0, "s"), (6000.0, 60.0, "minutes")):
        if seconds < limit:
            return f"{seconds / unit:.3g} {words}"
    return f"{seconds / 3600:.3g} hours"
