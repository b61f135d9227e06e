"""Engines: a model realized on an op table. `build` picks one; `EngineHandle` is what recipes and named engines share."""

import numpy as np

from toy.config import GPT2Config, RecipeOptions
from toy.engines.eager import EagerEngine
from toy.models import ParameterTree, model_for
from toy.switch import eager_ops, resolve


def build(config, options, choice, keep_gradients=False):
    """The engine of a config on a resolved backend (`toy.switch.Choice`)."""
    if choice.backend == "ggml":
        from toy.engines.graph import GraphEngine

        return GraphEngine(config, options, choice, keep_gradients)
    return EagerEngine(config, options, choice, keep_gradients)


def model_from(config, parameters, backend="auto"):
    """A readable model (TransformerLM, GPT2) on an eager op table, with the given weights: for generation and inspection.

    parameters: dict of names to arrays. Raises ValueError when they are not this config's.
    """
    model_class = model_for(config)
    tree = ParameterTree.zeros(model_class.parameter_shapes(config), np.float32)
    tree.load(parameters)
    return model_class.from_config(config, ops=eager_ops(backend), parameters=tree)


class EngineHandle:
    """An object that is made first and realized later: `backend` and `device` now, the model with `realize`.

    Everything a realized engine can do (`step`, `evaluate`, `logits`, `parameters`, `load_parameters`, `gradients`,
    `optimizer_state`, `load_optimizer_state`, `adamw`, `n_parameters`, `grad_norm`, `hp_mode`, `arch`) is passed on to it.
    Raises RuntimeError for any of these before `realize`.
    """

    engine = None

    def __init__(self, backend="auto", device="auto"):
        self._choice = resolve(backend, device)
        self.backend, self.device, self.backend_reason = self._choice

    def _realize(self, config, options, keep_gradients):
        if not isinstance(options, RecipeOptions):
            raise TypeError(f"opts must be a toy.RecipeOptions, got {type(options).__name__}")
        self.engine = build(config, options, self._choice, keep_gradients)
        return self

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        if self.engine is None:
            raise RuntimeError(f"{type(self).__name__}.{name}: call realize() first")
        return getattr(self.engine, name)

    def __dir__(self):
        return sorted({*super().__dir__(), *(dir(self.engine) if self.engine else ())})


class GPT2SeqEngine(EngineHandle):
    """GPT-2 by its own name: `realize` takes the sizes one by one."""

    def realize(
        self, vocab, d_model, n_heads, d_ff, n_layers, context, seed=0, *, t_seq=None, t_batch=1, keep_gradients=False
    ):
        """Build a GPT-2 with random weights; t_seq: None = the whole context. Returns self. Errors as `GPT2Config`."""
        config = GPT2Config(vocab, d_model, n_heads, d_ff, n_layers, context)
        options = RecipeOptions(t_seq=config.context_length if t_seq is None else t_seq, t_batch=t_batch, seed=seed)
        return self._realize(config, options, keep_gradients)
