"""What a realized model is made of: parameters of its own, trained or kept, and parameters borrowed from a file."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from toy.config import ModelConfig, RecipeOptions
from toy.models import model_for
from toy.models.parameters import Shapes, initialize_array
from toy.quantized import Leaf

if TYPE_CHECKING:
    from ggml_bridge import Backend, Tensor

Fill = Callable[[str, np.ndarray], None]  # fill(name, out) writes the values of a parameter into `out`


class Dropout(NamedTuple):
    """What is hidden from adapters while they are trained, anew in every pass: a share of the numbers that they read.

    masks: dict of the names that the masks have in the parameter tree to those of the masks. widths: the columns of each
    mask. A mask follows from the seed, the step, the pass and its name alone, so every backend draws the same one, and a run
    that goes on the one that it would have drawn.
    """

    masks: dict[str, str]
    widths: dict[str, int]
    share: float
    seed: int

    def draw(self, name: str, rows: int, moment: tuple[int, int]) -> np.ndarray:
        """A mask (rows, width), float32: 0 for what is hidden, 1/(1-share) for the rest.

        moment: the step, and the first of these rows in its batch. The masks of its passes are the rows of the mask that a
        step in one pass has.
        """
        (step, first), width = moment, self.widths[name]
        words = -(-width // 4)  # of 64 bits, for a row: 16 a number
        generator = np.random.PCG64(np.random.SeedSequence([self.seed, step, zlib.crc32(name.encode())]))
        generator.advance(first * words)
        drawn = generator.random_raw(rows * words).view(np.uint16).reshape(rows, -1)[:, :width]
        return (drawn >= round(self.share * 2**16)) * np.float32(1 / (1 - self.share))


@dataclass(frozen=True)
class Weights:
    """The parameters of a model, by who owns them and whether they are trained.

    own: dict of names to shapes, the float32 parameters that the engine holds itself. fill: fill(name, out) writes the
    starting values of one of them into the float32 array `out`. trained: the names among them that have a gradient and
    AdamW moments (None: all); the others keep their values. borrowed: dict of names to leaves that stay where they are
    and are never trained: float32 arrays, or `toy.quantized.QuantizedMatrix`. model_options: further arguments of the
    model, such as lora_scale. hp_mode: the AdamW convention (None: the model's). dropout: of adapters, None = none.
    """

    own: Shapes
    fill: Fill
    trained: frozenset[str] = None  # type: ignore[assignment]  # None: all of them, filled in below
    borrowed: dict[str, Leaf] = field(default_factory=dict)
    model_options: dict[str, Any] = field(default_factory=dict)
    hp_mode: int | None = None
    dropout: Dropout | None = None

    def __post_init__(self) -> None:
        trained = frozenset(self.own if self.trained is None else self.trained)
        object.__setattr__(self, "trained", trained)
        if not trained:
            raise ValueError("nothing is left to train: every parameter is frozen")
        if unknown := sorted(trained - self.own.keys()):
            raise ValueError(f"{unknown[0]} cannot be trained: it is not among the model's own parameters")

    @property
    def shapes(self) -> Shapes:
        """dict of all names to shapes, borrowed parameters first."""
        return {name: leaf.shape for name, leaf in self.borrowed.items()} | self.own

    @property
    def trained_shapes(self) -> Shapes:
        return {name: shape for name, shape in self.own.items() if name in self.trained}

    @property
    def kept_shapes(self) -> Shapes:
        """Those of the engine's own parameters that are not trained."""
        return {name: shape for name, shape in self.own.items() if name not in self.trained}


def filled(shapes: Shapes, fill: Fill) -> dict[str, np.ndarray]:
    """dict of the names of `shapes` to new float32 arrays with the values that fill(name, out) writes."""
    arrays = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
    for name, array in arrays.items():
        fill(name, array)
    return arrays


def random_weights(config: ModelConfig, options: RecipeOptions) -> Weights:
    """Every parameter random, drawn from the options' seed, and trained."""
    return Weights(own=model_for(config).parameter_shapes(config), fill=random_fill(config, options))


def random_fill(config: ModelConfig, options: RecipeOptions) -> Fill:
    """The `fill` of a model with random weights (see `Weights`)."""
    stds = model_for(config).parameter_stds(config)

    def fill(name: str, out: np.ndarray) -> None:
        initialize_array(name, out, stds[name], options.seed, options.init_scale)

    return fill


_MAPPED_ALIGNMENT = 32  # bytes, what ggml asks of memory it did not make


def borrow(bridge: "Backend", leaf: Leaf, name: str) -> "Tensor":
    """A parameter as a read-only tensor: in place where the device reads the host's memory, otherwise a copy as it is."""
    data, dtype = (leaf, "f32") if isinstance(leaf, np.ndarray) else (leaf.raw, leaf.type.lower())
    if data.ctypes.data % _MAPPED_ALIGNMENT:
        memory = np.empty(data.nbytes + _MAPPED_ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % _MAPPED_ALIGNMENT
        aligned = memory[start : start + data.nbytes]
        aligned[:] = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        data = aligned
    return bridge.mapped(data, leaf.shape, dtype, name=name)
