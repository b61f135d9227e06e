"""A recipe as CONTRIBUTING.md says to write one: BitFit (Ben Zaken et al. 2021) trains the vectors of a model, its biases and
gains, and leaves the matrices in the file they came in."""

from dataclasses import dataclass
from typing import ClassVar

from toy.adamw import AdamW
from toy.engines import EngineHandle, check_options
from toy.engines.source import Source, borrowed_parameters, checked_config
from toy.engines.weights import Weights
from toy.files.gguf_write import digest, write_gguf
from toy.training.options import FromModelOptions
from toy.training.start import FromGGUFStart


class BitFit(EngineHandle):
    """Train the biases and the gains of the model in a GGUF file."""

    def realize(self, gguf, cfg, opts, *, keep_gradients=False):
        check_options(opts)
        config = checked_config(gguf, cfg, opts.untied, opts.qkv_bias)
        leaves = borrowed_parameters(gguf, config)
        own = {name: leaf.shape for name, leaf in leaves.items() if len(leaf.shape) == 1}
        matrices = {name: leaf for name, leaf in leaves.items() if name not in own}
        weights = Weights(own=own, fill=Source(gguf).fill, borrowed=matrices, hp_mode=AdamW.MODE_LORA)
        return self._realize(config, opts, keep_gradients, weights)


@dataclass(frozen=True)
class BitFitOptions(FromModelOptions):
    """BitFit on a GGUF model."""

    recipe: ClassVar[str] = "bit-fit"


class BitFitStart(FromGGUFStart):
    """Train the biases and the gains of the model in a GGUF file."""

    options_class = BitFitOptions
    recipe_class = BitFit

    def realize(self):
        self.recipe.realize(self.gguf, self.config, self.recipe_options(self.options.context))
        self.base_digest = digest(self.recipe.engine.weights.borrowed)

    def base(self):
        return {"base": {"path": self.options.model, "digest": self.base_digest}}

    def write_gguf(self, path, parameters):
        write_gguf(path, self.config, self.gguf.parameters() | parameters, self.tokenizer)
