"""What every engine promises (`Engine`), and the checks that run before anything is changed."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from toy.adamw import AdamW, check_row
from toy.config import ModelConfig, RecipeOptions
from toy.engines.memory import check_fits, free_memory, kept_numbers
from toy.engines.weights import Weights, random_weights
from toy.models import model_for
from toy.models.base import Model
from toy.models.inputs import n_counted
from toy.models.parameters import ParameterTree, check_arrays
from toy.quantized import dequantized
from toy.switch import Resolved, eager_ops, kernel_precision

if TYPE_CHECKING:
    from typing_extensions import Self


_SHARE_OF_MEMORY = 0.8  # of what is free, that an estimate may fill

Config = TypeVar("Config", bound=ModelConfig)
Arrays = dict[str, np.ndarray]  # by the names of parameters, or by role
Moments = Mapping[str, Mapping[str, npt.ArrayLike]]  # {"m": {name: array}, "v": {name: array}}


def with_model_options(config: Config, options: RecipeOptions) -> Config:
    """The config with those of the options that belong to the model (`untied`, `qkv_bias`) taken over.

    Raises ValueError for one that the model does not have.
    """
    for name in ("untied", "qkv_bias"):
        if getattr(options, name):
            if not hasattr(config, name):
                raise ValueError(f"{type(config).__name__} has no option {name!r}: leave it False")
            taken_over: dict[str, Any] = {name: True}
            config = dataclasses.replace(config, **taken_over)
    return config


class Piece(NamedTuple):
    """The part of a step's batch that one forward and backward pass takes.

    inputs, labels: checked arrays. counted: the number of its rows that count. moment: the step, counted from 1, and the
    first of the piece's rows in the batch of that step, of which dropout is drawn.
    """

    inputs: Arrays
    labels: np.ndarray
    counted: int
    moment: tuple[int, int] = (0, 0)


# what each of several processes found, made what all of them found: a flat float32 gradient, in place, and a loss -> the loss
AddUp = Callable[[np.ndarray, float], float]


class Engine:
    """A model realized for training: its weights, moments and one training step of a fixed shape.

    A step knows inputs by role, labels and the hyper-parameter row; what the roles are, and what a batch of them must be, is
    said by the model (`batch`, a `toy.models.inputs.Batch`). Subclasses run it (`_train`, `_evaluate`, `_logits`) on an op
    table; this class has checked what goes in.
    """

    _train: Callable[[Sequence[Piece], int, np.ndarray, bool], float]  # pieces, counted rows of the step, hp, is_first
    _evaluate: Callable[[Arrays, np.ndarray], float]
    _logits: Callable[[Arrays], np.ndarray]
    parameters: Callable[[], Arrays]
    load_parameters: Callable[[Mapping[str, npt.ArrayLike]], None]
    gradients: Callable[[], Arrays]
    optimizer_state: Callable[[], dict[str, Arrays]]
    load_optimizer_state: Callable[[Moments], None]
    explain: Callable[[], Any]  # a list of what a step runs, which `str()` makes a table of

    def __init__(
        self, config: ModelConfig, options: RecipeOptions, choice: Resolved, weights: Weights | None = None
    ) -> None:
        """weights: a `Weights` (None: random, all of them trained)."""
        config = with_model_options(config, options)
        self.config, self.options = config, options
        self.backend, self.device, self.backend_reason = choice
        self.precision = kernel_precision(options.precision, choice)
        self.weights = weights = weights or random_weights(config, options)
        self.model_class = model_for(config)
        self.batch = self.model_class.batch_type(
            config, options.t_batch, options.t_seq
        )  # of a forward and backward pass
        self.step_batch = self.model_class.batch_type(config, options.accumulate * options.t_batch, options.t_seq)
        self.arch = self.model_class.arch
        self.hp_mode = self.model_class.hp_mode if weights.hp_mode is None else weights.hp_mode
        self._check_fits()
        self.recompute, self.recompute_reason = self._choose_recompute()
        # further arguments of the model
        self.model_options = {**weights.model_options, "recompute": self.recompute}
        self.grad_norm = float("nan")  # L2 norm of the last step's whole gradient, before clipping

    def _check_fits(self) -> None:
        """Raise MemoryError when the machine has too little memory for a pass, whatever else is there."""
        if self.device.startswith("cpu"):
            # float32: a weight that is trained has a gradient and two moments; of each block the input is kept
            n_bytes = 4 * (4 * self.n_trained + self.n_rows * self.config.n_layers * self.config.d_model)
            check_fits(n_bytes, f"training {self.n_trained:,} parameters on {self.n_rows:,} rows")

    @property
    def n_rows(self) -> int:
        """Rows of the activations of a forward and backward pass: tokens, those of images too."""
        return self.options.t_batch * self.options.t_seq

    def _choose_recompute(self) -> tuple[int, str]:
        """-> how many blocks are computed again, and why so many."""
        asked, most = self.options.recompute, self.config.n_layers - 1  # the last one is used at once
        if asked is not None:
            return most if asked is True else min(int(asked), most), "as asked for"
        needed, there = self._bytes_of_a_step(), self._free_memory()
        if there is None or needed <= (fits := _SHARE_OF_MEMORY * there):
            return 0, "there is memory enough"
        saved = 4 * (self._kept_of_a_block() - self.n_rows * self.config.d_model)
        why = f"all activations would take it to {needed / 2**30:,.1f} GiB, and {there / 2**30:,.1f} GiB are free"
        return min(math.ceil((needed - fits) / saved), most), why

    def _bytes_of_a_step(self) -> int:
        """About what weights, moments and the activations of all blocks take, and what adapters add to that."""
        weights, adapted = self.weights, 0
        if weights.dropout is not None:
            adapted += self.n_rows * sum(weights.dropout.widths.values())  # the masks
        if "output.lora_a" in weights.own:
            adapted += 2 * self.batch.n_rows * self.batch.n_classes  # the logits are whole then, and their gradient
        return 4 * (self.n_own + 3 * self.n_trained + self.config.n_layers * self._kept_of_a_block() + adapted)

    def _kept_of_a_block(self) -> int:
        """About how many numbers a block keeps for its backward."""
        c, o = self.config, self.options
        return self.n_rows * kept_numbers(c, self.keeps_all) + self.n_squares * c.n_heads * o.t_batch * o.t_seq**2

    def _free_memory(self) -> int | None:
        """Bytes that the device has left; None: unknown."""
        return free_memory()

    # what is kept for the backward: results that are cheap to compute again? how many matrices (T, T) of attention a head?
    keeps_all: bool = True
    n_squares: int = 0

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free what the engine holds outside of Python's memory. Nothing can be called after it."""

    @property
    def decayed(self) -> frozenset[str]:
        """The names of the trained parameters that weight decay acts on; the model says which (`Model.decays`)."""
        shapes = self.weights.trained_shapes
        return frozenset(name for name, shape in shapes.items() if self.model_class.decays(name, shape))

    @property
    def n_parameters(self) -> int:
        """Parameters of the whole model, frozen ones too."""
        return sum(math.prod(shape) for shape in self.weights.shapes.values())

    @property
    def n_own(self) -> int:
        """Parameters that the engine holds itself, in float32: all but those of a frozen base."""
        return sum(math.prod(shape) for shape in self.weights.own.values())

    @property
    def n_trained(self) -> int:
        """Parameters that are trained."""
        return sum(math.prod(shape) for shape in self.weights.trained_shapes.values())

    def adamw(self, lr: float = 0.001, **fields: float) -> AdamW:
        """An `AdamW` in the convention this model reads (see `hp_mode`). fields: beta1, beta2, eps, weight_decay."""
        make = AdamW.bias_corrected if self.hp_mode == AdamW.MODE_LORA else AdamW.constant_slots
        return make(lr=lr, **fields)

    def step(
        self, inputs: Mapping[str, npt.ArrayLike], labels: npt.ArrayLike, hp: npt.ArrayLike, is_first: bool = False
    ) -> float:
        """ONE training step: forward, mean cross-entropy, backward, clip, AdamW -> the loss before the update, a float.

        inputs: dict of role to array, see `step_batch.roles`. labels: int in the shape `step_batch.label_shape`, -1 = not
        counted, or float rows (N, n_classes). hp: the (1, 7) row of `AdamW.hp_for_step`. is_first: also zero the AdamW
        moments (gradients always start at zero). With `accumulate` in the options, the batch is that many of `batch`, one
        after the other.
        Raises ValueError for a wrong shape, dtype, id, label, position or row; nothing is changed then.
        """
        arrays, labels = self.step_batch.check(**inputs), self.step_batch.check_labels(labels)
        row = check_row(hp, self.hp_mode)
        step = getattr(hp, "step", None) or 0
        if self.weights.dropout is not None and not step:
            raise ValueError(
                "with dropout hp must be a row of adamw.hp_for_step(k): it knows the step that is drawn for"
            )
        if not isinstance(is_first, (bool, np.bool_)):
            raise ValueError(f"is_first must be True or False, got {is_first!r}")
        pieces = self._pieces(arrays, labels, step)
        return self._train(pieces, sum(piece.counted for piece in pieces), row, bool(is_first))

    def _pieces(self, inputs: Arrays, labels: np.ndarray, step: int) -> list[Piece]:
        """The batch of a step, cut for `accumulate` passes; a pass in which no label counts is left out."""
        n = self.options.accumulate
        if n == 1:
            return [Piece(inputs, labels, n_counted(labels), (step, 0))]
        parts = {role: np.split(array, n) for role, array in inputs.items()}
        pieces = []
        for i, part in enumerate(np.split(labels, n)):
            if counted := n_counted(part):
                of_piece = {role: arrays[i] for role, arrays in parts.items()}
                pieces.append(Piece(of_piece, part, counted, (step, i * self.batch.n_rows)))
        return pieces

    def evaluate(self, inputs: Mapping[str, npt.ArrayLike], labels: npt.ArrayLike) -> float:
        """The mean cross-entropy of a batch without any update (arguments and errors as `step`)."""
        return self._evaluate(self.batch.check(**inputs), self.batch.check_labels(labels))

    def logits(self, inputs: Mapping[str, npt.ArrayLike]) -> np.ndarray:
        """inputs: as for `step` -> float32 logits, the shape of the labels and the classes: (t_batch, t_seq, vocab_size)."""
        logits = self._logits(self.batch.check(**inputs))
        return np.array(logits, np.float32).reshape(*self.batch.label_shape, -1)

    def model_copy(self) -> Model:
        """A model object on an eager op table with a copy of the present weights (borrowed ones are not copied): for
        generation and inspection."""
        ops, leaves = eager_ops(self.backend), dict(self.weights.borrowed)
        if ops.name == "reference":  # numpy would dequantise a matrix anew for every token
            leaves = {name: dequantized(leaf) for name, leaf in leaves.items()}
        tree = ParameterTree(leaves | self.parameters())
        return self.model_class.from_config(self.config, ops=ops, parameters=tree, **self.weights.model_options)

    def _check_moments(self, state: Moments) -> None:
        if not (isinstance(state, Mapping) and state.keys() == {"m", "v"}):
            raise ValueError('the optimizer state must be {"m": {name: array}, "v": {name: array}}')
        for slot in "mv":
            check_arrays(self.weights.trained_shapes, state[slot], f"optimizer state {slot}")
        for name, array in state["v"].items():
            if (np.asarray(array) < 0).any():
                raise ValueError(f"optimizer state v: {name} holds negative numbers, and AdamW takes their roots")
