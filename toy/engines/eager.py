"""The engine of the eager op tables (numpy, cython): it calls the model's forward and backward, then AdamW."""

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from toy.adamw import without_decay
from toy.config import ModelConfig, RecipeOptions
from toy.engines.base import AddUp, Arrays, Engine, Moments, Piece
from toy.engines.weights import Weights
from toy.models.parameters import GradientTree, ParameterTree, check_arrays, round_weights
from toy.op_table import OpTable
from toy.switch import Resolved, kernel_precision, ops_for


class OpCall(NamedTuple):
    """One call of an op. inputs: the shapes of the matrices it was given; shapes: of those it gave back."""

    index: int  # type: ignore[assignment]  # in place of tuple.index
    op: str
    inputs: tuple[tuple[int, ...], ...]
    shapes: tuple[tuple[int, ...], ...]


class OpCalls(NamedTuple):
    """What `explain()` of an eager engine returns; `str()` of it is a table."""

    device: str
    nodes: tuple[OpCall, ...]
    bytes: dict[str, int]

    def __str__(self) -> str:
        rows = [("call", "op", "gives", "from")]
        for call in self.nodes:
            gives, takes = (
                ", ".join("x".join(map(str, shape)) for shape in group) for group in (call.shapes, call.inputs)
            )
            rows.append((str(call.index), call.op, gives, takes))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]) for row in rows]
        sizes = ", ".join(f"{name} {size:,} bytes" for name, size in self.bytes.items())
        return "\n".join([line.rstrip() for line in lines] + [f"{len(self.nodes)} calls on {self.device}", sizes])


class _Recorder:
    """An op table that passes every call on and writes it down."""

    def __init__(self, ops: OpTable) -> None:
        self.ops, self.name = ops, ops.name
        self.calls: list[OpCall] = []

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.ops, name)
        if not callable(function):
            return function

        def call(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            out = result if isinstance(result, (tuple, list)) else (result,)
            shapes = tuple(a.shape for a in out if isinstance(a, np.ndarray))
            given = tuple(a.shape for a in arguments if hasattr(a, "shape"))
            self.calls.append(OpCall(len(self.calls), name, given, shapes))
            return result

        return call


class EagerEngine(Engine):
    """See `Engine`. The trained weights, their gradients and moments are four flat float32 buffers of one layout."""

    def __init__(
        self,
        config: ModelConfig,
        options: RecipeOptions,
        choice: Resolved,
        weights: Weights | None = None,
        keep_gradients: bool = True,
        add_up: AddUp | None = None,
    ) -> None:
        self.ops = ops_for(choice.backend, kernel_precision(options.precision, choice))
        self.n_squares = 1 if self.ops.name == "reference" else 0  # the probabilities
        super().__init__(config, options, choice, weights)
        self.add_up = add_up
        weights = self.weights
        self.masters = ParameterTree.zeros(weights.trained_shapes)  # what AdamW updates
        self.kept = ParameterTree.zeros(weights.kept_shapes)
        for tree in (self.masters, self.kept):
            for name, leaf in tree.items():
                weights.fill(name, leaf)
        self.m = ParameterTree.zeros(self.masters.shapes)
        self.v = ParameterTree.zeros(self.masters.shapes)
        self._runs = _runs(self.masters, self.decayed)
        self._rounded = []  # pairs of (own parameters, the rounded copies that the model computes with)
        own = dict(self.masters.items()) | dict(self.kept.items())
        if options.weight_dtype != "f32":
            own = {}
            for tree in (self.masters, self.kept):
                rounded = ParameterTree.zeros(tree.shapes)
                self._rounded.append((tree, rounded))
                own |= dict(rounded.items())
            self._round_weights()
        everything = self.weights.borrowed | own
        tree = ParameterTree({name: everything[name] for name in weights.shapes})
        self.model = self.model_class.from_config(self.config, ops=self.ops, parameters=tree, **self.model_options)
        self.grads = GradientTree.like(tree, weights.trained)
        self.masks: Arrays = {}
        self._training_model = self.model  # with dropout the model of a step has masks in its tree
        if (dropout := weights.dropout) is not None:
            self.masks = {name: np.zeros((self.batch.n_rows, n), np.float32) for name, n in dropout.widths.items()}
            tree = ParameterTree(dict(tree.items()) | {leaf: self.masks[name] for leaf, name in dropout.masks.items()})
            self._training_model = self.model_class.from_config(
                self.config, ops=self.ops, parameters=tree, **self.model_options
            )

    def parameters(self) -> Arrays:
        """dict of names to float32 copies of the (master) weights; borrowed ones are not among them."""
        copies = self.masters.copies() | self.kept.copies()
        return {name: copies[name] for name in self.weights.own}

    def load_parameters(self, mapping: Mapping[str, npt.ArrayLike]) -> None:
        """Copy weights in. Raises ValueError for wrong names, shapes or numbers; nothing is changed then."""
        check_arrays(self.weights.own, mapping)
        for tree in (self.masters, self.kept):
            for name, leaf in tree.items():
                leaf[...] = mapping[name]
        self._round_weights()

    def gradients(self) -> Arrays:
        """dict of names to copies of the last step's gradients, before clipping."""
        return self.grads.copies()

    def optimizer_state(self) -> dict[str, Arrays]:
        """{"m": {name: array}, "v": {name: array}}: copies of the AdamW moments."""
        return {"m": self.m.copies(), "v": self.v.copies()}

    def load_optimizer_state(self, state: Moments) -> None:
        """Copy moments in, all or nothing; errors as `load_parameters`."""
        self._check_moments(state)
        self.m.load(state["m"])
        self.v.load(state["v"])

    def explain(self) -> OpCalls:
        """What a training step calls, op by op in order, with shapes and the bytes of the weights -> `OpCalls`; str() is a
        table.

        Forward and backward are run once for it, on zeros and into gradients of their own.
        """
        recorder = _Recorder(self.ops)
        model = self.model_class.from_config(
            self.config, ops=recorder, parameters=self._training_model.parameters, **self.model_options
        )
        inputs = {
            role: np.zeros(needed.shape, np.float32 if needed.limit is None else np.int64)
            for role, needed in self.batch.inputs.items()
        }
        grads = GradientTree.like(self.model.parameters, self.weights.trained)
        model.loss(inputs, np.zeros(self.batch.n_rows, np.int64), self.options.t_batch, grads)
        sizes = {
            "weights": sum(leaf.nbytes for leaf in self.model.parameters.values()),
            "gradients and moments": 3 * self.masters.flat.nbytes,
        }
        return OpCalls(f"{self.backend} ({self.ops.name})", tuple(recorder.calls), sizes)

    def _train(self, pieces: Sequence[Piece], counted: int, hp: np.ndarray, is_first: bool) -> float:
        grads = self.grads
        grads.fill_zero()
        if is_first:
            self.m.flat.fill(0)
            self.v.flat.fill(0)
        loss = 0.0
        for i, piece in enumerate(pieces):
            # a pass adds the gradient of the mean over its own rows: what is there is brought to its measure before
            if i > 0 and pieces[i - 1].counted != piece.counted:
                grads.flat *= np.float32(pieces[i - 1].counted / piece.counted)
            if (dropout := self.weights.dropout) is not None:
                for name, mask in self.masks.items():
                    mask[...] = dropout.draw(name, len(mask), piece.moment)
            part = self._training_model.loss(piece.inputs, piece.labels, self.options.t_batch, grads)
            loss += part * (piece.counted / counted)
        if pieces and pieces[-1].counted != counted:
            grads.flat *= np.float32(pieces[-1].counted / counted)
        if self.add_up is not None:
            loss = self.add_up(grads.flat, loss)
        self.grad_norm = math.sqrt(self.ops.sum_of_squares(grads.flat))
        clip = self.options.grad_clip
        self._update(hp, clip / self.grad_norm if clip is not None and self.grad_norm > clip else None)
        self._round_weights()
        return loss

    def _update(self, hp: np.ndarray, factor: float | None) -> None:
        """AdamW on the flat buffers: in one piece, or in runs of what is decayed and what is not. factor: of the gradient."""
        plain = without_decay(hp)
        whole = [(slice(None), True)]
        for part, decayed in self._runs if hp[0, 4] else whole:
            weights, gradients = self.masters.flat[part], self.grads.flat[part]
            row = hp if decayed else plain
            self.ops.adamw_step(weights, gradients, self.m.flat[part], self.v.flat[part], row, factor)

    def _evaluate(self, inputs: Arrays, labels: np.ndarray) -> float:
        return self.model.loss(inputs, labels, self.options.t_batch)

    def _logits(self, inputs: Arrays) -> np.ndarray:
        return self.model.forward_rows(**inputs, batch=self.options.t_batch)[0]

    def _round_weights(self) -> None:
        for tree, rounded in self._rounded:
            rounded.flat[:] = round_weights(tree.flat, self.options.weight_dtype)


def _runs(tree: ParameterTree, decayed: Set[str]) -> list[tuple[slice, bool]]:
    """The stretches of a tree's flat buffer with whether they are decayed; neighbours alike are one stretch."""
    begins = [(leaf.ctypes.data - tree.flat.ctypes.data) // tree.flat.itemsize for leaf in tree.values()]
    runs: list[tuple[slice, bool]] = []
    for name, begin, end in zip(tree, begins, [*begins[1:], len(tree.flat)]):
        decays = name in decayed
        if runs and runs[-1][1] == decays:
            begin = runs.pop()[0].start
        runs.append((slice(begin, end), decays))
    return runs
