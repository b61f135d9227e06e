"""`toy selftest --device NAME`: does this machine's device train as numpy does, and how fast? A report to paste.

For each model, from random weights, and for each recipe on a file (LoRA on bases of several types, full fine-tuning): the
gradients of the first step against numpy, the loss over a number of steps against numpy, how the graph is spread over
devices, and the time of a step. A device whose matrix products are found to round their operands (Metal and many Vulkan
drivers to half precision, CUDA to TF32) gets the wider bars.
"""

import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

import ggml_bridge
from toy.config import VERSION, LlamaConfig, RecipeOptions
from toy.files.gguf import GGUF
from toy.files.gguf_write import write_gguf
from toy.models import ARCHITECTURES, Llama
from toy.recipes import FromScratch, FullFinetune, LoRA

EXACT = {"gradient": 2e-5, "loss": 1e-3}  # float32 throughout: the CPU
ROUNDED = {"gradient": 2e-2, "loss": 2e-2}  # products of rounded numbers, summed in float32
EXACT_PRODUCT = 1e-5  # relative error of a product: 1e-7 in float32, 1e-4 and more with operands of 10 bits
BATCH, LR = 4, 1e-3

BASE = LlamaConfig(96, d_model=64, n_heads=4, n_kv_heads=2, d_ff=96, n_layers=2, context_length=16)
ON_FILES = {  # case -> recipe, type of the file's matrices
    "finetune f32": (FullFinetune, "f32"),
    "lora f32": (LoRA, "f32"),
    "lora f16": (LoRA, "f16"),
    "lora q8_0": (LoRA, "q8_0"),
    "lora q4_0": (LoRA, "q4_0"),
}
CASES = (*ARCHITECTURES, *ON_FILES)


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


def run(device="cpu", steps=200, cases=CASES):
    """Train every model and recipe on numpy and on a ggml device and compare -> `Report`.

    device: "cpu", "cpu-native", "cuda", "metal", "vulkan" or another ggml device name. cases: some of `CASES`. Raises
    ValueError and `toy.BackendUnavailableError` as `toy.recipes.FromScratch(backend="ggml", device=device)` does.
    """
    error = product_error(device)
    exact = error <= EXACT_PRODUCT
    products = "float32" if exact else "rounded, so the wider bars hold"
    checks = []
    for name in cases:
        checks += compare(name, device, steps, EXACT if exact else ROUNDED)
    system = (*_system(device), f"products: relative error {error:.1e}: {products}")
    return Report(device, system, tuple(checks), all(check.ok for check in checks))


def compare(case, device, steps, bars):
    """Train one of `CASES` on numpy and on a ggml device -> list of `Check`s. bars: `EXACT` or `ROUNDED`."""
    with tempfile.TemporaryDirectory() as folder:
        expected = _train(_realize(case, "numpy", "cpu", folder), steps)
        tested = _realize(case, "ggml", device, folder)
        found = _train(tested, steps)
        worst = max(_relative(found.gradients[key], expected.gradients[key]) for key in expected.gradients)
        difference = float(np.max(np.abs(np.subtract(found.losses, expected.losses))))
        explanation = tested.explain()
        elsewhere = sum(node.device != explanation.device for node in explanation.nodes)
        tested.close()
    return [
        _check(case, "worst gradient, relative L2 to numpy", worst, bars["gradient"]),
        _check(case, f"loss over {steps} steps, largest difference", difference, bars["loss"]),
        _check(case, "splits of the graph", explanation.splits, 1),
        _check(case, "nodes on another device", elsewhere, 0),
        Check(case, "milliseconds a step", found.seconds * 1e3, None, True),
        Check(case, "numpy, milliseconds a step", expected.seconds * 1e3, None, True),
    ]


def product_error(device, rows=64, inner=256):
    """The relative L2 error of a matrix product (rows, inner) by (inner, rows) of random numbers on a device."""
    x, w = np.random.default_rng(0).standard_normal((2, rows, inner)).astype(np.float32)
    expected = x.astype(np.float64) @ w.astype(np.float64).T
    with ggml_bridge.Backend("cpu" if device == "cpu-native" else device, 1) as backend:
        g = backend.graph()
        inputs = [g.input(array.shape) for array in (w, x)]
        y = g.output(g.mul_mat(*inputs))
        g.allocate()
        for tensor, array in zip(inputs, (w, x)):
            tensor.upload(array)
        g.compute()
        return _relative(y.download(), expected)


class _Run(NamedTuple):
    losses: list
    gradients: dict
    seconds: float


def _realize(case, backend, device, folder):
    """The recipe of a case. folder: where the file of its base is, or is put."""
    if case in ARCHITECTURES:
        config = ARCHITECTURES[case].small
        options = RecipeOptions(t_seq=config.context_length, t_batch=BATCH, seed=0)
        return FromScratch(backend=backend, device=device).realize(config, options, keep_gradients=True)
    recipe, kind = ON_FILES[case]
    path = Path(folder, f"{kind}.gguf")
    if not path.exists():
        drawn = Llama(BASE, seed=1, init_scale=4.0).parameters
        write_gguf(path, BASE, {name: drawn[name] for name in drawn}, type=kind)
    gguf = GGUF.open(path)
    options = RecipeOptions(t_seq=BASE.context_length, t_batch=BATCH)
    if recipe is FullFinetune:
        return FullFinetune(backend=backend, device=device).realize(gguf, None, options, keep_gradients=True)
    made = LoRA(backend=backend, device=device)
    made.realize(gguf, None, 4, options, targets=("q", "v", "down"), keep_gradients=True)
    rng = np.random.default_rng(2)  # half of the gradients of fresh adapters would be zeros
    made.load_parameters({name: 0.1 * rng.standard_normal(array.shape) for name, array in made.parameters().items()})
    return made


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
