"""The engine of the ggml graphs: the model's forward and backward are recorded once; a step is one compute."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from toy.adamw import without_decay
from toy.config import ModelConfig, RecipeOptions
from toy.engines.base import AddUp, Arrays, Engine, Moments, Piece
from toy.engines.weights import Weights, borrow
from toy.models.parameters import GradientTree, ParameterTree, check_arrays, round_weights
from toy.ops.graph import CpuGraphOps, NativeGraphOps, Slot
from toy.switch import Resolved, num_threads

if TYPE_CHECKING:
    from ggml_bridge import Explanation, Tensor

NATIVE_ON_CPU = "cpu-native"  # the device name for ggml's own operations on the CPU

# ggml's threads meet after every node, spinning; below this many operations in a step one thread is faster than two
WORTH_TWO_THREADS = 3e7

LARGE_VALUE = 2**16  # bytes: a look at more of them (dense labels, masks) is no cheaper than the upload


class GraphEngine(Engine):
    """See `Engine`. Weights and moments live in the device's memory; graphs over them are recorded when first needed: the
    training step for integer labels when the engine is made, dense labels, evaluation and logits later.

    keep_gradients: keep every gradient until the end of the step, for `gradients()`. Without it (and without clipping) each
    weight is updated as soon as its gradient is complete, and the gradients share memory.
    """

    def __init__(
        self,
        config: ModelConfig,
        options: RecipeOptions,
        choice: Resolved,
        weights: Weights | None = None,
        keep_gradients: bool = False,
        add_up: AddUp | None = None,
    ) -> None:
        import ggml_bridge

        native = choice.device != "cpu"
        self.ops_class = NativeGraphOps if native else CpuGraphOps
        self.keeps_all, self.n_squares = native, 2 if native else 0  # scores and probabilities
        super().__init__(config, options, choice, weights)
        self.new_ops = NativeGraphOps if native else partial(CpuGraphOps, precision=self.precision)
        self.keep_gradients, self.add_up = keep_gradients, add_up
        operations = 6 * self.n_parameters * options.t_batch * options.t_seq
        # None: TOY_NUM_THREADS, or the processors there are
        threads = 1 if operations < WORTH_TWO_THREADS else num_threads()
        device = "cpu" if self.device == NATIVE_ON_CPU else self.device
        self.bridge = ggml_bridge.Backend(device, threads, self.ops_class.runner())
        tensor, own, trained = self.bridge.persistent, self.weights.own, self.weights.trained_shapes
        self.masters = {name: tensor(shape, name=name) for name, shape in own.items()}
        self.m = {name: tensor(shape, name=f"{name} m") for name, shape in trained.items()}
        self.v = {name: tensor(shape, name=f"{name} v") for name, shape in trained.items()}
        self.sums = {}  # gradients that are added up over several passes, or processes
        if options.accumulate > 1 or add_up is not None:
            self.sums = {name: tensor(shape, name=f"{name} gradient") for name, shape in trained.items()}
        self.computed = self.masters  # what the model computes with
        if options.weight_dtype != "f32":
            self.computed = {name: tensor(shape, name=f"{name} {options.weight_dtype}") for name, shape in own.items()}
        self.bridge.allocate()
        borrowed = {name: borrow(self.bridge, leaf, name) for name, leaf in self.weights.borrowed.items()}
        self.tensors = borrowed | self.computed  # every parameter of the model
        self._graphs: dict[Any, Any] = {}  # training graphs by the kind of labels, others by ("forward", kind)
        self._training("integers")
        for name, shape in own.items():  # one at a time: no second copy of the whole model
            array = np.empty(shape, np.float32)
            self.weights.fill(name, array)
            self._upload(name, array)

    def _free_memory(self) -> int | None:
        if self.device.startswith("cpu"):
            return super()._free_memory()
        import ggml_bridge

        return ggml_bridge.find_device(self.device).memory_free or None

    def explain(self, kind: str = "integers") -> "Explanation":
        """The nodes of the training graph with their devices, the number of splits, and the bytes; str() is a table.

        kind: "integers" or "dense", the labels of the graph.
        """
        return self._training(kind).graph.explain()

    def close(self) -> None:
        """Free the device's memory. Nothing can be called after it."""
        self.bridge.close()

    def parameters(self) -> Arrays:
        """dict of names to float32 copies of the (master) weights; borrowed ones are not among them."""
        return _download(self.masters)

    def load_parameters(self, mapping: Mapping[str, npt.ArrayLike]) -> None:
        """Copy weights in. Raises ValueError for wrong names, shapes or numbers; nothing is changed then."""
        check_arrays(self.weights.own, mapping)
        for name in self.masters:
            self._upload(name, np.asarray(mapping[name], np.float32))

    def gradients(self) -> Arrays:
        """dict of names to copies of the last step's gradients, before clipping. Needs keep_gradients=True at realize."""
        if not self.keep_gradients:
            raise RuntimeError("the gradients are not kept: realize with keep_gradients=True")
        recorded = self._graphs.get("update" if self.sums else self._last_kind)
        if recorded is None or not recorded.computed:
            return {name: np.zeros(shape, np.float32) for name, shape in self.weights.trained_shapes.items()}
        return _download(recorded.gradients)

    def optimizer_state(self) -> dict[str, Arrays]:
        """{"m": {name: array}, "v": {name: array}}: copies of the AdamW moments."""
        return {"m": _download(self.m), "v": _download(self.v)}

    def load_optimizer_state(self, state: Moments) -> None:
        """Copy moments in, all or nothing; errors as `load_parameters`."""
        self._check_moments(state)
        for slot in "mv":
            for name, tensor in getattr(self, slot).items():
                tensor.upload(np.asarray(state[slot][name], np.float32))

    # -- the hooks of Engine ------------------------------------------------------------------------------------------

    def _train(self, pieces: Sequence[Piece], counted: int, hp: np.ndarray, is_first: bool) -> float:
        if is_first:
            for moments in (self.m, self.v):
                for tensor in moments.values():
                    tensor.zero()
        recorded = self._training("dense" if pieces and pieces[0].labels.ndim > 1 else "integers")
        self._last_kind = recorded.kind
        if isinstance(recorded, _TrainingGraph):
            recorded.run(**pieces[0].inputs, labels=pieces[0].labels, hp=hp, moment=pieces[0].moment)
            self.grad_norm = float(recorded.norm.download()[0])
            return recorded.loss()
        for tensor in self.sums.values():
            tensor.zero()
        loss, before = 0.0, 0
        for piece in pieces:
            # a pass adds the gradient of the mean over its own rows: what is there is brought to its measure
            factor = np.array([0, before / piece.counted], np.float32)
            recorded.run(**piece.inputs, labels=piece.labels, factor=factor, moment=piece.moment)
            loss += recorded.loss() * (piece.counted / counted)
            before = piece.counted
        if self.add_up is not None:
            loss = self._add_up_sums(before / counted, loss)
            before = counted
        update = self._update()
        update.run(hp=hp, factor=np.array([0, before / counted], np.float32))
        self.grad_norm = float(update.norm.download()[0])
        return loss

    def _add_up_sums(self, factor: float, loss: float) -> float:
        """`sums` become those of all processes; factor: what brings this one's to the measure of the whole step."""
        if self._flat is None:
            self._flat = np.empty(self.n_trained, np.float32)
        flat, places, begin = self._flat, [], 0
        for tensor in self.sums.values():
            places.append(slice(begin, begin := begin + math.prod(tensor.shape)))
            np.multiply(tensor.download().reshape(-1), np.float32(factor), out=flat[places[-1]])
        loss = cast(AddUp, self.add_up)(flat, loss)
        for tensor, place in zip(self.sums.values(), places):
            tensor.upload(flat[place].reshape(tensor.shape))
        return loss

    def _evaluate(self, inputs: Arrays, labels: np.ndarray) -> float:
        recorded = self._forward("integers" if labels.ndim == 1 else "dense")
        recorded.run(**inputs, labels=labels)
        return recorded.loss()

    def _logits(self, inputs: Arrays) -> np.ndarray:
        recorded = self._forward(None)
        recorded.run(**inputs)
        return recorded.logits.download()

    # -- recording ----------------------------------------------------------------------------------------------------

    _last_kind = "integers"
    _flat: np.ndarray | None = None  # the gradients on their way between processes

    def _training(self, kind: str) -> "_TrainingGraph | _SumGraph":
        if kind not in self._graphs:
            self._graphs[kind] = _SumGraph(self, kind) if self.sums else _TrainingGraph(self, kind)
        return self._graphs[kind]

    def _update(self) -> "_UpdateGraph":
        if "update" not in self._graphs:
            self._graphs["update"] = _UpdateGraph(self)
        return self._graphs["update"]

    def _forward(self, kind: str | None) -> "_ForwardGraph":
        key = ("forward", kind)
        if key not in self._graphs:
            self._graphs[key] = _ForwardGraph(self, kind)
        return self._graphs[key]

    def _upload(self, name: str, array: np.ndarray) -> None:
        self.masters[name].upload(array)
        if self.computed is not self.masters:
            self.computed[name].upload(round_weights(array, self.options.weight_dtype))


class _Graph:
    """A graph, the tensors to fill before each run, and what comes out."""

    def __init__(self, engine, slots=None, finished=None):
        self.engine, self.computed = engine, False
        self.graph = engine.bridge.graph()
        self.ops = engine.new_ops(self.graph, slots, finished)

    def allocate(self):
        self.graph.allocate()
        for tensor, value in self.ops.feeds:
            if not callable(value):
                tensor.upload(value)
        self.feeds = [(tensor, function) for tensor, function in self.ops.feeds if callable(function)]
        self.ops.feeds = self.feeds  # constants are in the device's memory now
        self.held = {}  # by tensor: the bytes of the few numbers that it holds

    def run(self, **arrays):
        for tensor, function in self.feeds:
            self._fill(tensor, function(arrays))
        self.ops.compute()
        self.computed = True

    def _fill(self, tensor, value):
        """Upload a value, unless it is small and the tensor holds it already: positions and rows of AdamW hardly change."""
        if value.nbytes > LARGE_VALUE:
            tensor.upload(value)
        elif (given := value.tobytes()) != self.held.get(tensor):
            tensor.upload(value)
            self.held[tensor] = given


class _ModelGraph(_Graph):
    """A graph with a model in it: its inputs and labels. kind: of the labels, "integers" or "dense"; None: there are none."""

    loss_tensor: "Tensor"  # of a graph with labels

    def __init__(self, engine, kind, slots=None, finished=None):
        super().__init__(engine, slots, finished)
        self.kind, ops, batch = kind, self.ops, engine.batch
        self.inputs = {role: self._input(role, needed) for role, needed in batch.inputs.items()}
        if kind == "integers":
            self.labels = ops.integers("labels", batch.n_rows, batch.n_classes)
        elif kind == "dense":
            self.labels = ops.feed((batch.n_rows, batch.n_classes), "f32", lambda arrays: arrays["labels"])
        tree = ParameterTree(engine.tensors | self._masks())
        self.model = engine.model_class.from_config(engine.config, ops=ops, parameters=tree, **engine.model_options)

    def _masks(self):
        """What the model of this graph has beside its parameters, by name."""
        return {}

    def _input(self, role, needed):
        if needed.limit is not None:
            return self.ops.integers(role, *needed.shape, needed.limit)
        return self.ops.feed(needed.shape, "f32", lambda arrays: arrays[role])

    def loss(self) -> float:
        return self.ops.loss_value(self.loss_tensor)


class _ForwardGraph(_ModelGraph):
    """The mean loss, or the logits when there are no labels."""

    def __init__(self, engine, kind):
        super().__init__(engine, kind)
        if kind is not None:
            self.loss_tensor = self.graph.output(self.model.loss(self.inputs, self.labels, engine.options.t_batch))
        else:
            logits, _ = self.model.forward_rows(**self.inputs, batch=engine.options.t_batch)
            self.logits = self.graph.output(logits)
        self.allocate()


class _GradientGraph(_ModelGraph):
    """Forward, loss, backward. Subclasses say what becomes of a gradient that is complete (`_finished`)."""

    def __init__(self, engine, kind):
        self.slots = {name: Slot(name, engine.computed[name]) for name in engine.weights.trained_shapes}
        super().__init__(engine, kind, {id(slot.parameter): slot for slot in self.slots.values()}, self._finished)
        self._before()
        grads = GradientTree({name: self.slots.get(name) for name in engine.tensors})
        self.loss_tensor = self.graph.output(self.model.loss(self.inputs, self.labels, engine.options.t_batch, grads))
        self._after()
        self.allocate()

    def _masks(self):
        dropout, rows = self.engine.weights.dropout, self.engine.batch.n_rows
        if dropout is None:
            return {}

        def feed(name, width):
            return self.ops.feed((rows, width), "f32", lambda arrays: dropout.draw(name, rows, arrays["moment"]))

        drawn = {name: feed(name, width) for name, width in dropout.widths.items()}
        return {leaf: drawn[name] for leaf, name in dropout.masks.items()}

    def _before(self):
        raise NotImplementedError

    def _finished(self, slot):
        raise NotImplementedError

    def _after(self):
        pass


class _Updates(_Graph):
    """The end of a step: the norm of the whole gradient, clipping, AdamW."""

    def feed_row(self):
        """The inputs with the hyper-parameter row: one for what is decayed, and one, where there is more, for the rest."""
        row = partial(self.ops.feed, (1, 7), "f32")
        self.hp = self.plain_hp = row(lambda arrays: arrays["hp"])
        if self.engine.decayed != self.engine.weights.trained:
            self.plain_hp = row(lambda arrays: without_decay(arrays["hp"]))

    def update_all(self, slots, squares):
        """Updates of every parameter, from the gradients in `slots`."""
        engine, clip = self.engine, self.engine.options.grad_clip
        self.norm = self.graph.output(self.ops.norm_and_factor(squares, clip))
        for slot in slots.values():
            if engine.keep_gradients:
                self.graph.output(slot.tensor)
            self.update(slot, None if clip is None else self.norm)
        self.gradients = {name: slot.tensor for name, slot in slots.items()}

    def update(self, slot, factor=None):
        engine, name = self.engine, slot.name
        hp = self.hp if name in engine.decayed else self.plain_hp
        self.ops.adamw_step(engine.masters[name], slot.tensor, engine.m[name], engine.v[name], hp, factor)
        if engine.computed is not engine.masters:
            rounded = self.graph.cast(engine.masters[name], engine.options.weight_dtype)
            self.graph.cpy(self.graph.cast(rounded, "f32"), engine.computed[name])


class _TrainingGraph(_GradientGraph, _Updates):
    """A whole step: forward, loss, backward, clipping, AdamW."""

    def _before(self):
        self.later = self.engine.keep_gradients or self.engine.options.grad_clip is not None  # every update at the end
        self.squares: list[Tensor] = []
        self.feed_row()

    def _finished(self, slot):
        slot.tensor = self.ops.finish_gradient(slot.tensor)
        self.squares.append(self.ops.squares(slot))
        if not self.later:
            self.update(slot)

    def _after(self):
        if self.later:
            self.update_all(self.slots, self.squares)
        else:
            self.norm = self.graph.output(self.ops.norm_and_factor(self.squares, None))


class _SumGraph(_GradientGraph):
    """One of several passes of a step: forward, loss, backward; sums = sums * factor[1] + gradients."""

    def _before(self):
        self.factor = self.ops.feed((2,), "f32", lambda arrays: arrays["factor"])

    def _finished(self, slot):
        total = self.engine.sums[slot.name]
        slot.tensor = self.ops.finish_gradient(slot.tensor)
        self.graph.cpy(self.graph.add(self.ops.scaled(total, self.factor), slot.tensor), total)


class _UpdateGraph(_Updates):
    """The end of a step of several passes: the gradient is sums * factor[1]."""

    def __init__(self, engine):
        slots = {name: Slot(name, engine.computed[name]) for name in engine.weights.trained_shapes}
        super().__init__(engine, {id(slot.parameter): slot for slot in slots.values()})
        factor = self.ops.feed((2,), "f32", lambda arrays: arrays["factor"])
        self.feed_row()
        for slot in slots.values():
            slot.tensor = self.ops.scaled(engine.sums[slot.name], factor)
        self.update_all(slots, [self.ops.squares(slot) for slot in slots.values()])
        self.allocate()


def _download(tensors: "Mapping[str, Tensor]") -> Arrays:
    return {name: tensor.download() for name, tensor in tensors.items()}
