"""ViT-tiny: a small vision transformer from random weights."""

from toy.config import RecipeOptions, ViTConfig
from toy.engines import EngineHandle


class ViTTiny(EngineHandle):
    """Train a vision transformer from random weights.

    The first argument of `step`, `evaluate` and `logits` are the images, float (t_batch, height, width, channels), and
    labels are int (t_batch,). The convention of the hyper-parameter row is `AdamW.constant_slots()`.
    """

    def realize(self, cfg, opts=None, keep_gradients=False, *, t_batch=1, seed=0):
        """Build everything for the `ViTConfig` cfg; returns self.

        opts: `RecipeOptions` with the t_seq of an image (cfg.n_tokens), or None: made from t_batch, the images in a step, and
        seed.
        Raises TypeError for a config of another model and ValueError for options that do not fit it.
        """
        if not isinstance(cfg, ViTConfig):
            raise TypeError(f"cfg must be a toy.ViTConfig, got {type(cfg).__name__}")
        if opts is None:
            opts = RecipeOptions(t_seq=cfg.n_tokens, t_batch=t_batch, seed=seed)
        return self._realize(cfg, opts, keep_gradients)
