"""The one table of architectures: what each is called, its config, its class, and whether GGUF files have it."""

from typing import Any, NamedTuple

from toy.config import GPT2Config, LlamaConfig, ModelConfig, TransformerConfig, ViTConfig
from toy.models import gpt2, llama
from toy.models.base import LanguageModel, Model
from toy.models.gguf_form import Form
from toy.models.gpt2 import GPT2
from toy.models.llama import Llama
from toy.models.transformer import TransformerLM
from toy.models.vit import ViT


class Architecture(NamedTuple):
    """One row. gguf_forms: how GGUF files hold it (`toy.models.gguf_form`); empty: llama.cpp has no such model. tiny, small:
    configs to try it on, of the size for central differences and of the size for a self-test of a second."""

    config: type[ModelConfig]
    model: type[Model]
    gguf_forms: tuple[Form, ...]
    tiny: ModelConfig
    small: ModelConfig

    @property
    def in_gguf(self) -> bool:
        """Whether there are GGUF files of it."""
        return bool(self.gguf_forms)

    @property
    def reads_text(self) -> bool:
        """Whether it is a language model."""
        return issubclass(self.model, LanguageModel)

    @property
    def name(self) -> str:
        """What it is called on the command line, in a run's config, in a GGUF file."""
        return self.model.arch


_TINY: dict[str, Any] = {"vocab_size": 11, "d_model": 8, "n_heads": 2, "d_ff": 12, "n_layers": 2, "context_length": 5}
_SMALL: dict[str, Any] = {
    "vocab_size": 65,
    "d_model": 64,
    "n_heads": 4,
    "d_ff": 256,
    "n_layers": 2,
    "context_length": 32,
}
_IMAGES: dict[str, Any] = {"channels": 1, "n_layers": 2, "n_classes": 10}

ARCHITECTURES = {
    row.name: row
    for row in (
        Architecture(
            TransformerConfig, TransformerLM, (), tiny=TransformerConfig(**_TINY), small=TransformerConfig(**_SMALL)
        ),
        Architecture(
            LlamaConfig,
            Llama,
            llama.GGUF_FORMS,
            tiny=LlamaConfig(**_TINY, n_kv_heads=1),
            small=LlamaConfig(**{**_SMALL, "d_ff": 128}, n_kv_heads=2),
        ),
        Architecture(GPT2Config, GPT2, gpt2.GGUF_FORMS, tiny=GPT2Config(**_TINY), small=GPT2Config(**_SMALL)),
        Architecture(
            ViTConfig,
            ViT,
            (),
            tiny=ViTConfig(**_IMAGES, image_size=4, patch_size=2, d_model=8, n_heads=2, d_ff=12),
            small=ViTConfig(**_IMAGES, image_size=8, patch_size=2, d_model=64, n_heads=4, d_ff=256),
        ),
    )
}


def language_models() -> dict[str, tuple[Architecture, dict[str, Any]]]:
    """dict of the names of models that read text to their rows, and the fields of the config that make a relative of a row's
    model what its name says: "qwen3" is a Llama with two of them."""
    found: dict[str, tuple[Architecture, dict[str, Any]]] = {}
    for row in ARCHITECTURES.values():
        if row.reads_text:
            found[row.name] = (row, {})
            found |= {f.name: (row, f.fixed | f.typical) for f in row.gguf_forms if f.typical is not None}
    return found


def derived_fields(name: str, config: ModelConfig) -> dict[str, Any]:
    """The fields of a config that follow from its others in a model of this name, as `language_models` has it."""
    row, _ = language_models()[name]
    derived = {form.name: form.derived for form in row.gguf_forms}.get(name, {})
    return {field: value(config) for field, value in derived.items()}


def architecture_of(config: ModelConfig) -> Architecture:
    """The row of a config's type. Raises TypeError for an object that is not a model config."""
    for row in ARCHITECTURES.values():
        if type(config) is row.config:
            return row
    known = ", ".join(row.config.__name__ for row in ARCHITECTURES.values())
    raise TypeError(f"cfg must be one of {known}, got {type(config).__name__}")


def model_for(config: ModelConfig) -> type[Model]:
    """The model class of a config. Raises TypeError for an object that is not a model config."""
    return architecture_of(config).model
