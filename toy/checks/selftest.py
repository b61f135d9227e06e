"""`toy selftest --device NAME`: does this machine's device train as numpy does, and how fast? A report to paste.

For each model: the gradients of the first step against numpy, the loss over a number of steps against numpy, how the
graph is spread over devices, and the time of a step. Devices whose matrix products round to half precision (Metal, many
Vulkan drivers) get the wider bars.
"""

import platform
import statistics
import sys
import time
from typing import NamedTuple

import numpy as np

import ggml_bridge
from toy.config import VERSION, RecipeOptions
from toy.models import ARCHITECTURES
from toy.recipes import FromScratch

EXACT = {"gradient": 2e-5, "loss": 1e-3}  # float32 throughout: the CPU
HALF = {"gradient": 2e-2, "loss": 2e-2}  # products of halves, summed in float32
BATCH, LR = 4, 1e-3


class Check(NamedTuple):
    """One line of the report. bar: the largest value that passes, None where the value is only told."""

    model: str
    what: str
    value: float
    bar: float | None
    ok: bool


class Report(NamedTuple):
    """Everything `run` found; str() is the text to paste."""

    device: str
    system: tuple  # lines about the machine and the versions
    checks: tuple  # of Check
    ok: bool

    def __str__(self):
        lines = [*self.system, "", f"{'model':<12} {'what':<44} {'value':>12} {'bar':>9}"]
        for check in self.checks:
            bar = "" if check.bar is None else f"{check.bar:.0e}"
            lines.append(
                f"{check.model:<12} {check.what:<44} {check.value:>12.4g} {bar:>9}{'' if check.ok else '  FAILED'}"
            )
        return "\n".join([*lines, "", f"selftest on {self.device}: {'ok' if self.ok else 'FAILED'}"])


def run(device="cpu", steps=200):
    """Train every model on numpy and on a ggml device and compare -> `Report`.

    device: "cpu", "cpu-native", "metal", "vulkan" or another ggml device name. Raises ValueError and
    `toy.BackendUnavailableError` as `toy.recipes.FromScratch(backend="ggml", device=device)` does.
    """
    bars = EXACT if device in ("cpu", "cpu-native") else HALF
    checks = []
    for name, row in ARCHITECTURES.items():
        reference, tested = (_realize("numpy", "cpu", row.small), _realize("ggml", device, row.small))
        expected, found = (_train(recipe, steps) for recipe in (reference, tested))
        worst = max(_relative(found.gradients[key], expected.gradients[key]) for key in expected.gradients)
        difference = float(np.max(np.abs(np.subtract(found.losses, expected.losses))))
        explanation = tested.explain()
        elsewhere = sum(node.device != explanation.device for node in explanation.nodes)
        checks += [
            _check(name, "worst gradient, relative L2 to numpy", worst, bars["gradient"]),
            _check(name, f"loss over {steps} steps, largest difference", difference, bars["loss"]),
            _check(name, "splits of the graph", explanation.splits, 1),
            _check(name, "nodes on another device", elsewhere, 0),
            Check(name, "milliseconds a step", found.seconds * 1e3, None, True),
            Check(name, "numpy, milliseconds a step", expected.seconds * 1e3, None, True),
        ]
        tested.close()
    return Report(device, tuple(_system(device)), tuple(checks), all(check.ok for check in checks))


class _Run(NamedTuple):
    losses: list
    gradients: dict
    seconds: float


def _realize(backend, device, config):
    options = RecipeOptions(t_seq=config.context_length, t_batch=BATCH, seed=0)
    return FromScratch(backend=backend, device=device).realize(config, options, keep_gradients=True)


def _train(recipe, steps):
    inputs, labels = recipe.engine.batch.random(np.random.default_rng(0))
    adamw, losses, times = recipe.adamw(lr=LR), [], []
    gradients: dict[str, np.ndarray] = {}
    for k in range(steps):
        start = time.perf_counter()
        losses.append(recipe.step(inputs, labels=labels, hp=adamw.hp_for_step(k), is_first=k == 0))
        times.append(time.perf_counter() - start)
        gradients = gradients or recipe.gradients()
    return _Run(losses, gradients, statistics.median(times))


def _relative(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _check(model, what, value, bar):
    return Check(model, what, value, bar, bool(value <= bar))


def _system(device):
    yield f"toy {VERSION}, Python {platform.python_version()}, numpy {np.__version__}, ggml {ggml_bridge.version()}"
    yield f"{platform.platform()}, {platform.machine()}, {sys.byteorder}-endian"
    for found in ggml_bridge.devices():
        memory = f"{found.memory_total / 2**30:.1f} GiB"
        yield f"device {found.name} ({found.backend}, {found.kind}): {found.description}, {memory}"
    yield f"tested device: {device}"
