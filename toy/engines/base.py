"""What every engine promises (`Engine`), and the checks that run before anything is changed."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from toy.adamw import AdamW, check_row
from toy.engines.weights import random_weights
from toy.models import model_for
from toy.models.base import check_range
from toy.models.parameters import ParameterTree, check_arrays
from toy.quantized import dequantized
from toy.switch import eager_ops


def with_model_options(config, options):
    """The config with those of the options that belong to the model (`untied`, `qkv_bias`) taken over.

    Raises ValueError for one that the model does not have.
    """
    for name in ("untied", "qkv_bias"):
        if getattr(options, name):
            if not hasattr(config, name):
                raise ValueError(f"{type(config).__name__} has no option {name!r}: leave it False")
            config = dataclasses.replace(config, **{name: True})
    return config


class Engine:
    """A model realized for training: its weights, moments and one training step of fixed shape (t_batch, t_seq).

    Subclasses run it (`_train`, `_evaluate`, `_logits`) on an op table; this class checks what goes in.
    """

    def __init__(self, config, options, choice, weights=None):
        """weights: a `Weights` (None: random, all of them trained)."""
        config = with_model_options(config, options)
        self.config, self.options = config, options
        self.backend, self.device, self.backend_reason = choice
        self.weights = weights = weights or random_weights(config, options)
        self.model_class = model_for(config)
        self.arch = self.model_class.arch
        self.hp_mode = self.model_class.hp_mode if weights.hp_mode is None else weights.hp_mode
        self.grad_norm = float("nan")  # L2 norm of the last step's whole gradient, before clipping
        if options.t_seq > config.context_length:
            raise ValueError(
                f"t_seq {options.t_seq} does not fit the context of {config.context_length}: "
                "choose a shorter t_seq or a longer context_length"
            )

    @property
    def n_parameters(self):
        """Parameters of the whole model, frozen ones too."""
        return sum(math.prod(shape) for shape in self.weights.shapes.values())

    @property
    def n_trained(self):
        """Parameters that are trained."""
        return sum(math.prod(shape) for shape in self.weights.trained_shapes.values())

    # -- the public contract ------------------------------------------------------------------------------------------

    def adamw(self, lr=0.001, **fields):
        """An `AdamW` in the convention this model reads (see `hp_mode`). fields: beta1, beta2, eps, weight_decay."""
        make = AdamW.for_lora if self.hp_mode == AdamW.MODE_LORA else AdamW.for_from_scratch
        return make(lr=lr, **fields)

    def step(self, token_ids, positions, labels, hp, is_first=False):
        """ONE training step: forward, mean cross-entropy, backward, clip, AdamW -> the loss before the update, a float.

        token_ids: int (t_batch, t_seq), or (t_seq,) when t_batch is 1. positions: int (t_seq,), None = 0 .. t_seq-1.
        labels: int in the shape of token_ids, -1 = not counted, or float rows (t_batch*t_seq, vocab_size).
        hp: the (1, 7) row of `AdamW.hp_for_step`. is_first: also zero the AdamW moments (gradients always start at zero).
        Raises ValueError for a wrong shape, dtype, id, label, position or row; nothing is changed then.
        """
        batch = self._check_batch(token_ids, positions, labels)
        row = check_row(hp, self.hp_mode)
        if not isinstance(is_first, (bool, np.bool_)):
            raise ValueError(f"is_first must be True or False, got {is_first!r}")
        return self._train(*batch, row, bool(is_first))

    def evaluate(self, token_ids, labels, positions=None):
        """The mean cross-entropy of a batch without any update (arguments and errors as `step`)."""
        return self._evaluate(*self._check_batch(token_ids, positions, labels))

    def logits(self, token_ids, positions=None):
        """token_ids: int (t_batch, t_seq) -> float32 (t_batch, t_seq, vocab_size)."""
        ids = self._check_ids(token_ids)
        logits = self._logits(ids, self._check_positions(positions))
        return np.array(logits, np.float32).reshape(self.options.t_batch, self.options.t_seq, -1)

    def model_copy(self):
        """A model object on an eager op table with a copy of the present weights (borrowed ones are not copied): for
        generation and inspection."""
        ops, leaves = eager_ops(self.backend), dict(self.weights.borrowed)
        if ops.name == "reference":  # numpy would dequantise a matrix anew for every token
            leaves = {name: dequantized(leaf) for name, leaf in leaves.items()}
        tree = ParameterTree(leaves | self.parameters())
        return self.model_class.from_config(self.config, ops=ops, parameters=tree, **self.weights.model_options)

    # -- checks -------------------------------------------------------------------------------------------------------

    def _check_batch(self, token_ids, positions, labels):
        return self._check_ids(token_ids), self._check_positions(positions), self._check_labels(labels)

    def _check_moments(self, state):
        if not (isinstance(state, Mapping) and state.keys() == {"m", "v"}):
            raise ValueError('the optimizer state must be {"m": {name: array}, "v": {name: array}}')
        for slot in "mv":
            check_arrays(self.weights.trained_shapes, state[slot], f"optimizer state {slot}")
        for name, array in state["v"].items():
            if (np.asarray(array) < 0).any():
                raise ValueError(f"optimizer state v: {name} holds negative numbers, and AdamW takes their roots")

    def _check_ids(self, token_ids):
        """-> contiguous int64 (N,)."""
        ids = self._rows("token_ids", np.asarray(token_ids))
        check_range("token_ids", ids, 0, self.config.vocab_size)
        return ids

    def _check_positions(self, positions):
        """-> contiguous int64 (N,): the positions of every sequence of the batch."""
        t_seq = self.options.t_seq
        if positions is None:
            positions = np.arange(t_seq)
        positions = np.asarray(positions)
        if positions.shape != (t_seq,) or positions.dtype.kind not in "iu":
            raise ValueError(
                f"positions must be integers of shape {(t_seq,)} or None, got {positions.dtype} {positions.shape}"
            )
        check_range("positions", positions, 0, self.config.context_length)
        return np.tile(positions.astype(np.int64), self.options.t_batch)

    def _check_labels(self, labels):
        """-> contiguous int64 (N,) or float32 (N, V)."""
        labels = np.asarray(labels)
        if labels.dtype.kind in "iu":
            labels = self._rows("labels", labels)
            check_range("labels", labels, -1, self.config.vocab_size)
            if (labels < 0).all():
                raise ValueError(
                    "labels: every label is -1 (not counted), so there is nothing to learn from this batch"
                )
            return labels
        wanted = (self.options.t_batch * self.options.t_seq, self.config.vocab_size)
        if labels.dtype.kind != "f" or labels.shape != wanted:
            raise ValueError(
                f"labels must be integers {self._batch_shape()} or float rows {wanted}, got {labels.dtype} {labels.shape}"
            )
        labels = np.ascontiguousarray(labels, np.float32)
        if not np.isfinite(labels).all() or (labels < 0).any():
            raise ValueError("labels: float rows must be finite and not negative (one distribution per row)")
        if not labels.any():
            raise ValueError("labels: every row is zero, so there is nothing to learn from this batch")
        return labels

    def _rows(self, name, ids):
        if ids.dtype.kind not in "iu":
            raise ValueError(f"{name} must be integers, got {ids.dtype}")
        shape = self._batch_shape()
        if ids.shape != shape and not (shape[0] == 1 and ids.shape == shape[1:]):
            flat = f" or {shape[1:]}" if shape[0] == 1 else ""
            raise ValueError(f"{name} must have shape {shape}{flat} (t_batch, t_seq), got {ids.shape}")
        if ids.dtype.kind == "u":
            check_range(name, ids, 0, 2**31)  # before the cast, so that a huge unsigned id does not turn negative
        return np.ascontiguousarray(ids.reshape(-1), dtype=np.int64)

    def _batch_shape(self):
        return (self.options.t_batch, self.options.t_seq)
