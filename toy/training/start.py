"""How each kind of run begins: its tokenizer, its model, its recipe, and what it leaves behind as a GGUF file.

`Start.of(options)` opens what the options name and checks all that can be checked before a text is read.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

from toy import recipes
from toy.config import LlamaConfig
from toy.data import make_tokenizer
from toy.data.open_tokenizer import load_tokenizer
from toy.files.fetch import find_model
from toy.files.gguf import GGUF
from toy.files.gguf_write import digest, fingerprint, write_adapter, write_gguf
from toy.models import ARCHITECTURES
from toy.models.lens import without_lens
from toy.trained.export import plain_model
from toy.trained.load import embedding_of, read_trained


class Choice(NamedTuple):
    """One line of what is printed at the start. reason: why this value, "" when it was simply asked for."""

    name: str
    value: str
    reason: str = ""


class Start:
    """What the training loop asks of a recipe.

    options: with everything that depends on the model filled in. recipe: not realized yet.
    """

    recipe_class = None

    def __init__(self, options):
        self.options = options
        self.recipe = self.recipe_class(backend=options.backend, device=options.device)

    @staticmethod
    def of(options):
        return _STARTS[options.recipe](options)

    def make_tokenizer(self, text):
        """The tokenizer for training on `text`."""
        raise NotImplementedError

    def vocabulary(self):
        """What the vocabulary is, in words."""
        raise NotImplementedError

    def model_config(self, vocab_size):
        raise NotImplementedError

    def realize(self, config, recipe_options):
        """Realize the recipe."""
        raise NotImplementedError

    def choices(self):
        """Lines about the model the run begins with."""
        return []

    def describe(self):
        """What config.json says about it, besides the options."""
        return {}

    def has_gguf(self):
        """Whether `write_gguf` can be called."""
        return ARCHITECTURES[self.recipe.arch].in_gguf

    def write_gguf(self, path, parameters, tokenizer):
        """Write the trained model as a GGUF file. parameters: the recipe's, by name."""
        write_gguf(path, self.recipe.engine.config, parameters, tokenizer)


class FromScratchStart(Start):
    recipe_class = recipes.FromScratch

    def __init__(self, options):
        super().__init__(options)
        options.model_config(vocab_size=1)  # sizes that do not fit are told before a long text is read

    def make_tokenizer(self, text):
        return make_tokenizer(self.options.tokenizer, text)

    def vocabulary(self):
        return "distinct characters of the text" if self.options.tokenizer == "char" else "every byte"

    def model_config(self, vocab_size):
        return self.options.model_config(vocab_size)

    def realize(self, config, recipe_options):
        self.recipe.realize(config, recipe_options)


class FromGGUFStart(Start):
    """What LoRA and full fine-tuning share: an open GGUF file with its tokenizer."""

    def __init__(self, options):
        super().__init__(options)
        path = find_model(options.model)
        if path.is_dir():
            raise ValueError(
                f"{path} is a directory, {options.recipe} begins with a GGUF file; `toy export` writes one of a run"
            )
        self.gguf = GGUF.open(path)  # stays open: its matrices are used in place
        self.config = self.gguf.config()
        self.check_config()
        self.tokenizer = load_tokenizer(self.gguf)
        self.options = dataclasses.replace(options, model=str(Path(path).absolute()))
        if options.context > self.config.context_length:
            raise ValueError(
                f"a context of {options.context} is too long: {path} was made for at most {self.config.context_length}"
            )

    def check_config(self):
        """Raise ValueError when the recipe cannot train this model."""

    def make_tokenizer(self, text):
        return self.tokenizer

    def vocabulary(self):
        return "the tokenizer in the file"

    def model_config(self, vocab_size):
        return self.config

    def choices(self):
        types = sorted({record.type for record in self.gguf.tensors.values()})
        return [Choice("base", str(self.gguf.path), f"{self.gguf.architecture}, {', '.join(types)}")]


class LoRAStart(FromGGUFStart):
    recipe_class = recipes.LoRA

    def check_config(self):
        if not isinstance(self.config, LlamaConfig):
            raise ValueError(
                f"LoRA needs a model of architecture llama, {self.gguf.path} is a {self.gguf.architecture}"
            )

    def realize(self, config, recipe_options):
        o = self.options
        self.recipe.realize(self.gguf, config, o.rank, recipe_options, alpha=o.alpha, targets=o.targets)
        self.base_digest = digest(self.recipe.engine.weights.borrowed)

    def choices(self):
        o, where = self.options, f"on {', '.join(self.options.targets)}"
        return [*super().choices(), Choice("adapters", f"rank {o.rank}, alpha {o.alpha:g}", where)]

    def describe(self):
        o = self.options
        return {
            "base": {"path": o.model, "digest": self.base_digest},
            "lora": {"rank": o.rank, "alpha": o.alpha, "targets": list(o.targets)},
        }

    def write_gguf(self, path, parameters, tokenizer):
        """Write the adapters as the GGUF file that llama.cpp takes with --lora."""
        write_adapter(path, self.config, parameters, self.options.alpha, base=self.gguf)


class FullFinetuneStart(FromGGUFStart):
    recipe_class = recipes.FullFinetune

    def realize(self, config, recipe_options):
        self.recipe.realize(self.gguf, config, recipe_options, freeze_embeddings=self.options.freeze_embeddings)

    def describe(self):
        return {"base": {"path": self.options.model, "fingerprint": fingerprint(self.gguf)}}


class WarmStartStart(Start):
    recipe_class = recipes.WarmStart

    def __init__(self, options):
        super().__init__(options)
        donor = read_trained(options.model)
        config, self.source = plain_model(donor)  # of a LoRA run: with its adapters
        self.donor = donor = donor._replace(config=config)
        path = Path(find_model(options.model)).absolute()
        if options.tokenizer == "donor" and donor.tokenizer is None:
            raise ValueError(f"{path} has no tokenizer: choose one with tokenizer char or bytes")
        if options.lens:
            sizes = {"arch": "llama", "d_model": 128, "layers": 4, "heads": 4, "context": 64}
        else:
            c = donor.config
            sizes = {
                "arch": donor.arch, "d_model": c.d_model, "layers": c.n_layers, "heads": c.n_heads, "d_ff": c.d_ff,
                "kv_heads": getattr(c, "n_kv_heads", None), "context": min(c.context_length, 64),
            }  # fmt: skip
        chosen = {name: value for name, value in sizes.items() if getattr(options, name) is None}
        self.options = options = dataclasses.replace(options, model=str(path), **chosen)
        if options.d_ff is None:
            self.options = dataclasses.replace(options, d_ff=4 * options.d_model)
        self.model_config(vocab_size=donor.config.vocab_size)

    def make_tokenizer(self, text):
        return (
            self.donor.tokenizer if self.options.tokenizer == "donor" else make_tokenizer(self.options.tokenizer, text)
        )

    def vocabulary(self):
        words = {"donor": "the donor's tokenizer", "char": "distinct characters of the text", "bytes": "every byte"}
        return words[self.options.tokenizer]

    def model_config(self, vocab_size):
        o, donor = self.options, self.donor.config
        kind = ARCHITECTURES[o.arch].config
        sizes = {
            "vocab_size": vocab_size, "d_model": o.d_model, "n_heads": o.heads, "d_ff": o.d_ff, "n_layers": o.layers,
            "context_length": o.context,
        }  # fmt: skip
        if kind is LlamaConfig:
            sizes["n_kv_heads"] = o.kv_heads or o.heads
        elif o.kv_heads is not None and o.kv_heads != o.heads:
            raise ValueError(f"kv_heads belongs to arch llama: {o.arch} has as many key/value heads as heads")
        if type(donor) is not kind or o.lens:
            return kind(**sizes)
        sizes["context_length"] = donor.context_length  # learned positions have a size; a llama's are free
        if o.context > donor.context_length:
            raise ValueError(
                f"a context of {o.context} is too long: the donor was made for at most {donor.context_length}"
            )
        if kind is LlamaConfig and (o.d_model, o.heads) != (donor.d_model, donor.n_heads):
            sizes["head_dim"] = None
        return dataclasses.replace(donor, **sizes)

    def realize(self, config, recipe_options):
        o = self.options
        take = "*" if o.take == ("*",) else o.take
        self.recipe.realize(self.source, config, recipe_options, take=take, lens=o.lens)

    def choices(self):
        o = self.options
        how = "its embedding through a lens" if o.lens else f"parameters like {' or '.join(o.take)}"
        return [Choice("donor", o.model, how)]

    def describe(self):
        base = {"path": self.options.model}
        if self.options.lens:
            base["digest"] = digest(embedding_of(self.donor))
        return {"base": base, "lens": self.options.lens}

    def write_gguf(self, path, parameters, tokenizer):
        config = self.recipe.engine.config
        if self.options.lens:
            config, parameters = without_lens(config, self.recipe.engine.weights.borrowed | parameters)
        write_gguf(path, config, parameters, tokenizer)


_STARTS = {
    "from-scratch": FromScratchStart,
    "lora": LoRAStart,
    "full-finetune": FullFinetuneStart,
    "warm-start": WarmStartStart,
}
