"""Llama (Touvron et al. 2023): the forward pass and its backward, op by op.

    x = E[token]
    per block:  x = x + W_output attention(rope(W_q h), rope(W_k h), W_v h),   h = RMSNorm(x)
                x = x + W_down (silu(W_gate h) * W_up h),                      h = RMSNorm(x)
    logits = RMSNorm(x) W_out^T                (W_out = E when tied)

The parameters carry their GGUF names. Letters in the shapes: N = B*T rows, D = d_model, F = d_ff, V = vocab_size,
H = n_heads, G = n_kv_heads. Every matrix goes through `project`, where a bias and LoRA adapters may join.

Its relatives (Qwen, Granite, Gemma, ...) are this model with fields of the config set. What such a field adds stands in
`place` (queries and keys before attention), `leave` (what goes to the residual stream) and `scaled`; on a plain Llama they do
nothing but RoPE.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from toy.adamw import AdamW
from toy.config import ROPE_SCALINGS, LlamaConfig
from toy.models import lens
from toy.models.base import KeyValueCache, LanguageModel
from toy.models.gguf_form import PLAIN, SIZES, UNSCALED, Form, Key
from toy.models.lora import project, project_backward
from toy.models.parameters import Block, GradientTree, Namespace, ParameterTree, Shapes, Stds, residual_stream_stds
from toy.models.rotation import rotation
from toy.op_table import Array, OpCache


class PlaceCache(NamedTuple):
    norm: OpCache | None  # None: no qk_norm
    rope: OpCache | None  # None: a layer without RoPE


class BlockCache(NamedTuple):
    """What one block's backward needs: the cache of each op, in forward order."""

    attn_norm: OpCache | None  # None: no_pre_norms
    attn_q: OpCache
    attn_k: OpCache
    attn_v: OpCache
    place_q: PlaceCache
    place_k: PlaceCache
    attention: OpCache
    attn_output: OpCache
    ffn_norm: OpCache | None
    ffn_gate: OpCache
    ffn_up: OpCache
    gated: OpCache
    ffn_down: OpCache
    post_attention_norm: OpCache | None  # None: no post_norms
    post_ffw_norm: OpCache | None


class UnembedCache(NamedTuple):
    norm: OpCache
    linear: OpCache
    softcap: OpCache | None  # None: no logit_softcap


class Llama(LanguageModel):
    """Llama of any size, made from a `LlamaConfig`. The other arguments are those of `LanguageModel`."""

    arch = "llama"
    hp_mode = AdamW.MODE_FROM_SCRATCH
    config: LlamaConfig

    def __init__(self, config: LlamaConfig, seed: int = 0, **options: Any) -> None:
        super().__init__(config, seed, **options)
        self.rotations = {windowed: rotation(config, windowed) for windowed in (False, True)}
        # the op `attention` divides by the root of d_head: what q is multiplied with for another scale
        self.query_scale = 1.0 if config.attention_scale is None else config.attention_scale * config.d_head**0.5

    @staticmethod
    def parameter_shapes(c: LlamaConfig) -> Shapes:
        """dict of parameter names to shapes; matrices are (out, in)."""
        d, h, k = c.d_model, c.n_heads * c.d_head, c.n_kv_heads * c.d_head
        shapes: Shapes = {"token_embd.weight": (c.vocab_size, d)}
        for i in range(c.n_layers):
            shapes |= {
                f"blk.{i}.attn_norm.weight": (d,),
                f"blk.{i}.attn_q.weight": (h, d),
                f"blk.{i}.attn_k.weight": (k, d),
                f"blk.{i}.attn_v.weight": (k, d),
                f"blk.{i}.attn_output.weight": (d, h),
                f"blk.{i}.ffn_norm.weight": (d,),
                f"blk.{i}.ffn_gate.weight": (c.d_ff, d),
                f"blk.{i}.ffn_up.weight": (c.d_ff, d),
                f"blk.{i}.ffn_down.weight": (d, c.d_ff),
            }
            if c.qkv_bias:
                shapes |= {f"blk.{i}.attn_{n}.bias": (h if n == "q" else k,) for n in "qkv"}
            if c.attn_output_bias:
                shapes[f"blk.{i}.attn_output.bias"] = (d,)
            if c.mlp_bias:
                shapes |= {f"blk.{i}.ffn_{n}.bias": (d if n == "down" else c.d_ff,) for n in ("gate", "up", "down")}
            if c.no_pre_norms:
                del shapes[f"blk.{i}.attn_norm.weight"], shapes[f"blk.{i}.ffn_norm.weight"]
            if c.qk_norm:
                widths = {"q": h, "k": k} if c.qk_norm_together else {"q": c.d_head, "k": c.d_head}
                shapes |= {f"blk.{i}.attn_{n}_norm.weight": (width,) for n, width in widths.items()}
            if c.post_norms:
                shapes |= {f"blk.{i}.{name}.weight": (d,) for name in ("post_attention_norm", "post_ffw_norm")}
        shapes["output_norm.weight"] = (d,)
        if c.untied:
            shapes["output.weight"] = (c.vocab_size, d)
        return shapes

    @staticmethod
    def parameter_stds(config: LlamaConfig) -> Stds:
        """Normal(0, 0.02), residual projections scaled by 1/sqrt(2 n_layers), gains 1, biases 0 (as GPT-2)."""
        return residual_stream_stds(Llama.parameter_shapes(config), config.n_layers)

    def head(self, tree: ParameterTree) -> tuple[Any, Any]:
        """The node with the output matrix in a parameter or gradient tree, and its lens (None: it has none)."""
        if self.config.untied:
            return tree.output, None
        return tree.token_embd, tree.output.lens if hasattr(tree, "output") else None

    # -- forward ------------------------------------------------------------------------------------------------------

    def embed(self, token_ids: Array) -> tuple[Array, OpCache]:
        """token_ids: int (N,) -> x (N, D), cache. The positions come in with RoPE, in every block."""
        x, cache = lens.embed(self.ops, token_ids, self.parameters.token_embd, self.lora_scale)  # (N, D)
        return self.scaled(x, self.config.embedding_scale), cache

    def unembed_rows(self, x: Array) -> tuple[Array, UnembedCache]:
        """x: (N, D) -> logits (N, V), cache."""
        ops, p, c = self.ops, self.parameters, self.config
        x, norm = ops.rms_norm(x, p.output_norm.weight, c.rms_eps)  # (N, D)
        x = self.scaled(x, 1 / c.logit_scale)  # (N, D), which is less than the logits are
        logits, linear = lens.unembed(ops, x, *self.head(p), self.lora_scale)  # (N, V)
        softcap = None
        if c.logit_softcap is not None:
            logits, softcap = ops.softcap(logits, c.logit_softcap)  # (N, V)
        return logits, UnembedCache(norm, linear, softcap)

    def window(self, layer: int) -> int | None:
        """How many tokens the attention of a layer sees, None: all."""
        c = self.config
        sees_all = c.window_pattern > 0 and (layer + 1) % c.window_pattern == 0
        return None if sees_all else c.sliding_window

    def block_forward(
        self, layer: int, block: Block, x: Array, positions: Array, batch: int, kv_cache: KeyValueCache | None = None
    ) -> tuple[Array, BlockCache]:
        """x: (N, D) -> x (N, D), cache."""
        ops, c, scale = self.ops, self.config, self.lora_scale
        h, attn_norm = self.normed(x, getattr(block, "attn_norm", None))  # (N, D)
        q, attn_q = project(ops, h, block.attn_q, scale)  # (N, H*d_head)
        k, attn_k = project(ops, h, block.attn_k, scale)  # (N, G*d_head)
        v, attn_v = project(ops, h, block.attn_v, scale)  # (N, G*d_head)
        q, place_q = self.place(layer, q, getattr(block, "attn_q_norm", None), positions, c.n_heads)  # (N, H*d_head)
        k, place_k = self.place(layer, k, getattr(block, "attn_k_norm", None), positions, c.n_kv_heads)
        q = self.scaled(q, self.query_scale)  # (N, H*d_head)
        if kv_cache is not None:
            k, v = kv_cache.extend(layer, k, v)  # (T_past + T, G*d_head)
        a, attention = ops.attention(
            q, k, v, batch, c.n_heads, c.n_kv_heads, causal=True, window=self.window(layer), softcap=c.attention_softcap
        )  # (N, H*d_head)
        a, attn_output = project(ops, a, block.attn_output, scale)  # (N, D)
        a, post_attention_norm = self.leave(a, getattr(block, "post_attention_norm", None))  # (N, D)
        x = ops.add(x, a)  # (N, D)

        h, ffn_norm = self.normed(x, getattr(block, "ffn_norm", None))  # (N, D)
        gate, ffn_gate = project(ops, h, block.ffn_gate, scale)  # (N, F)
        up, ffn_up = project(ops, h, block.ffn_up, scale)  # (N, F)
        f, gated = ops.geglu(gate, up) if c.geglu else ops.swiglu(gate, up)  # (N, F)
        f, ffn_down = project(ops, f, block.ffn_down, scale)  # (N, D)
        f, post_ffw_norm = self.leave(f, getattr(block, "post_ffw_norm", None))  # (N, D)
        x = ops.add(x, f)  # (N, D)
        return x, BlockCache(
            attn_norm, attn_q, attn_k, attn_v, place_q, place_k, attention, attn_output,
            ffn_norm, ffn_gate, ffn_up, gated, ffn_down, post_attention_norm, post_ffw_norm,
        )  # fmt: skip

    def place(
        self, layer: int, x: Array, norm: Namespace | None, positions: Array, n_heads: int
    ) -> tuple[Array, PlaceCache]:
        """x: queries or keys (N, n_heads*d_head) -> the same with norm, head by head, and position (RoPE); cache."""
        ops, c, rope_cache = self.ops, self.config, None
        rows = x.shape[0]
        by_head = norm is not None and not c.qk_norm_together
        x = ops.reshape(x, rows * n_heads) if by_head else x  # (N*n_heads, d_head)
        x, norm_cache = self.normed(x, norm)
        x = ops.reshape(x, rows) if by_head else x
        if c.rope_skips == 0 or (layer + 1) % c.rope_skips:
            x, rope_cache = ops.rope(x, positions, n_heads, **self.rotations[self.window(layer) is not None])
        return x, PlaceCache(norm_cache, rope_cache)

    def leave(self, x: Array, norm: Namespace | None) -> tuple[Array, OpCache | None]:
        """x: (N, D), what attention or MLP gave -> what is added to the residual stream, cache."""
        x, cache = self.normed(x, norm)
        return self.scaled(x, self.config.residual_scale), cache

    def normed(self, x: Array, norm: Namespace | None) -> tuple[Array, OpCache | None]:
        """RMSNorm with the gain of `norm`, where there is one."""
        return (x, None) if norm is None else self.ops.rms_norm(x, norm.weight, self.config.rms_eps)

    def scaled(self, x: Array, factor: float) -> Array:
        return x if factor == 1 else self.ops.scale(x, factor)

    # -- backward: from the logits down -------------------------------------------------------------------------------

    def unembed_backward(self, d_logits: Array, cache: UnembedCache, grads: GradientTree) -> Array:
        """d_logits: (N, V) -> d_x (N, D). Adds to grads."""
        ops = self.ops
        if cache.softcap is not None:
            d_logits = ops.softcap_backward(d_logits, cache.softcap)  # (N, V)
        d_x = lens.unembed_backward(ops, d_logits, cache.linear, *self.head(grads), self.lora_scale)  # (N, D)
        d_x = self.scaled(d_x, 1 / self.config.logit_scale)  # (N, D)
        return ops.rms_norm_backward(d_x, cache.norm, grads.output_norm.weight)  # (N, D)

    def block_backward(self, d_x: Array, cache: BlockCache, grads: Block) -> Array:
        """d_x: gradient of the block's output (N, D) -> gradient of its input (N, D). Adds to grads."""
        ops, c, scale = self.ops, self.config, self.lora_scale
        d_f = self.leave_backward(d_x, cache.post_ffw_norm, getattr(grads, "post_ffw_norm", None))  # (N, D)
        d_f = project_backward(ops, d_f, cache.ffn_down, grads.ffn_down, scale)  # (N, F)
        d_gate, d_up = (ops.geglu_backward if c.geglu else ops.swiglu_backward)(d_f, cache.gated)  # (N, F) each
        d_h = project_backward(ops, d_gate, cache.ffn_gate, grads.ffn_gate, scale)  # (N, D)
        d_h = ops.add(d_h, project_backward(ops, d_up, cache.ffn_up, grads.ffn_up, scale))  # h was read twice
        d_h = self.normed_backward(d_h, cache.ffn_norm, getattr(grads, "ffn_norm", None))  # (N, D)
        d_x = ops.add(d_x, d_h)  # the residual stream and the branch

        d_a = self.leave_backward(d_x, cache.post_attention_norm, getattr(grads, "post_attention_norm", None))  # (N, D)
        d_a = project_backward(ops, d_a, cache.attn_output, grads.attn_output, scale)  # (N, H*d_head)
        d_q, d_k, d_v = ops.attention_backward(d_a, cache.attention)  # (N, H*d_head), (N, G*d_head), (N, G*d_head)
        d_q = self.scaled(d_q, self.query_scale)  # (N, H*d_head)
        d_q = self.place_backward(d_q, cache.place_q, getattr(grads, "attn_q_norm", None), c.n_heads)  # (N, H*d_head)
        d_k = self.place_backward(d_k, cache.place_k, getattr(grads, "attn_k_norm", None), c.n_kv_heads)
        d_h = project_backward(ops, d_q, cache.attn_q, grads.attn_q, scale)  # (N, D)
        d_h = ops.add(d_h, project_backward(ops, d_k, cache.attn_k, grads.attn_k, scale))  # h was read three times
        d_h = ops.add(d_h, project_backward(ops, d_v, cache.attn_v, grads.attn_v, scale))
        d_h = self.normed_backward(d_h, cache.attn_norm, getattr(grads, "attn_norm", None))  # (N, D)
        return ops.add(d_x, d_h)

    def place_backward(self, d_x: Array, cache: PlaceCache, norm: Namespace | None, n_heads: int) -> Array:
        """d_x: gradient of what `place` gave (N, n_heads*d_head) -> that of what it was given. norm: of the gradients."""
        ops = self.ops
        if cache.rope is not None:
            d_x = ops.rope_backward(d_x, cache.rope)
        rows = d_x.shape[0]
        by_head = norm is not None and not self.config.qk_norm_together
        d_x = ops.reshape(d_x, rows * n_heads) if by_head else d_x  # (N*n_heads, d_head)
        d_x = self.normed_backward(d_x, cache.norm, norm)
        return ops.reshape(d_x, rows) if by_head else d_x

    def leave_backward(self, d_x: Array, cache: OpCache | None, norm: Namespace | None) -> Array:
        """d_x: gradient of what `leave` gave (N, D) -> that of what it was given. norm: of the gradients."""
        return self.normed_backward(self.scaled(d_x, self.config.residual_scale), cache, norm)

    def normed_backward(self, d_x: Array, cache: OpCache | None, norm: Namespace | None) -> Array:
        return d_x if norm is None else self.ops.rms_norm_backward(d_x, cache, norm.weight)

    def embed_backward(self, d_x: Array, cache: OpCache, grads: GradientTree) -> None:
        """d_x: gradient of what `embed` gave (N, D). Adds to grads."""
        d_x = self.scaled(d_x, self.config.embedding_scale)  # (N, D)
        # tied: the second contribution
        lens.embed_backward(self.ops, d_x, cache, grads.token_embd, self.lora_scale)

    # -- the head and the loss in one, without all logits at a time: for training -------------------------------------

    def loss_rows(self, x: Array, labels: Array, grads: GradientTree | None) -> tuple[float, Array | None]:
        """x: (N, D) -> the mean loss, d_x (N, D): `unembed_rows`, cross-entropy and the backward of both.

        Adds to grads; grads None: the loss alone, None for d_x.
        """
        ops, p, c = self.ops, self.parameters, self.config
        x, norm_cache = ops.rms_norm(x, p.output_norm.weight, c.rms_eps)  # (N, D)
        x = self.scaled(x, 1 / c.logit_scale)  # (N, D)
        d_head = None if grads is None else self.head(grads)
        loss, d_x = lens.unembed_loss(ops, x, self.head(p), labels, c.logit_softcap, d_head, self.lora_scale)
        if grads is None:
            return loss, None
        d_x = self.scaled(d_x, 1 / c.logit_scale)  # (N, D)
        return loss, ops.rms_norm_backward(d_x, norm_cache, grads.output_norm.weight)  # (N, D)


# -- in GGUF files ----------------------------------------------------------------------------------------------------


def _width_of_a_head(sizes: Mapping[str, int]) -> int:
    if sizes["d_model"] % sizes["n_heads"]:
        raise ValueError(f"{sizes['n_heads']} heads do not divide a width of {sizes['d_model']}")
    return sizes["d_model"] // sizes["n_heads"]


def _heads_fill_the_width(config: LlamaConfig) -> bool:
    return config.n_heads * config.d_head == config.d_model


def _before_the_temperature(get: Callable[[str], Any]) -> int | None:
    """Mistral 3 sharpens the attention of queries that stand after the original context, with a temperature: not here."""
    return get("rope.scaling.original_context_length") if get("attention.temperature_scale") else None


def _root_of_the_width(c: LlamaConfig) -> float:
    return math.sqrt(c.d_model)


def _scale_of_gemma(layers_of_27b: int, c: LlamaConfig) -> float | None:
    """llama.cpp knows Gemma's largest model by its layers."""
    return (c.d_model // c.n_heads) ** -0.5 if c.n_layers == layers_of_27b else None


def _is_scaled(config: LlamaConfig) -> bool:
    return config.rope_scaling != "none"


_SIZES = (
    *SIZES,
    Key("n_kv_heads", "attention.head_count_kv", default=lambda sizes: sizes["n_heads"]),
    Key("head_dim", "attention.key_length", default=_width_of_a_head, unless=_heads_fill_the_width),
    Key("head_dim", "attention.value_length", says="heads of", unless=_heads_fill_the_width),
    Key("head_dim", "rope.dimension_count", says="heads of"),
    Key("rope_base", "rope.freq_base", number=True, default=10000.0),
    Key("rms_eps", "attention.layer_norm_rms_epsilon", number=True),
)
# a factor alone means linear scaling
_SCALED_ROPE = (
    Key("rope_scaling", "rope.scaling.type", words=ROPE_SCALINGS, default="linear", unless=lambda c: not _is_scaled(c)),
    Key(
        "rope_scale", "rope.scaling.factor", number=True, default=1.0, zero=True, formerly="rope.scale_linear",
        unless=lambda c: not _is_scaled(c),
    ),
    Key(
        "rope_original_context", "rope.scaling.original_context_length", default=lambda sizes: sizes["context_length"],
        unless=lambda c: c.rope_original_context is None,
    ),
    Key("rope_attn_factor", "rope.scaling.attn_factor", number=True, default=1.0, unless=lambda c: c.rope_attn_factor == 1),
)  # fmt: skip
_SCALES = (
    Key("logit_scale", "logit_scale", number=True),
    Key("residual_scale", "residual_scale", number=True, default=1.0, zero=True),
    Key("embedding_scale", "embedding_scale", number=True, default=1.0, zero=True),
    Key(
        "attention_scale",
        "attention.scale",
        number=True,
        default=None,
        zero=True,
        unless=lambda c: c.attention_scale is None,
    ),
)
_LOG_MULTIPLIER = Key(
    "yarn_log_multiplier", "rope.scaling.yarn_log_multiplier", number=True, default=0.0, zero=True,
    unless=lambda c: c.yarn_log_multiplier == 0,
)  # fmt: skip
_LOCAL_BASE = Key("rope_local_base", "rope.freq_base_swa", number=True, default=10000.0)
_LOGIT_CAP = Key(
    "logit_softcap", "final_logit_softcapping", number=True, default=None, zero=True,
    unless=lambda c: c.logit_softcap is None,
)  # fmt: skip
_CAPS = (
    Key("attention_softcap", "attn_logit_softcapping", number=True, default=50.0),
    Key("logit_softcap", "final_logit_softcapping", number=True, default=30.0),
)
_QKV_BIAS = {"untied": "output.weight", "qkv_bias": "blk.*.attn_[qkv].bias"}
_EVERY_BIAS = _QKV_BIAS | {"attn_output_bias": "blk.*.attn_output.bias", "mlp_bias": "blk.*.ffn_*.bias"}
_FREQUENCIES = {"rope_factors": "rope_freqs.weight"}


def _windows(pattern: int, window: int | None) -> tuple[Key, ...]:
    """The keys of an architecture with sliding windows; pattern, window: what they are where the file does not say."""
    return (
        Key(
            "window_pattern", "attention.sliding_window_pattern", default=pattern,
            unless=lambda c: c.window_pattern == pattern,
        ),
        Key(
            "sliding_window", "attention.sliding_window", default=window, zero=window is None,
            unless=lambda c: c.sliding_window is None,
        ),
        Key("head_dim", "attention.key_length_swa", says="heads of", unless=lambda c: True),
        Key("head_dim", "attention.value_length_swa", says="heads of", unless=lambda c: True),
        Key("head_dim", "rope.dimension_count_swa", says="heads of", unless=lambda c: True),
    )  # fmt: skip


def _form(name: str, keys: tuple[Key, ...] = _SCALED_ROPE, tensors: dict[str, str] = _QKV_BIAS, **more: Any) -> Form:
    """A form of this model: what neither keys, nor tensors, nor fixed and vectors in `more` say is as in a plain Llama."""
    keys = (*_SIZES, *keys)
    said = (
        {key.field for key in keys} | tensors.keys() | more.get("vectors", {}).keys() | more.get("derived", {}).keys()
    )
    plain = {f.name: f.default for f in dataclasses.fields(LlamaConfig) if f.default is not dataclasses.MISSING}
    fixed = {field: value for field, value in plain.items() if field not in said} | more.pop("fixed", {})
    return Form(name, keys=keys, tensors=tensors, fixed=fixed, **{"harmless": PLAIN} | more)


GGUF_FORMS = (
    _form("llama", tensors=_EVERY_BIAS, vectors=_FREQUENCIES),
    _form("qwen2", fixed={"rope_halves": True}, only=_heads_fill_the_width, typical={"qkv_bias": True}),
    _form("qwen3", fixed={"rope_halves": True, "qk_norm": True}, typical={}),
    # Granite files without RoPE say so by this key
    _form(
        "granite", keys=(*_SCALED_ROPE, *_SCALES), tensors=_EVERY_BIAS, vectors=_FREQUENCIES,
        harmless=PLAIN | {"rope.scaling.finetuned": (True,)},
        typical={"embedding_scale": 12.0, "residual_scale": 0.22, "logit_scale": 8.0},
    ),
    _form("smollm3", fixed={"rope_skips": 4}, typical={}),
    _form(
        "gemma2", keys=(_SCALED_ROPE[-1], *_windows(2, 4096), *_CAPS), tensors={},
        fixed={"rope_halves": True, "geglu": True, "post_norms": True},
        derived={"embedding_scale": _root_of_the_width, "attention_scale": partial(_scale_of_gemma, 46)},
        typical={"sliding_window": 4096, "window_pattern": 2, "attention_softcap": 50.0, "logit_softcap": 30.0},
        harmless=PLAIN | UNSCALED | {"rope.freq_base_swa": (0,)},
        only=lambda c: None not in (c.sliding_window, c.attention_softcap, c.logit_softcap),
    ),
    _form(
        "gemma3",
        keys=(
            _SCALED_ROPE[0]._replace(words=("none", "linear")), *_SCALED_ROPE[1:], *_windows(6, None), _LOCAL_BASE,
            _LOGIT_CAP,
        ),
        tensors={"untied": "output.weight"},
        fixed={"rope_halves": True, "geglu": True, "post_norms": True, "qk_norm": True},
        derived={"embedding_scale": _root_of_the_width, "attention_scale": partial(_scale_of_gemma, 62)},
        typical={"sliding_window": 1024, "window_pattern": 6, "rope_local_base": 10000.0},
    ),
    # with a window it is OLMo 3
    _form(
        "olmo2", tensors={}, only=_heads_fill_the_width, harmless=PLAIN | {"attention.sliding_window": (0,)},
        fixed={
            "rope_halves": True, "qk_norm": True, "qk_norm_together": True, "no_pre_norms": True, "post_norms": True,
            "untied": True,
        },
        typical={},
    ),
    _form(
        "mistral3", keys=(*_SCALED_ROPE, _LOG_MULTIPLIER), tensors=_EVERY_BIAS, vectors=_FREQUENCIES,
        harmless=PLAIN | {"rope.scaling.yarn_beta_fast": (32,), "rope.scaling.yarn_beta_slow": (1,)},
        longest=_before_the_temperature,
    ),
)  # fmt: skip
