"""Where recipes that do not start from nothing get their weights: a GGUF file, or arrays by name."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from toy.adamw import AdamW
from toy.config import LanguageModelConfig, ModelConfig
from toy.engines.weights import Weights
from toy.files import BadFileError
from toy.files.gguf import GGUF
from toy.models import model_for
from toy.quantized import Leaf


def checked_config(
    gguf: GGUF, config: ModelConfig | None = None, untied: bool = False, qkv_bias: bool = False
) -> LanguageModelConfig:
    """The config of the model in an open GGUF file, which `config` (None: anything) must be, but for a shorter context.

    untied, qkv_bias: True = the model must be so. Raises TypeError for something that is no open `GGUF`, ValueError for
    another config, and the errors of `GGUF.config`.
    """
    if not isinstance(gguf, GGUF):
        raise TypeError(f"gguf must be an open toy.GGUF (toy.GGUF.open(path)), got {type(gguf).__name__}")
    stored = gguf.config()
    for name, wanted in (("untied", untied), ("qkv_bias", qkv_bias)):
        if wanted and not getattr(stored, name, False):
            raise ValueError(f"{gguf.path} holds a model that is not {name}: leave {name} False")
    if config is None:
        return stored
    if type(config) is not type(stored):
        raise ValueError(f"{gguf.path} holds a {type(stored).__name__}, cfg is a {type(config).__name__}")
    for field in dataclasses.fields(stored):
        wanted, there = getattr(config, field.name), getattr(stored, field.name)
        if field.name == "context_length" and wanted <= there and not model_for(stored).learned_positions:
            continue
        if field.name in ("untied", "qkv_bias") and not wanted:
            continue  # the file says; RecipeOptions may ask for it too
        if wanted != there:
            raise ValueError(
                f"{gguf.path} holds a model with {field.name} {there}, cfg says {wanted}: take gguf.config()"
            )
    return dataclasses.replace(stored, context_length=config.context_length)


def borrowed_parameters(gguf: GGUF, config: ModelConfig) -> dict[str, Leaf]:
    """dict of names to leaves over the file's own bytes: quantised matrices as they are, float32 tensors as read-only views.

    Raises BadFileError for numbers that are not finite.
    """
    leaves = {}
    for name in model_for(config).parameter_shapes(config):
        leaves[name] = leaf = gguf.matrix(name)
        if not _is_finite(leaf):
            raise BadFileError(gguf.path, f"tensor {name!r} holds numbers that are not finite")
    return leaves


def _is_finite(leaf: Leaf) -> bool:
    if isinstance(leaf, np.ndarray):
        return bool(np.isfinite(leaf).all())
    return all(np.isfinite(leaf.rows(band.start, band.stop)).all() for band in leaf.bands())


class Source:
    """Weights by name, from an open `GGUF` or a mapping of names to arrays or quantised matrices. name: of it, for error
    messages. shapes: dict by name."""

    def __init__(self, weights: GGUF | Mapping[str, Leaf]) -> None:
        if isinstance(weights, GGUF):
            self.name = str(weights.path)
            self.shapes = {name: record.shape for name, record in weights.tensors.items()}
            self._leaf: Callable[[str], Leaf] = weights.matrix
        elif isinstance(weights, Mapping):
            leaves: dict[str, Leaf] = {
                name: leaf if hasattr(leaf, "dequantize") else np.asarray(leaf) for name, leaf in weights.items()
            }
            self.name = "the given weights"
            self.shapes = {name: leaf.shape for name, leaf in leaves.items()}
            self._leaf = leaves.__getitem__
        else:
            raise TypeError(
                "weights must come from an open toy.GGUF or a mapping of names to arrays (recipe.parameters()), "
                f"got {type(weights).__name__}"
            )

    def leaf(self, name: str) -> Leaf:
        """A tensor as it is stored: an array, or a `toy.quantized.QuantizedMatrix`."""
        return self._leaf(name)

    def fill(self, name: str, out: np.ndarray) -> None:
        """Write a tensor into the float32 array `out`. Raises ValueError for numbers that are not finite."""
        leaf = self.leaf(name)
        if isinstance(leaf, np.ndarray):
            np.copyto(out, leaf, casting="same_kind")
        else:
            leaf.rows(0, leaf.shape[0], out=out)
        if not np.isfinite(out).all():
            raise ValueError(f"{self.name}: {name} holds numbers that are not finite")


EMBEDDINGS = ("token_embd.weight", "position_embd.weight")


def finetuned_weights(config: ModelConfig, gguf: GGUF, freeze_embeddings: bool = False) -> Weights:
    """The `Weights` of a full fine-tuning."""
    shapes = model_for(config).parameter_shapes(config)
    frozen = EMBEDDINGS if freeze_embeddings else ()
    return Weights(
        own=shapes,
        fill=Source(gguf).fill,
        trained=frozenset(name for name in shapes if name not in frozen),
        hp_mode=AdamW.MODE_LORA,
    )
