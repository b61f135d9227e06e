"""From scratch: the options of the run, and how it begins."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from toy import recipes
from toy.config import MOST_LAYERS, LanguageModelConfig, LlamaConfig
from toy.data.bpe_tokenizer import DEFAULT_VOCAB_SIZE
from toy.data.open_tokenizer import make_tokenizer
from toy.data.sources import Source as TextSource
from toy.data.tokenizers import KINDS, CharTokenizer, Tokenizer
from toy.data.training_data import training_texts
from toy.models.architectures import derived_fields, language_models
from toy.training.options import DATA, MODEL, TextOptions, again, option
from toy.training.start import TextStart

if TYPE_CHECKING:
    from typing_extensions import Self

# the models that read text, in the order in which they are offered
LANGUAGE_MODELS = tuple(language_models())
SIZES_OF_LLAMA = ("kv_heads", "untied", "qkv_bias")


@dataclass(frozen=True)
class FromScratchOptions(TextOptions):
    """A run from random weights. Raises ValueError for a value out of range."""

    recipe: ClassVar[str] = "from-scratch"

    tokenizer: str = option(
        "char", f"What a token is: {', '.join(KINDS)}, or the tokenizer in a file or of a fetched model.", DATA
    )
    vocab_size: int | None = option(
        None, "Tokens of a vocabulary made of the text (bpe).", DATA, shown=f"{DEFAULT_VOCAB_SIZE:,}", at_least=1
    )
    arch: str = option("llama", "The model.", MODEL, choices=LANGUAGE_MODELS)
    d_model: int = option(128, "Width of the residual stream.", MODEL, at_least=1)
    layers: int = option(4, "Blocks.", MODEL, at_least=1, at_most=MOST_LAYERS)
    heads: int = option(4, "Attention heads in a block; they divide the width.", MODEL, at_least=1)
    kv_heads: int | None = option(
        None, "Key/value heads of a llama; they divide the heads.", MODEL, shown="as --heads", at_least=1
    )
    d_ff: int | None = option(None, "Hidden width of the MLP.", MODEL, shown="4 x d-model", at_least=1)
    untied: bool = option(False, "An output matrix of its own (llama and its relatives).", MODEL)
    qkv_bias: bool = option(False, "Biases on query, key and value (llama and its relatives).", MODEL)
    init_scale: float = option(1.0, "Multiplies the standard deviations of the first weights.", MODEL)
    # chosen by what a minute on two cores reaches on the default text: benchmarks/first_minute.py
    steps: int = again("steps", 1200, TextOptions)
    batch: int = again("batch", 6, TextOptions)
    context: int = again("context", 128, TextOptions)
    lr: float = again("lr", 2e-3, TextOptions)
    schedule: str = again("schedule", "cosine", TextOptions)
    lr_floor: float = again("lr_floor", 0.02, TextOptions)

    def resolved(self) -> "Self":
        return dataclasses.replace(super().resolved(), d_ff=self.d_ff or 4 * self.d_model)

    def model_config(self, vocab_size: int) -> LanguageModelConfig:
        """The config of the model these options describe. Raises ValueError for sizes that do not fit each other."""
        sizes: dict[str, Any] = dict(
            vocab_size=vocab_size,
            d_model=self.d_model,
            n_heads=self.heads,
            d_ff=self.d_ff or 4 * self.d_model,
            n_layers=self.layers,
            context_length=self.context,
        )
        row, fields = language_models()[self.arch]
        if row.config is LlamaConfig:
            sizes |= {"n_kv_heads": self.kv_heads or self.heads} | fields
            sizes |= {name: True for name in ("untied", "qkv_bias") if getattr(self, name)}
        else:
            check_no_llama_sizes(self)
        config = row.config(**sizes)
        return cast(LanguageModelConfig, dataclasses.replace(config, **derived_fields(self.arch, config)))


def new_tokenizer(options: Any, source: TextSource) -> Tokenizer:
    """The tokenizer that the options of a run ask for. Of a vocabulary made of the text, the validation part is no part."""
    kind = options.tokenizer
    if kind == "char" and options.vocab_size is None:
        return CharTokenizer(source.characters())
    if kind == "bpe" and options.split != "tail" and options.valid is None:
        return make_tokenizer(
            kind, training_texts(source, options.context, options.val_fraction, options.seed), options.vocab_size
        )
    try:
        return make_tokenizer(kind, source.texts(), options.vocab_size)
    except FileNotFoundError as error:
        raise ValueError(f"tokenizer must be one of {', '.join(KINDS)}, or one that exists: {error}") from error


def vocabulary_in_words(kind: str) -> str:
    """What the vocabulary of a tokenizer of this kind is, for a line at the start."""
    words = {
        "char": "distinct characters of the text",
        "bytes": "every byte",
        "bpe": "byte-level BPE, made of the text",
    }
    return words.get(kind, f"the tokenizer of {kind}")


def check_no_llama_sizes(options: Any) -> None:
    """Raise ValueError when options that only a llama has were given for another model."""
    if options.kv_heads is not None and options.kv_heads != options.heads:
        raise ValueError(f"kv_heads belongs to arch llama: {options.arch} has as many key/value heads as heads")
    for name in ("untied", "qkv_bias"):
        if getattr(options, name, False):
            raise ValueError(f"{name} belongs to arch llama: {options.arch} has no such option")


class FromScratchStart(TextStart):
    """Train a model from random weights.

    Without options: a small llama on the documentation inside Python, in about a minute. With --resume, options
    may be left out; --steps may be larger than before.
    """

    options_class = FromScratchOptions
    recipe_class = recipes.FromScratch
    options: FromScratchOptions
    recipe: recipes.FromScratch

    def __init__(self, options: FromScratchOptions) -> None:
        super().__init__(options)
        options.model_config(vocab_size=1)  # sizes that do not fit are told before a long text is read

    def make_tokenizer(self) -> Tokenizer:
        return new_tokenizer(self.options, self.source)

    def vocabulary(self) -> str:
        return vocabulary_in_words(self.options.tokenizer)

    def model_config(self, vocab_size: int) -> LanguageModelConfig:
        return self.options.model_config(vocab_size)

    def realize(self) -> None:
        o = self.options
        self.recipe.realize(self.config, self.recipe_options(o.context, init_scale=o.init_scale))
