"""From scratch: random weights, everything is trained."""

from toy.config import ModelConfig, RecipeOptions
from toy.engines import EngineHandle


class FromScratch(EngineHandle):
    """Train a model from random weights.

    backend: "auto", "numpy", "cython" or "ggml"; device: "auto", "cpu" or, on ggml, the name of a device. Raises
    ValueError for unknown names and `BackendUnavailableError` for a backend or device that is not there. After `realize`
    it has everything of `toy.engines.base.Engine`.
    """

    def realize(self, cfg: ModelConfig, opts: RecipeOptions, keep_gradients: bool = False) -> "FromScratch":
        """Build everything for the model of `cfg` (its type picks the model) and the step of `opts`; returns self.

        Raises TypeError for an unknown config type and ValueError for options that do not fit it.
        """
        return self._realize(cfg, opts, keep_gradients)
