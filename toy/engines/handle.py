"""`build` picks the engine of a backend; `EngineHandle` is what recipes and named engines share."""

from toy.config import RecipeOptions
from toy.engines.eager import EagerEngine
from toy.switch import resolve


def build(config, options, choice, weights=None, keep_gradients=False):
    """The engine of a config on a resolved backend (`toy.switch.Choice`). weights: `Weights`, None = random, all trained."""
    if choice.backend == "ggml":
        from toy.engines.graph import GraphEngine

        return GraphEngine(config, options, choice, weights, keep_gradients)
    return EagerEngine(config, options, choice, weights, keep_gradients)


class EngineHandle:
    """An object that is made first and realized later: `backend` and `device` now, the model with `realize`.

    Everything a realized engine can do (`step`, `evaluate`, `logits`, `parameters`, `load_parameters`, `gradients`,
    `optimizer_state`, `load_optimizer_state`, `adamw`, `n_parameters`, `n_trained`, `grad_norm`, `hp_mode`, `arch`) is
    passed on to it.
    Raises RuntimeError for any of these before `realize`.
    """

    engine = None

    def __init__(self, backend="auto", device="auto"):
        self._choice = resolve(backend, device)
        self.backend, self.device, self.backend_reason = self._choice

    def _realize(self, config, options, keep_gradients, weights=None):
        check_options(options)
        self.engine = build(config, options, self._choice, weights, keep_gradients)
        return self

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        if self.engine is None:
            raise RuntimeError(f"{type(self).__name__}.{name}: call realize() first")
        return getattr(self.engine, name)

    def __dir__(self):
        return sorted({*super().__dir__(), *(dir(self.engine) if self.engine else ())})


def check_options(options):
    """Raise TypeError unless these are RecipeOptions."""
    if not isinstance(options, RecipeOptions):
        raise TypeError(f"opts must be a toy.RecipeOptions, got {type(options).__name__}")
