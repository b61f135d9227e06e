"""The models: one file each, forward and hand-written backward. `ARCHITECTURES` lists them, `model_for(config)` finds one."""

from toy.models.architectures import ARCHITECTURES, architecture_of, model_for
from toy.models.gpt2 import GPT2
from toy.models.llama import Llama
from toy.models.parameters import GradientTree, ParameterTree
from toy.models.transformer import Gradients, TransformerLM
from toy.models.vit import ViT

__all__ = [
    "ARCHITECTURES",
    "GPT2",
    "GradientTree",
    "Gradients",
    "Llama",
    "ParameterTree",
    "TransformerLM",
    "ViT",
    "architecture_of",
    "model_for",
]
