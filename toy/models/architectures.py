"""The one table of architectures: what each is called, its config, its class, and whether GGUF files have it."""

from typing import NamedTuple

from toy.config import GPT2Config, LlamaConfig, TransformerConfig
from toy.models.base import LanguageModel
from toy.models.gpt2 import GPT2
from toy.models.llama import Llama
from toy.models.transformer import TransformerLM


class Architecture(NamedTuple):
    """One row. in_gguf: whether llama.cpp has it, with the model's own name as `general.architecture`."""

    config: type
    model: type
    in_gguf: bool

    @property
    def reads_text(self):
        """Whether it is a language model."""
        return issubclass(self.model, LanguageModel)

    @property
    def name(self):
        """What it is called on the command line, in a run's config, in a GGUF file."""
        return self.model.arch


ARCHITECTURES = {
    row.name: row
    for row in (
        Architecture(TransformerConfig, TransformerLM, in_gguf=False),
        Architecture(LlamaConfig, Llama, in_gguf=True),
        Architecture(GPT2Config, GPT2, in_gguf=True),
    )
}
IN_GGUF = tuple(row.name for row in ARCHITECTURES.values() if row.in_gguf)


def architecture_of(config):
    """The row of a config's type. Raises TypeError for an object that is not a model config."""
    for row in ARCHITECTURES.values():
        if type(config) is row.config:
            return row
    known = ", ".join(row.config.__name__ for row in ARCHITECTURES.values())
    raise TypeError(f"cfg must be one of {known}, got {type(config).__name__}")


def model_for(config):
    """The model class of a config. Raises TypeError for an object that is not a model config."""
    return architecture_of(config).model
