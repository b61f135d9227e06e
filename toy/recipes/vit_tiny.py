"""ViT-tiny: a small vision transformer from random weights."""

import math
import os
from collections.abc import Iterable

from toy.config import RecipeOptions, ViTConfig
from toy.engines import EngineHandle


class ViTTiny(EngineHandle):
    """Train a vision transformer from random weights.

    The first argument of `step`, `evaluate` and `logits` are the images, float (t_batch, height, width, channels), and
    labels are int (t_batch,). The convention of the hyper-parameter row is `AdamW.constant_slots()`.
    """

    def realize(
        self,
        cfg: ViTConfig,
        opts: RecipeOptions | None = None,
        keep_gradients: bool = False,
        *,
        t_batch: int | None = None,
        seed: int | None = None,
    ) -> "ViTTiny":
        """Build everything for the `ViTConfig` cfg; returns self.

        opts: `RecipeOptions` with the t_seq of an image (cfg.n_tokens), or None: made from t_batch, the images in a step
        (None: 1), and seed (None: 0).
        Raises TypeError for a config of another model and ValueError for options that do not fit it.
        """
        if not isinstance(cfg, ViTConfig):
            raise TypeError(f"cfg must be a toy.ViTConfig, got {type(cfg).__name__}")
        if opts is None:
            opts = RecipeOptions(cfg.n_tokens, 1 if t_batch is None else t_batch, seed=0 if seed is None else seed)
        elif t_batch is not None or seed is not None:
            raise ValueError("t_batch and seed stand in opts already: give them there, or leave opts out")
        return self._realize(cfg, opts, keep_gradients)

    def save(  # type: ignore[override]  # images are not read with a tokenizer
        self,
        path: str | os.PathLike[str],
        *,
        classes: Iterable[str] | None = None,
        normalisation: tuple[float, float] | None = None,
    ) -> None:
        """Write the model into the file `path` (safetensors, atomically), for `toy.load`, toy predict and toy eval.

        classes: their names, None: they are numbered. normalisation: the (mean, standard deviation) that were subtracted from
        pixels of 0 to 1, and divided by, before `step` got them; None: nothing was done. The AdamW moments are in it too.
        Raises ValueError for another number of classes and a path that ends with .gguf, OSError when the file cannot be
        written.
        """
        n_classes = self._ready("save").batch.n_classes
        mean, std = (0.0, 1.0) if normalisation is None else normalisation
        names = [str(name) for name in (range(n_classes) if classes is None else classes)]
        if len(names) != n_classes:
            raise ValueError(f"classes: there are {len(names)} names, the model has {n_classes} classes")
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise ValueError(f"normalisation must be a mean and a standard deviation above 0, got {mean} and {std}")
        self._write(path, classes=names, normalisation={"mean": float(mean), "std": float(std)})
