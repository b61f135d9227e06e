"""The engine of the eager op tables (numpy, cython): it calls the model's forward and backward, then AdamW."""

import math

import numpy as np

from toy.engines.base import Engine
from toy.models.parameters import ParameterTree, check_arrays, round_weights
from toy.switch import ops_for


class EagerEngine(Engine):
    """See `Engine`. Weights, gradients and moments are four flat float32 buffers of one layout."""

    def __init__(self, config, options, choice, keep_gradients=True):
        super().__init__(config, options, choice)
        config = self.config
        self.ops = ops_for(self.backend)
        self.model = self.model_class.from_config(
            config, seed=options.seed, init_scale=options.init_scale, ops=self.ops
        )
        self.masters = self.model.parameters  # float32, what AdamW updates
        self.grads = self.model.new_gradients()
        self.m = ParameterTree.zeros(self.masters.shapes)
        self.v = ParameterTree.zeros(self.masters.shapes)
        if options.weight_dtype != "f32":
            self.model.parameters = ParameterTree.zeros(
                self.masters.shapes
            )  # the rounded copies the model computes with
            self._round_weights()

    @property
    def n_parameters(self):
        return self.masters.n_parameters

    def parameters(self):
        """dict of names to float32 copies of the (master) weights."""
        return self.masters.copies()

    def load_parameters(self, mapping):
        """Copy weights in. Raises ValueError for wrong names, shapes or numbers; nothing is changed then."""
        self.masters.load(mapping)
        self._round_weights()

    def gradients(self):
        """dict of names to copies of the last step's gradients, before clipping."""
        return self.grads.copies()

    def optimizer_state(self):
        """{"m": {name: array}, "v": {name: array}}: copies of the AdamW moments."""
        return {"m": self.m.copies(), "v": self.v.copies()}

    def load_optimizer_state(self, state):
        """Copy moments in, all or nothing; errors as `load_parameters`."""
        for slot, tree in (("m", self.m), ("v", self.v)):
            check_arrays(tree.shapes, state[slot], f"optimizer state {slot}")
        self.m.load(state["m"])
        self.v.load(state["v"])

    def _train(self, token_ids, positions, labels, hp, is_first):
        grads = self.grads
        grads.fill_zero()
        if is_first:
            self.m.flat.fill(0)
            self.v.flat.fill(0)
        logits, cache = self.model.forward_rows(token_ids, positions, self.options.t_batch)
        loss = self.model.backward((logits, cache), labels, grads, release_cache=True)
        self.grad_norm = math.sqrt(self.ops.sum_of_squares(grads.flat))
        gradient = grads.flat
        clip = self.options.grad_clip
        if clip is not None and self.grad_norm > clip:
            gradient = gradient * np.float32(clip / self.grad_norm)
        self.ops.adamw_step(self.masters.flat, gradient, self.m.flat, self.v.flat, hp)
        self._round_weights()
        return loss

    def _evaluate(self, token_ids, positions, labels):
        logits, _ = self.model.forward_rows(token_ids, positions, self.options.t_batch)
        return self.ops.cross_entropy(logits, labels)[0]

    def _logits(self, token_ids, positions):
        return self.model.forward_rows(token_ids, positions, self.options.t_batch)[0]

    def _round_weights(self):
        if self.model.parameters is not self.masters:
            self.model.parameters.flat[:] = round_weights(self.masters.flat, self.options.weight_dtype)
