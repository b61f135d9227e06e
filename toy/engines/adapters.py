"""LoRA adapters as the weights of an engine: which matrices get them, how they start."""

import numbers
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from toy.adamw import AdamW
from toy.config import LlamaConfig, ModelConfig, RecipeOptions, check_positive_int
from toy.engines.weights import Fill, Weights
from toy.files.gguf_write import digest
from toy.models.parameters import Shapes, initialize_array
from toy.quantized import Leaf

# what may be corrected, in the words of the paper and the command line, and the parameters that this means
TARGETS = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip


def adapter_weights(
    config: ModelConfig,
    base: dict[str, Leaf],
    rank: int,
    options: RecipeOptions,
    alpha: float | None = None,
    targets: Iterable[str] = ("q",),
) -> Weights:
    """The `Weights` of a LoRA: base is frozen (dict of names to leaves), the adapters are trained. Errors as
    `toy.recipes.LoRA.realize`."""
    if not isinstance(config, LlamaConfig):
        raise ValueError(f"LoRA needs a model of architecture llama, this is a {type(config).__name__}")
    rank = check_positive_int("rank", rank)
    shapes = adapter_shapes(base, rank, targets, config.n_layers)
    return Weights(
        own=shapes,
        fill=adapter_fill(options.seed, options.init_scale),
        borrowed=base,
        model_options={"lora_scale": check_alpha(alpha, rank) / rank},
        hp_mode=AdamW.MODE_LORA,
    )


def adapters_to_save(
    path: str | Path, base: dict[str, Leaf], rank: int, alpha: float | None, targets: Iterable[str]
) -> dict[str, Any]:
    """What the config of saved adapters says. path: of the GGUF file they are for. base: its leaves by name. Others as
    `adapter_weights`."""
    return {
        "recipe": "lora",
        "base": {"path": str(Path(path).absolute()), "digest": digest(base)},
        "lora": {
            "rank": check_positive_int("rank", rank),
            "alpha": check_alpha(alpha, rank),
            "targets": list(check_targets(targets)),
        },
    }


def adapter_shapes(base: dict[str, Leaf], rank: int, targets: Iterable[str], n_layers: int) -> Shapes:
    """dict of the adapters' names to their shapes. base: dict of names to what has the shapes of the matrices."""
    targets = check_targets(targets)
    shapes: Shapes = {}
    for layer in range(n_layers):
        for target in targets:
            stem = f"blk.{layer}.{TARGETS[target]}"
            n_out, n_in = base[f"{stem}.weight"].shape
            shapes |= {f"{stem}.lora_a": (rank, n_in), f"{stem}.lora_b": (n_out, rank)}
    return shapes


def adapter_fill(seed: int, init_scale: float = 1.0) -> Fill:
    """The `fill` of adapters: A from a normal distribution with variance 1/(3 in), B zero. Each tensor has its own stream."""

    def fill(name: str, out: np.ndarray) -> None:
        std = "zeros" if name.endswith("lora_b") else (3 * out.shape[1]) ** -0.5
        initialize_array(name, out, std, seed, init_scale)

    return fill


def check_targets(targets: Iterable[str]) -> tuple[str, ...]:
    """The targets in the order of `TARGETS`. Raises ValueError for unknown ones and for none."""
    targets = list(targets) if isinstance(targets, Iterable) and not isinstance(targets, str) else [targets]
    unknown = [target for target in targets if target not in TARGETS]
    if unknown or not targets:
        given = f"{unknown[0]!r} is not one" if unknown else "none was given"
        raise ValueError(f"targets must be some of {', '.join(TARGETS)}: {given}")
    return tuple(name for name in TARGETS if name in targets)


def check_alpha(alpha: float | None, rank: int) -> float:
    """alpha as a float (None: rank). Raises ValueError unless it is a positive number whose share alpha / rank a float32
    can hold."""
    alpha = rank if alpha is None else alpha
    if not (isinstance(alpha, numbers.Real) and 1e-30 < alpha / rank < 1e30):
        raise ValueError(f"alpha must be a positive number, of the size of the rank, got {alpha}")
    return float(alpha)
