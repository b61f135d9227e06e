"""Warm start: a new model that begins with some or all weights of another one."""

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from toy.config import LlamaConfig, ModelConfig, RecipeOptions
from toy.engines import EngineHandle, check_options
from toy.engines.base import with_model_options
from toy.engines.source import Source
from toy.engines.weights import Weights, random_fill
from toy.files.gguf import GGUF
from toy.files.gguf_write import digest
from toy.models import model_for
from toy.models.lens import lens_shapes
from toy.models.parameters import initialize_array, some_names
from toy.quantized import Leaf

EMBEDDING = "token_embd.weight"


class WarmStart(EngineHandle):
    """Train a model that starts from another model's weights: from a GGUF file, or from another run.

    Everything is trained, but for a donor embedding that is read through a lens. The convention of the hyper-parameter row is
    the model's own, as in `FromScratch`.
    """

    def realize(
        self,
        source: GGUF | Mapping[str, Leaf],
        cfg: ModelConfig,
        opts: RecipeOptions,
        *,
        take: str | Iterable[str] = "*",
        lens: bool = False,
        keep_gradients: bool = False,
    ) -> "WarmStart":
        """Build the training step; returns self.

        source: an open `toy.GGUF` or a mapping of names to arrays, such as `recipe.parameters()`. cfg: config of the new
        model.
        take: shell pattern, or a list of them, of the names of the parameters that are taken from the source ("blk.*",
        "token_embd.*"); the others start random, from the seed of opts.
        lens: (llama) the source's token embedding may have any width; it stays frozen, and trained projections lead from it
        to the new model's width and (with a tied head) back. Of the rest, "*" then takes what has the right shape.

        Raises ValueError when a parameter that is to be taken is missing in the source or has another shape, when no name
        matches, and for a vocabulary of another size under a lens.
        """
        check_options(opts)
        config = with_model_options(cfg, opts)
        self._source = source if lens else None
        return self._realize(config, opts, keep_gradients, warm_weights(config, source, opts, take, lens))

    def _base_to_save(self) -> dict[str, Any]:
        if self._source is None:
            return {}
        if not isinstance(self._source, GGUF):
            return super()._base_to_save()
        base = {"path": str(self._source.path.absolute()), "digest": digest(self._ready("save").weights.borrowed)}
        return {"recipe": "warm-start", "base": base, "lens": True}


def warm_weights(
    config: ModelConfig,
    source: GGUF | Mapping[str, Leaf],
    options: RecipeOptions,
    take: str | Iterable[str] = "*",
    lens: bool = False,
) -> Weights:
    """The `Weights` of a warm start; arguments and errors as `WarmStart.realize`."""
    patterns = [take] if isinstance(take, str) else list(take)
    shapes, reader, random = model_for(config).parameter_shapes(config), Source(source), random_fill(config, options)
    borrowed: dict[str, Leaf] = {}
    if lens:
        if not isinstance(config, LlamaConfig):
            raise ValueError(f"a lens belongs to a llama model, this is a {type(config).__name__}")
        borrowed = {EMBEDDING: _donor_embedding(config, reader)}
        width = borrowed[EMBEDDING].shape[1]
        shapes = {name: shape for name, shape in shapes.items() if name != EMBEDDING} | lens_shapes(config, width)
    taken = {name for name in shapes if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}
    taken = {name for name in taken if not name.endswith(".lens")}
    if lens and take == "*":  # of a donor of another width, only what fits
        taken = {name for name in taken if reader.shapes.get(name) == shapes[name]}
    elif not taken:
        raise ValueError(
            f"no parameter of the model is called like {' or '.join(patterns)}: they are {some_names(shapes, 4)}"
        )
    for name in sorted(taken):
        if name not in reader.shapes:
            raise ValueError(f"{reader.name} has no {name}: leave it out of `take`, it then starts random")
        if reader.shapes[name] != shapes[name]:
            raise ValueError(
                f"{reader.name}: {name} has shape {reader.shapes[name]}, the new model's is {shapes[name]}: choose "
                "the sizes of the source, or leave it out of `take`, it then starts random"
            )

    def fill(name: str, out: np.ndarray) -> None:
        if name in taken:
            reader.fill(name, out)
        elif name == "token_embd.lens":
            _fill_lens(out, options)
        elif name == "output.lens":  # the way back starts as the transpose of the way in
            into = out.T.copy()
            _fill_lens(into, options)
            out[...] = into.T
        else:
            random(name, out)

    return Weights(own=shapes, fill=fill, borrowed=borrowed)


def _fill_lens(out: np.ndarray, options: RecipeOptions) -> None:
    # variance 1/in keeps the size of the rows
    initialize_array("token_embd.lens", out, out.shape[1] ** -0.5, options.seed, options.init_scale)


def _donor_embedding(config: LlamaConfig, reader: Source) -> Leaf:
    if EMBEDDING not in reader.shapes:
        raise ValueError(f"{reader.name} has no {EMBEDDING} to look at through a lens")
    rows = reader.shapes[EMBEDDING][0]
    if rows != config.vocab_size:
        raise ValueError(
            f"{reader.name} has an embedding of {rows} tokens, the new model a vocabulary of {config.vocab_size}: "
            "they must be the same"
        )
    return reader.leaf(EMBEDDING)
