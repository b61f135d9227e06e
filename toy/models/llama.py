"""Llama (Touvron et al. 2023): the forward pass and its backward, op by op.

    x = E[token]
    per block:  x = x + W_output attention(rope(W_q h), rope(W_k h), W_v h),   h = RMSNorm(x)
                x = x + W_down (silu(W_gate h) * W_up h),                      h = RMSNorm(x)
    logits = RMSNorm(x) W_out^T                (W_out = E when tied)

The parameters carry their GGUF names. Letters in the shapes: N = B*T rows, D = d_model, F = d_ff, V = vocab_size,
H = n_heads * d_head, K = n_kv_heads * d_head. Every matrix goes through `project`, where LoRA adapters may join it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from toy.adamw import AdamW
from toy.config import LlamaConfig
from toy.models.base import KeyValueCache, LanguageModel, backward_order
from toy.models.gguf_form import PLAIN, SIZES, Form, Key
from toy.models.lens import embed, embed_backward, unembed, unembed_backward
from toy.models.lora import project, project_backward
from toy.models.parameters import Block, GradientTree, ParameterTree, Shapes, Stds, residual_stream_stds
from toy.op_table import Array, OpCache


class BlockCache(NamedTuple):
    """What one block's backward needs: the cache of each op, in forward order."""

    attn_norm: OpCache
    attn_q: OpCache
    attn_k: OpCache
    attn_v: OpCache
    rope_q: OpCache
    rope_k: OpCache
    attention: OpCache
    attn_output: OpCache
    ffn_norm: OpCache
    ffn_gate: OpCache
    ffn_up: OpCache
    swiglu: OpCache
    ffn_down: OpCache


class Cache(NamedTuple):
    token: OpCache
    blocks: list[BlockCache | None]  # None: not kept
    output_norm: OpCache
    unembed: OpCache


class Llama(LanguageModel):
    """Llama of any size, made from a `LlamaConfig`. lora_scale: alpha / rank of the adapters, if the tree has any. The
    other arguments are those of `LanguageModel`."""

    arch = "llama"
    hp_mode = AdamW.MODE_FROM_SCRATCH
    config: LlamaConfig

    def __init__(self, config: LlamaConfig, seed: int = 0, *, lora_scale: float = 1.0, **options: Any) -> None:
        super().__init__(config, seed, **options)
        self.lora_scale = lora_scale

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
        shapes["output_norm.weight"] = (d,)
        if c.untied:
            shapes["output.weight"] = (c.vocab_size, d)
        return shapes

    @staticmethod
    def parameter_stds(config: LlamaConfig) -> Stds:
        """Normal(0, 0.02), residual projections scaled by 1/sqrt(2 n_layers), gains 1, biases 0 (as GPT-2)."""
        return residual_stream_stds(Llama.parameter_shapes(config), config.n_layers)

    def head(self, tree: ParameterTree) -> tuple[Any, Any]:
        """The output matrix in a parameter or gradient tree, and its lens (None: it has none)."""
        if self.config.untied:
            return tree.output.weight, None
        return tree.token_embd.weight, tree.output.lens if hasattr(tree, "output") else None

    # -- forward ------------------------------------------------------------------------------------------------------

    def forward_rows(
        self, token_ids: Array, positions: Array, batch: int, kv_cache: KeyValueCache | None = None
    ) -> tuple[Array, Cache]:
        """token_ids, positions: int (N,) -> logits (N, V), cache."""
        x, token_cache, block_caches = self.hidden_rows(token_ids, positions, batch, kv_cache)  # (N, D)
        logits, norm_cache, unembed_cache = self.unembed_rows(x)  # (N, V)
        return logits, Cache(token_cache, block_caches, norm_cache, unembed_cache)

    def hidden_rows(
        self,
        token_ids: Array,
        positions: Array,
        batch: int,
        kv_cache: KeyValueCache | None = None,
        keep_cache: bool = True,
    ) -> tuple[Array, OpCache, list[BlockCache | None]]:
        """token_ids, positions: int (N,) -> the residual stream after the last block (N, D), token_cache, block_caches.

        keep_cache: False when no backward follows; the blocks' activations are then freed at once.
        """
        ops, p = self.ops, self.parameters
        x, token_cache = embed(ops, token_ids, p.token_embd)  # (N, D)
        block_caches = []
        for layer, block in enumerate(p.blk):
            x, cache = self.block_forward(layer, block, x, positions, batch, kv_cache)
            block_caches.append(cache if keep_cache else None)
        return x, token_cache, block_caches

    def unembed_rows(self, x: Array) -> tuple[Array, OpCache, OpCache]:
        """x: (N, D) from `hidden_rows` -> logits (N, V), norm_cache, unembed_cache."""
        ops, p, c = self.ops, self.parameters, self.config
        x, norm_cache = ops.rms_norm(x, p.output_norm.weight, c.rms_eps)  # (N, D)
        weight, lens = self.head(p)
        logits, unembed_cache = unembed(ops, x, weight, lens)  # (N, V)
        return logits, norm_cache, unembed_cache

    def block_forward(
        self, layer: int, block: Block, x: Array, positions: Array, batch: int, kv_cache: KeyValueCache | None = None
    ) -> tuple[Array, BlockCache]:
        """x: (N, D) -> x (N, D), cache."""
        ops, c, scale = self.ops, self.config, self.lora_scale
        h, attn_norm = ops.rms_norm(x, block.attn_norm.weight, c.rms_eps)  # (N, D)
        q, attn_q = project(ops, h, block.attn_q, scale)  # (N, H)
        k, attn_k = project(ops, h, block.attn_k, scale)  # (N, K)
        v, attn_v = project(ops, h, block.attn_v, scale)  # (N, K)
        q, rope_q = ops.rope(q, positions, c.n_heads, c.rope_base)  # (N, H)
        k, rope_k = ops.rope(k, positions, c.n_kv_heads, c.rope_base)  # (N, K)
        if kv_cache is not None:
            k, v = kv_cache.extend(layer, k, v)  # (T_past + T, K)
        a, attention = ops.attention(q, k, v, batch, c.n_heads, c.n_kv_heads, causal=True)  # (N, H)
        a, attn_output = project(ops, a, block.attn_output, scale)  # (N, D)
        x = ops.add(x, a)  # (N, D)

        h, ffn_norm = ops.rms_norm(x, block.ffn_norm.weight, c.rms_eps)  # (N, D)
        gate, ffn_gate = project(ops, h, block.ffn_gate, scale)  # (N, F)
        up, ffn_up = project(ops, h, block.ffn_up, scale)  # (N, F)
        f, swiglu = ops.swiglu(gate, up)  # (N, F)
        f, ffn_down = project(ops, f, block.ffn_down, scale)  # (N, D)
        x = ops.add(x, f)  # (N, D)
        return x, BlockCache(
            attn_norm, attn_q, attn_k, attn_v, rope_q, rope_k, attention, attn_output,
            ffn_norm, ffn_gate, ffn_up, swiglu, ffn_down,
        )  # fmt: skip

    # -- backward -----------------------------------------------------------------------------------------------------

    def backward_rows(self, d_logits: Array, cache: Cache, grads: GradientTree, release_cache: bool = False) -> None:
        """d_logits: (N, V). Adds the gradient of every parameter to `grads` (None there: frozen)."""
        ops, blocks = self.ops, self.parameters.blk
        d_x = unembed_backward(ops, d_logits, cache.unembed, *self.head(grads))  # (N, D)
        d_x = ops.rms_norm_backward(d_x, cache.output_norm, grads.output_norm.weight)  # (N, D)
        for _, block_cache, block_grads in backward_order(blocks, cache.blocks, grads.blk, release_cache):
            d_x = self.block_backward(d_x, block_cache, block_grads)
        embed_backward(ops, d_x, cache.token, grads.token_embd)  # tied: the second contribution

    def block_backward(self, d_x: Array, cache: BlockCache, grads: Block) -> Array:
        """d_x: gradient of the block's output (N, D) -> gradient of its input (N, D). Adds to grads."""
        ops, scale = self.ops, self.lora_scale
        d_f = project_backward(ops, d_x, cache.ffn_down, grads.ffn_down, scale)  # (N, F)
        d_gate, d_up = ops.swiglu_backward(d_f, cache.swiglu)  # (N, F) each
        d_h = project_backward(ops, d_gate, cache.ffn_gate, grads.ffn_gate, scale)  # (N, D)
        d_h = ops.add(d_h, project_backward(ops, d_up, cache.ffn_up, grads.ffn_up, scale))  # h was read twice
        d_h = ops.rms_norm_backward(d_h, cache.ffn_norm, grads.ffn_norm.weight)  # (N, D)
        d_x = ops.add(d_x, d_h)  # the residual stream and the branch

        d_a = project_backward(ops, d_x, cache.attn_output, grads.attn_output, scale)  # (N, H)
        d_q, d_k, d_v = ops.attention_backward(d_a, cache.attention)  # (N, H), (N, K), (N, K)
        d_q = ops.rope_backward(d_q, cache.rope_q)  # (N, H)
        d_k = ops.rope_backward(d_k, cache.rope_k)  # (N, K)
        d_h = project_backward(ops, d_q, cache.attn_q, grads.attn_q, scale)  # (N, D)
        d_h = ops.add(d_h, project_backward(ops, d_k, cache.attn_k, grads.attn_k, scale))  # h was read three times
        d_h = ops.add(d_h, project_backward(ops, d_v, cache.attn_v, grads.attn_v, scale))
        d_h = ops.rms_norm_backward(d_h, cache.attn_norm, grads.attn_norm.weight)  # (N, D)
        return ops.add(d_x, d_h)


# -- in GGUF files ----------------------------------------------------------------------------------------------------


def _width_of_a_head(sizes: Mapping[str, int]) -> int:
    if sizes["d_model"] % sizes["n_heads"]:
        raise ValueError(f"{sizes['n_heads']} heads do not divide a width of {sizes['d_model']}")
    return sizes["d_model"] // sizes["n_heads"]


def _heads_fill_the_width(config: LlamaConfig) -> bool:
    return config.n_heads * config.d_head == config.d_model


_LLAMA = Form(
    "llama",
    keys=(
        *SIZES,
        Key("n_kv_heads", "attention.head_count_kv", default=lambda sizes: sizes["n_heads"]),
        Key("head_dim", "attention.key_length", default=_width_of_a_head, unless=_heads_fill_the_width),
        Key("head_dim", "attention.value_length", says="heads of", unless=_heads_fill_the_width),
        Key("head_dim", "rope.dimension_count", says="heads of"),
        Key("rope_base", "rope.freq_base", number=True, default=10000.0),
        Key("rms_eps", "attention.layer_norm_rms_epsilon", number=True),
    ),
    tensors={"untied": "output.weight", "qkv_bias": "blk.*.attn_[qkv].bias"},
    harmless=PLAIN,
)
GGUF_FORMS = (
    _LLAMA,
    # Ministral 3 without its scaled RoPE and its attention temperature computes what llama does
    _LLAMA._replace(name="mistral3", harmless=PLAIN | {"attention.temperature_scale": (0,)}),
)
