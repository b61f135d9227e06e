"""toy: learn how a transformer is trained, then train one fast."""

from toy import engines, recipes
from toy.adamw import AdamW
from toy.checks.exercises import check
from toy.config import VERSION as __version__
from toy.config import GPT2Config, LlamaConfig, RecipeOptions, TransformerConfig, ViTConfig
from toy.files.gguf import GGUF
from toy.models import GPT2, Gradients, Llama, TransformerLM, ViT
from toy.switch import BackendUnavailableError, backends, set_backend, set_num_threads, use_backend
from toy.trained.loaded import load

__all__ = [
    "GGUF",
    "GPT2",
    "AdamW",
    "BackendUnavailableError",
    "GPT2Config",
    "Gradients",
    "Llama",
    "LlamaConfig",
    "RecipeOptions",
    "TransformerConfig",
    "TransformerLM",
    "ViT",
    "ViTConfig",
    "__version__",
    "backends",
    "check",
    "engines",
    "load",
    "recipes",
    "set_backend",
    "set_num_threads",
    "use_backend",
]
