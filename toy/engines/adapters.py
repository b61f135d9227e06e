"""LoRA adapters as the weights of an engine: which matrices get them, how they start, what dropout hides from them."""

import numbers
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from toy.adamw import AdamW
from toy.config import ModelConfig, RecipeOptions, check_positive_int
from toy.engines.weights import Dropout, Fill, Weights
from toy.files.gguf_write import digest
from toy.models.architectures import architecture_of
from toy.models.lora import scale_of
from toy.models.parameters import Shapes, initialize_array
from toy.quantized import Leaf

# what may be corrected, in the words of the paper and the command line, and the parameters that this means
TARGETS = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip
MATRICES = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "qkv": "attn_qkv", **TARGETS, "output": "output"}
GROUPS = {
    "all": tuple(name for name in MATRICES if name != "output"),
    "attention": ("q", "k", "v", "qkv", "o"),
    "mlp": ("gate", "up", "down"),
}
# matrices that read the same rows: dropout hides the same of them from all of these
_READ_TOGETHER = {"attn_k": "attn_q", "attn_v": "attn_q", "ffn_up": "ffn_gate"}


@dataclass(frozen=True)
class AdapterOptions:
    """What adapters are to be like. Raises ValueError for a value out of range and for unknown targets.

    rank, alpha: the correction is scaled by alpha / rank (None: by 1; with rslora alpha is the rank, too). targets: some of
    `MATRICES` and `GROUPS`, of which a group means those that the model has; None: q, or qkv where q is a part of it.
    last_layers: only the last so many blocks get adapters, None = all. rslora: scale by alpha / sqrt(rank). dropout: the
    share of its inputs that a correction does not see, at random, in every pass of the training.
    """

    rank: int
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    last_layers: int | None = None
    rslora: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", check_positive_int("rank", self.rank))
        object.__setattr__(self, "alpha", check_alpha(self.alpha, self.rank))
        object.__setattr__(self, "targets", None if self.targets is None else check_targets(self.targets))
        if self.last_layers is not None:
            object.__setattr__(self, "last_layers", check_positive_int("last_layers", self.last_layers))
        if not (isinstance(self.dropout, numbers.Real) and 0 <= self.dropout < 1):
            raise ValueError(f"dropout must be a share of at least 0 and below 1, got {self.dropout!r}")

    @property
    def scale(self) -> float:
        """What the product of the adapters is multiplied by."""
        return scale_of(check_alpha(self.alpha, self.rank), self.rank, self.rslora)

    def record(self, config: ModelConfig) -> dict[str, Any]:
        """What the config of saved adapters says of them; what an older one does not say is at its default."""
        record = {"rank": self.rank, "alpha": self.alpha, "targets": list(targets_of(config, self.targets))}
        if self.rslora:
            record["rslora"] = True
        if self.last_layers is not None:
            record["last_layers"] = self.last_layers
        return record


def adapter_weights(
    config: ModelConfig, base: dict[str, Leaf], adapters: AdapterOptions, options: RecipeOptions
) -> Weights:
    """The `Weights` of a LoRA: base is frozen (dict of names to leaves), the adapters are trained. Errors as
    `toy.recipes.LoRA.realize`."""
    shapes = adapter_shapes(config, adapters)
    return Weights(
        own=shapes,
        fill=adapter_fill(options.seed, options.init_scale),
        borrowed=base,
        model_options={"lora_scale": adapters.scale},
        hp_mode=AdamW.MODE_LORA,
        dropout=_dropout(shapes, adapters.dropout, options.seed) if adapters.dropout else None,
    )


def adapters_to_save(
    path: str | Path, base: dict[str, Leaf], config: ModelConfig, adapters: AdapterOptions
) -> dict[str, Any]:
    """What the config of saved adapters says. path: of the GGUF file they are for. base: its leaves by name."""
    return {
        "recipe": "lora",
        "base": {"path": str(Path(path).absolute()), "digest": digest(base)},
        "lora": adapters.record(config),
    }


def adapter_shapes(config: ModelConfig, adapters: AdapterOptions) -> Shapes:
    """dict of the adapters' names to their shapes."""
    row = architecture_of(config)
    matrices, rank = row.model.parameter_shapes(config), adapters.rank
    names = [MATRICES[target] for target in targets_of(config, adapters.targets)]
    n_layers = getattr(config, "n_layers", 0)
    if adapters.last_layers is not None and adapters.last_layers > n_layers:
        raise ValueError(
            f"last_layers must be at most {n_layers}, the layers of this model, got {adapters.last_layers}"
        )
    first = 0 if adapters.last_layers is None else n_layers - adapters.last_layers
    stems = [f"blk.{layer}.{name}" for layer in range(first, n_layers) for name in names if name != "output"]
    shapes: Shapes = {}
    for stem in stems + ["output"] * ("output" in names):
        n_out, n_in = matrices[f"{stem}.weight"]
        shapes |= {f"{stem}.lora_a": (rank, n_in), f"{stem}.lora_b": (n_out, rank)}
    return shapes


def adapter_fill(seed: int, init_scale: float = 1.0) -> Fill:
    """The `fill` of adapters: A from a normal distribution with variance 1/(3 in), B zero. Each tensor has its own stream."""

    def fill(name: str, out: np.ndarray) -> None:
        std = "zeros" if name.endswith("lora_b") else (3 * out.shape[1]) ** -0.5
        initialize_array(name, out, std, seed, init_scale)

    return fill


def check_targets(targets: Iterable[str], there: Iterable[str] = tuple(MATRICES)) -> tuple[str, ...]:
    """The targets, each once, groups first and matrices in the order of `MATRICES`. there: the matrices of a model. Raises
    ValueError for unknown ones and for none."""
    targets = list(targets) if isinstance(targets, Iterable) and not isinstance(targets, str) else [targets]
    known = (*GROUPS, *there)
    unknown = [target for target in targets if target not in known]
    if unknown or not targets:
        given = f"{unknown[0]!r} is not one" if unknown else "none was given"
        if unknown and unknown[0] == "output":
            given += ", because this model's output matrix is its token embedding, which llama.cpp takes no adapter for"
        raise ValueError(f"targets must be some of {', '.join(there)}: {given} (groups of them: {', '.join(GROUPS)})")
    return tuple(name for name in known if name in targets)


def targets_of(config: ModelConfig, targets: Iterable[str] | None) -> tuple[str, ...]:
    """The matrices that the targets mean in a model of this config, in the order of `MATRICES`; None: those of the default.

    Raises ValueError for a matrix that it does not have, and for a model that no adapters can be put on.
    """
    row = architecture_of(config)
    if not row.in_gguf:
        raise ValueError(f"LoRA needs a model that can be in a GGUF file, and a {row.name} cannot")
    shapes = row.model.parameter_shapes(config)
    there = [name for name, stem in MATRICES.items() if f"{stem}.weight" in shapes or f"blk.0.{stem}.weight" in shapes]
    if targets is None:
        return ("q",) if "q" in there else ("qkv",)
    chosen: set[str] = set()
    for target in check_targets(targets, there):
        chosen |= set(GROUPS.get(target, (target,))) & set(there)
    return tuple(name for name in MATRICES if name in chosen)


def check_alpha(alpha: float | None, rank: int) -> float:
    """alpha as a float (None: rank). Raises ValueError unless it is a positive number whose share alpha / rank a float32
    can hold."""
    alpha = rank if alpha is None else alpha
    if not (isinstance(alpha, numbers.Real) and 1e-30 < alpha / rank < 1e30):
        raise ValueError(f"alpha must be a positive number, of the size of the rank, got {alpha}")
    return float(alpha)


def _dropout(shapes: Shapes, share: float, seed: int) -> Dropout:
    """The `Dropout` of adapters of these shapes: what reads the same rows shares a mask."""
    masks, widths = {}, {}
    for name, shape in shapes.items():
        stem, _, kind = name.rpartition(".")
        if kind == "lora_a":
            *block, matrix = stem.rsplit(".", 1)
            key = ".".join([*block, _READ_TOGETHER.get(matrix, matrix)])
            masks[f"{stem}.lora_mask"], widths[key] = key, shape[1]
    return Dropout(masks, widths, share, seed)
