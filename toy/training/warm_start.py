"""Warm start: the options of the run, and how it begins."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

from toy import recipes
from toy.config import LanguageModelConfig, LlamaConfig
from toy.data.tokenizers import KINDS, Tokenizer
from toy.engines.base import Arrays, Engine
from toy.files.atomic import StrPath
from toy.files.gguf_write import digest, write_gguf
from toy.files.places import find_model
from toy.models import ARCHITECTURES
from toy.models.lens import without_lens
from toy.trained.export import plain_model
from toy.trained.load import embedding_of, read_trained
from toy.training.from_scratch import FromScratchOptions, check_no_llama_sizes, new_tokenizer, vocabulary_in_words
from toy.training.options import MODEL, FromModelOptions, TextOptions, again, option
from toy.training.start import Decision, TextStart

DONORS = "the donor's"
# a relative of llama is what the donor is
OWN_NAMES = tuple(name for name, row in ARCHITECTURES.items() if row.reads_text)


@dataclass(frozen=True)
class WarmStartOptions(FromModelOptions):
    """A new model that begins with weights of another one. Raises ValueError for a value out of range."""

    recipe: ClassVar[str] = "warm-start"

    model: str = again(
        "model",
        "",
        FromModelOptions,
        help="The donor: a run directory, a checkpoint, a GGUF file, a Hugging Face folder, or the name of a fetched model.",
    )
    take: tuple[str, ...] = option(
        ("*",), "Shell patterns of the names of the parameters to take, separated by commas.", MODEL
    )
    lens: bool = option(False, "See the donor's token embedding, frozen, through a trained projection (llama).", MODEL)
    tokenizer: str = again(
        "tokenizer",
        "donor",
        FromScratchOptions,
        help=f"What a token is: donor, {', '.join(KINDS)}, or the tokenizer in a file or of a fetched model.",
    )
    vocab_size: int | None = again("vocab_size", None, FromScratchOptions)
    arch: str | None = again("arch", None, FromScratchOptions, shown=DONORS, choices=OWN_NAMES)
    d_model: int | None = again("d_model", None, FromScratchOptions, shown=DONORS)
    layers: int | None = again("layers", None, FromScratchOptions, shown=DONORS)
    heads: int | None = again("heads", None, FromScratchOptions, shown=DONORS)
    kv_heads: int | None = again("kv_heads", None, FromScratchOptions, shown=DONORS)
    d_ff: int | None = again("d_ff", None, FromScratchOptions, shown=DONORS)
    init_scale: float = again("init_scale", 1.0, FromScratchOptions)
    steps: int = again("steps", 1000, TextOptions)
    batch: int = again("batch", 12, TextOptions)
    context: int | None = again("context", None, TextOptions, shown="the donor's, at most 64")
    sample_tokens: int = again("sample_tokens", 200, TextOptions)

    def __post_init__(self) -> None:
        object.__setattr__(self, "take", (self.take,) if isinstance(self.take, str) else tuple(self.take))
        super().__post_init__()


class WarmStartStart(TextStart):
    """Train a model that begins with some or all weights of another one; the others start random."""

    options_class = WarmStartOptions
    recipe_class = recipes.WarmStart
    options: WarmStartOptions
    recipe: recipes.WarmStart

    def __init__(self, options: WarmStartOptions) -> None:
        super().__init__(options)
        donor = read_trained(options.model)
        config, self.donor_weights = plain_model(donor)  # of a LoRA run: with its adapters
        self.donor = donor = donor._replace(config=config)
        path = Path(find_model(options.model)).absolute()
        if options.tokenizer == "donor" and donor.tokenizer is None:
            raise ValueError(f"{path} has no tokenizer: choose one with tokenizer char or bytes")
        if options.lens:
            sizes: dict[str, Any] = {"arch": "llama", "d_model": 128, "layers": 4, "heads": 4, "context": 64}
        else:
            c = config
            sizes = {
                "arch": donor.arch, "d_model": c.d_model, "layers": c.n_layers, "heads": c.n_heads, "d_ff": c.d_ff,
                "kv_heads": getattr(c, "n_kv_heads", None), "context": min(c.context_length, 64),
            }  # fmt: skip
        chosen = {name: value for name, value in sizes.items() if getattr(options, name) is None}
        self.options = options = dataclasses.replace(options, model=str(path), **chosen)
        if options.d_ff is None:
            self.options = dataclasses.replace(options, d_ff=4 * cast(int, options.d_model))
        self.model_config(vocab_size=config.vocab_size)

    def make_tokenizer(self) -> Tokenizer:
        if self.options.tokenizer == "donor":
            return cast(Tokenizer, self.donor.tokenizer)
        return new_tokenizer(self.options, self.source)

    def vocabulary(self) -> str:
        kind = self.options.tokenizer
        return "the donor's tokenizer" if kind == "donor" else vocabulary_in_words(kind)

    def model_config(self, vocab_size: int) -> LanguageModelConfig:
        o, donor = self.options, self.donor.config
        kind = ARCHITECTURES[cast(str, o.arch)].config
        sizes: dict[str, Any] = {
            "vocab_size": vocab_size, "d_model": o.d_model, "n_heads": o.heads, "d_ff": o.d_ff, "n_layers": o.layers,
            "context_length": o.context,
        }  # fmt: skip
        if kind is LlamaConfig:
            sizes["n_kv_heads"] = o.kv_heads or o.heads
        else:
            check_no_llama_sizes(o)
        if type(donor) is not kind or o.lens:
            return cast(LanguageModelConfig, kind(**sizes))
        sizes["context_length"] = donor.context_length  # learned positions have a size; a llama's are free
        if o.context is not None and o.context > donor.context_length:
            raise ValueError(
                f"a context of {o.context} is too long: the donor was made for at most {donor.context_length}"
            )
        if kind is LlamaConfig and (o.d_model, o.heads) != (donor.d_model, donor.n_heads):
            sizes["head_dim"] = None
        return cast(LanguageModelConfig, dataclasses.replace(donor, **sizes))

    def realize(self) -> None:
        o = self.options
        take = "*" if o.take == ("*",) else o.take
        options = self.recipe_options(cast(int, o.context), init_scale=o.init_scale)
        self.recipe.realize(self.donor_weights, self.config, options, take=take, lens=o.lens)

    def base_decisions(self) -> list[Decision]:
        o = self.options
        how = "its embedding through a lens" if o.lens else f"parameters like {' or '.join(o.take)}"
        return [Decision("donor", o.model, how)]

    def base(self) -> dict[str, Any]:
        base = {"path": self.options.model}
        if self.options.lens:
            base["digest"] = digest(embedding_of(self.donor))
        return {"base": base, "lens": self.options.lens}

    def write_gguf(self, path: StrPath, parameters: Arrays) -> None:
        config = cast(LanguageModelConfig, self.recipe.config)
        if self.options.lens:
            borrowed = cast(Engine, self.recipe.engine).weights.borrowed
            config, parameters = without_lens(cast(LlamaConfig, config), borrowed | parameters)
        write_gguf(path, config, parameters, self.tokenizer)
