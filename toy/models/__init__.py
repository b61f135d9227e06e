"""The models: one file each, forward and hand-written backward. `model_for(config)` finds the class of a config."""

from toy.config import GPT2Config, LlamaConfig, TransformerConfig
from toy.models.gpt2 import GPT2
from toy.models.llama import Llama
from toy.models.parameters import GradientTree, ParameterTree
from toy.models.transformer import Gradients, TransformerLM

MODELS = {TransformerConfig: TransformerLM, GPT2Config: GPT2, LlamaConfig: Llama}  # the config's type picks the model


def model_for(config):
    """The model class of a config. Raises TypeError for an object that is not a model config."""
    try:
        return MODELS[type(config)]
    except KeyError:
        known = ", ".join(c.__name__ for c in MODELS)
        raise TypeError(f"cfg must be one of {known}, got {type(config).__name__}") from None


__all__ = ["GPT2", "MODELS", "GradientTree", "Gradients", "Llama", "ParameterTree", "TransformerLM", "model_for"]
