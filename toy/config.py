"""What a model looks like (one frozen dataclass a model) and how a recipe is built (`RecipeOptions`).

Every value is checked when the object is made: a config that exists is one that can be realized.
"""

import array
import math
from dataclasses import dataclass, fields
from typing import SupportsIndex

VERSION = "0.1.0"  # of the package: pyproject.toml reads it here


MOST_LAYERS = 10_000  # of a model: more are a mistake, and even their names would take minutes


def check_layers(n_layers: int) -> None:
    """Raise ValueError for more layers than any model has."""
    if n_layers > MOST_LAYERS:
        raise ValueError(f"n_layers must be at most {MOST_LAYERS:,}, got a number of {len(str(n_layers))} digits")


def check_positive_int(name: str, value: SupportsIndex) -> int:
    """`value` as a Python int. Raises ValueError (naming `name`) unless it is an integer of at least 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if value.__index__() < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value.__index__()


@dataclass(frozen=True)
class TransformerConfig:
    """The readable TransformerLM: RMSNorm, causal attention, GELU MLP, no biases, learned positions, tied embedding.

    d_model: width of the residual stream; d_ff: hidden width of the MLP; context_length: longest sequence, in tokens.
    Raises ValueError for a value below 1, more than `MOST_LAYERS`, and for heads that do not divide the width.
    """

    vocab_size: int
    d_model: int
    n_heads: int
    d_ff: int
    n_layers: int
    context_length: int

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_heads", "d_ff", "n_layers", "context_length"):
            object.__setattr__(self, name, check_positive_int(name, getattr(self, name)))
        check_layers(self.n_layers)
        _check_heads(self.d_model, self.n_heads)

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_heads


@dataclass(frozen=True)
class GPT2Config(TransformerConfig):
    """GPT-2 (Radford et al. 2019): LayerNorm with bias, biases everywhere, GELU(tanh), learned positions, tied embedding.

    The fields and errors are those of `TransformerConfig`.
    """


ROPE_SCALINGS = ("none", "linear", "yarn")
_FACTORS = ("rope_scale", "rope_attn_factor", "embedding_scale", "residual_scale", "logit_scale")


@dataclass(frozen=True)
class LlamaConfig:
    """Llama (Touvron et al. 2023): RMSNorm, RoPE, grouped-query attention, SwiGLU, no biases; and its many relatives, which
    differ from it by the fields after head_dim.

    n_kv_heads: key/value heads, a divisor of n_heads (fewer than n_heads: grouped-query attention). head_dim: None =
    d_model / n_heads. rope_base: of the rotation frequencies. rms_eps: added to the mean square.

    untied: an output matrix of its own instead of the embedding. qkv_bias, attn_output_bias, mlp_bias: biases on the query,
    key and value projections, on the one after attention, on the three of the MLP. qk_norm: an RMSNorm on every head's query
    and key (Qwen 3).

    rope_halves: RoPE turns the pairs (i, i + head_dim/2) of a head (Qwen), not (2i, 2i+1). rope_skips: every so many-th layer
    goes without RoPE (SmolLM3: 4), 0 = none. rope_factors: head_dim/2 numbers that divide the frequencies (Llama 3.1).
    rope_scaling: "none", "linear" or "yarn", how the angles are stretched for a context rope_scale times as long as that of
    training, which for yarn is rope_original_context (None: context_length). rope_attn_factor: multiplies what was turned.
    yarn_log_multiplier: how much of yarn's sharper attention is taken back (Mistral 3: 1, all of it).

    embedding_scale, residual_scale: multiply the embeddings, and what a block adds to the residual stream. logit_scale:
    divides the logits. attention_scale: multiplies the scores, None = 1 / sqrt(head_dim) (Granite).

    geglu: GELU in place of SiLU in the MLP. post_norms: an RMSNorm on what attention and MLP add to the residual stream.
    attention_softcap, logit_softcap: bounds of the scores and of the logits, reached through a tanh, None = none.
    sliding_window: of a token's predecessors and itself, attention sees the last so many, None = all; every
    window_pattern-th layer sees all (0 = none does). rope_local_base: rope_base of the layers with a window, where RoPE is
    not scaled, None = as the others (Gemma 2 and 3). no_pre_norms: attention and MLP read the residual stream as it is.
    qk_norm_together: qk_norm is one norm over all heads (OLMo 2).

    Raises ValueError for a value below 1, heads that do not divide, an odd head_dim (RoPE turns pairs), and numbers that are
    not above 0.
    """

    vocab_size: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_ff: int
    n_layers: int
    context_length: int
    rope_base: float = 10000.0
    rms_eps: float = 1e-5
    head_dim: int | None = None
    untied: bool = False
    qkv_bias: bool = False
    attn_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rope_halves: bool = False
    rope_skips: int = 0
    rope_factors: tuple[float, ...] | None = None
    rope_scaling: str = "none"
    rope_scale: float = 1.0
    rope_original_context: int | None = None
    rope_attn_factor: float = 1.0
    yarn_log_multiplier: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    attention_scale: float | None = None
    geglu: bool = False
    post_norms: bool = False
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    sliding_window: int | None = None
    window_pattern: int = 0
    rope_local_base: float | None = None
    no_pre_norms: bool = False
    qk_norm_together: bool = False

    def __post_init__(self) -> None:
        names = ("vocab_size", "d_model", "n_heads", "n_kv_heads", "d_ff", "n_layers", "context_length")
        for name in names:
            object.__setattr__(self, name, check_positive_int(name, getattr(self, name)))
        check_layers(self.n_layers)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads must divide n_heads: {self.n_heads} / {self.n_kv_heads} is not whole")
        if self.head_dim is None:
            _check_heads(self.d_model, self.n_heads)
            object.__setattr__(self, "head_dim", self.d_model // self.n_heads)
        else:
            object.__setattr__(self, "head_dim", check_positive_int("head_dim", self.head_dim))
        if self.d_head % 2:
            raise ValueError(f"head_dim must be even, because RoPE turns pairs: got {self.head_dim}")
        for name in ("rope_base", "rms_eps", *_FACTORS):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)!r}")
        for name in ("attention_scale", "attention_softcap", "logit_softcap", "rope_local_base"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number or None, got {value!r}")
        for name in ("rope_skips", "window_pattern"):
            value = getattr(self, name)
            if isinstance(value, bool) or not hasattr(value, "__index__") or value < 0:
                raise ValueError(f"{name} must be a whole number of at least 0, got {value!r}")
        if self.qk_norm_together and not self.qk_norm:
            raise ValueError("qk_norm_together is a kind of qk_norm: set both, or neither")
        if self.sliding_window is not None:
            object.__setattr__(self, "sliding_window", check_positive_int("sliding_window", self.sliding_window))
        self._check_rope()

    def _check_rope(self) -> None:
        if self.rope_factors is not None:
            factors = tuple(array.array("f", self.rope_factors))  # rounded as in a file
            if len(factors) != self.d_head // 2 or not all(math.isfinite(f) and f > 0 for f in factors):
                raise ValueError(
                    f"rope_factors must be {self.d_head // 2} positive numbers, one for each pair of a head, "
                    f"got {str(self.rope_factors)[:60]}"
                )
            object.__setattr__(self, "rope_factors", factors)
        if self.rope_scaling not in ROPE_SCALINGS:
            raise ValueError(f"rope_scaling must be one of {', '.join(ROPE_SCALINGS)}, got {self.rope_scaling!r}")
        # one way to say each thing: a scale of 1 is no scaling, and only yarn asks what context there was
        if self.rope_scaling == "none" or self.rope_scale == 1:
            object.__setattr__(self, "rope_scaling", "none")
            object.__setattr__(self, "rope_scale", 1.0)
        if not (math.isfinite(self.yarn_log_multiplier) and self.yarn_log_multiplier >= 0):
            raise ValueError(f"yarn_log_multiplier must be a number of at least 0, got {self.yarn_log_multiplier!r}")
        context = None
        if self.rope_scaling != "yarn":
            object.__setattr__(self, "yarn_log_multiplier", 0.0)
        else:
            context = check_positive_int("rope_original_context", self.rope_original_context or self.context_length)
            if self.rope_base == 1:
                raise ValueError("rope_base must not be 1 with yarn: all pairs would turn alike")
        object.__setattr__(self, "rope_original_context", context)

    @property
    def d_head(self) -> int:
        return self.head_dim or self.d_model // self.n_heads


@dataclass(frozen=True)
class ViTConfig:
    """A vision transformer (Dosovitskiy et al. 2021): patches as a linear layer, class token, learned positions, pre-norm
    blocks, a linear head.

    image_size: height and width in pixels. channels: numbers of a pixel. patch_size: height and width of a patch in pixels.
    d_model, n_heads, d_ff, n_layers: as in `TransformerConfig`. n_classes: what an image is one of.
    Raises ValueError for a value below 1, for patches that do not fill the image, and for heads that do not divide the width.
    """

    image_size: int
    channels: int
    patch_size: int
    d_model: int
    n_heads: int
    d_ff: int
    n_layers: int
    n_classes: int

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, check_positive_int(field.name, getattr(self, field.name)))
        check_layers(self.n_layers)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size must divide image_size: {self.image_size} / {self.patch_size} leaves "
                f"{self.image_size % self.patch_size} pixels; it could be {_divisors_near(self.image_size, self.patch_size)}"
            )
        _check_heads(self.d_model, self.n_heads)

    @property
    def n_patches(self) -> int:
        """Patches in an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def n_tokens(self) -> int:
        """Tokens of an image: its patches and the class token."""
        return self.n_patches + 1

    @property
    def context_length(self) -> int:
        """`n_tokens`, the `t_seq` of its `RecipeOptions`: an image has no shorter sequence."""
        return self.n_tokens

    @property
    def patch_numbers(self) -> int:
        """Numbers in a patch."""
        return self.patch_size**2 * self.channels

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_heads


LanguageModelConfig = TransformerConfig | LlamaConfig  # a GPT2Config is a TransformerConfig
ModelConfig = LanguageModelConfig | ViTConfig  # of any model

WEIGHT_DTYPES = ("f32", "f16", "bf16")
PRECISIONS = ("f32", "bf16")


@dataclass(frozen=True)
class RecipeOptions:
    """How a recipe is realized, whatever the model.

    t_seq: tokens in a training sequence (at most the model's context). t_batch: sequences in a forward and backward pass.
    accumulate: how many such passes make a step: a step takes accumulate * t_batch sequences in the memory of t_batch, and
    its loss and gradient are those of all of them in one batch.
    weight_dtype: "f32", or "f16" / "bf16" for compute copies rounded from the f32 masters after every update.
    untied, qkv_bias: options of models that have them. seed: of the initialisation. init_scale: multiplies its
    standard deviations. grad_clip: largest L2 norm of the whole gradient (longer ones are scaled down), None = off.
    recompute: of how many blocks, from the first on, the backward runs the forward again, so that their activations need not
    be kept: the same numbers in less memory, for the time of a second forward. True: all but the last, which are used at
    once; None: as many as it takes to fit into memory.
    precision: of the products of the linear layers and of the unembedding, forward and backward, in training and evaluation:
    "f32"; or "bf16", both operands of a product rounded to bfloat16 and its sums in float32, on processors that multiply so
    faster. All else stays float32: weights, gradients, moments, attention, norms and the loss (PyTorch's autocast also rounds
    the results of these products, and the products of attention).
    Raises ValueError for a value out of range.
    """

    t_seq: int
    t_batch: int = 1
    weight_dtype: str = "f32"
    untied: bool = False
    qkv_bias: bool = False
    seed: int = 0
    init_scale: float = 1.0
    grad_clip: float | None = None
    accumulate: int = 1
    recompute: int | None = None
    precision: str = "f32"

    def __post_init__(self) -> None:
        for name in ("t_seq", "t_batch", "accumulate"):
            object.__setattr__(self, name, check_positive_int(name, getattr(self, name)))
        if self.recompute is not None and not (hasattr(self.recompute, "__index__") and self.recompute >= 0):
            raise ValueError(f"recompute must be True, False, a number of blocks or None, got {self.recompute!r}")
        if self.weight_dtype not in WEIGHT_DTYPES:
            raise ValueError(f"weight_dtype must be one of {', '.join(WEIGHT_DTYPES)}, got {self.weight_dtype!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if isinstance(self.seed, bool) or not hasattr(self.seed, "__index__") or self.seed.__index__() < 0:
            raise ValueError(f"seed must be a whole number of at least 0, got {self.seed!r}")
        object.__setattr__(self, "seed", self.seed.__index__())
        if not (math.isfinite(self.init_scale) and self.init_scale > 0):
            raise ValueError(f"init_scale must be a positive number, got {self.init_scale!r}")
        if self.grad_clip is not None and not (math.isfinite(self.grad_clip) and self.grad_clip > 0):
            raise ValueError(f"grad_clip must be a positive number or None, got {self.grad_clip!r}")


def _check_heads(d_model: int, n_heads: int) -> None:
    if d_model % n_heads:
        raise ValueError(
            f"n_heads must divide d_model: {d_model} / {n_heads} leaves {d_model % n_heads}; "
            f"divisors near it are {_divisors_near(d_model, n_heads)}"
        )


def _divisors_near(number: int, wanted: int) -> str:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0] if number < 2**40 else [1]
    divisors = sorted({*small, *(number // d for d in small)})
    return ", ".join(str(d) for d in sorted(sorted(divisors, key=lambda d: abs(d - wanted))[:4]))
