"""GPT-2 (Radford et al. 2019): the forward pass and its backward, op by op.

    x = E[token] + P[position]
    per block:  x = x + W_output attention(LayerNorm(x)) + bias         (q, k, v from one matrix, attn_qkv)
                x = x + W_down gelu(W_up LayerNorm(x) + bias) + bias
    logits = LayerNorm(x) E^T                  (tied)

The parameters carry their GGUF names. Letters in the shapes: N = B*T rows, D = d_model, F = d_ff, V = vocab_size. The four
matrices of a block go through `project`, where LoRA adapters may join.
"""

from functools import partial
from typing import NamedTuple

from toy.adamw import AdamW
from toy.config import GPT2Config
from toy.models.base import KeyValueCache, LanguageModel
from toy.models.gguf_form import SIZES, Form, Key
from toy.models.lora import project, project_backward
from toy.models.parameters import Block, GradientTree, Shapes, Stds, residual_stream_stds
from toy.op_table import Array, OpCache

NORM_EPS = 1e-5


class BlockCache(NamedTuple):
    """What one block's backward needs: the cache of each op, in forward order."""

    attn_norm: OpCache
    attn_qkv: OpCache
    attention: OpCache
    attn_output: OpCache
    ffn_norm: OpCache
    ffn_up: OpCache
    gelu: OpCache
    ffn_down: OpCache


class Cache(NamedTuple):
    token: OpCache
    position: OpCache
    blocks: list[BlockCache | None]  # None: not kept; with `recompute` how to get them
    output_norm: OpCache
    unembed: OpCache


class GPT2(LanguageModel):
    """GPT-2 of any size, made from a `GPT2Config`. The other arguments are those of `LanguageModel`."""

    arch = "gpt2"
    hp_mode = AdamW.MODE_LORA
    learned_positions = True
    config: GPT2Config

    @staticmethod
    def parameter_shapes(c: GPT2Config) -> Shapes:
        """dict of parameter names to shapes; matrices are (out, in). attn_qkv holds the rows of q, then k, then v."""
        d = c.d_model
        shapes: Shapes = {"token_embd.weight": (c.vocab_size, d), "position_embd.weight": (c.context_length, d)}
        for i in range(c.n_layers):
            for name, shape in (
                ("attn_norm", (d,)),
                ("attn_qkv", (3 * d, d)),
                ("attn_output", (d, d)),
                ("ffn_norm", (d,)),
                ("ffn_up", (c.d_ff, d)),
                ("ffn_down", (d, c.d_ff)),
            ):
                shapes[f"blk.{i}.{name}.weight"] = shape
                shapes[f"blk.{i}.{name}.bias"] = shape[:1]
        return shapes | {"output_norm.weight": (d,), "output_norm.bias": (d,)}

    @staticmethod
    def parameter_stds(config: GPT2Config) -> Stds:
        """As published: Normal(0, 0.02), residual projections scaled by 1/sqrt(2 n_layers), gains 1, biases 0."""
        return residual_stream_stds(GPT2.parameter_shapes(config), config.n_layers)

    # -- forward ------------------------------------------------------------------------------------------------------

    def forward_rows(
        self, token_ids: Array, positions: Array, batch: int, kv_cache: KeyValueCache | None = None
    ) -> tuple[Array, Cache]:
        """token_ids, positions: int (N,) -> logits (N, V), cache."""
        x, token_cache, position_cache, block_caches = self.hidden_rows(token_ids, positions, batch, kv_cache)  # (N, D)
        logits, norm_cache, unembed_cache = self.unembed_rows(x)  # (N, V)
        return logits, Cache(token_cache, position_cache, block_caches, norm_cache, unembed_cache)

    def hidden_rows(
        self,
        token_ids: Array,
        positions: Array,
        batch: int,
        kv_cache: KeyValueCache | None = None,
        keep_cache: bool = True,
    ) -> tuple[Array, OpCache, OpCache, list[BlockCache | None]]:
        """token_ids, positions: int (N,) -> the residual stream after the last block (N, D), and the three caches.

        keep_cache: False when no backward follows; the blocks' activations are then freed at once.
        """
        ops, p = self.ops, self.parameters
        token, token_cache = ops.embedding(token_ids, p.token_embd.weight)  # (N, D)
        position, position_cache = ops.embedding(positions, p.position_embd.weight)  # (N, D)
        x = ops.add(token, position)  # (N, D)
        block_caches = []
        for layer, block in enumerate(p.blk):
            forward = partial(self.block_forward, layer, block, x, batch, kv_cache)
            x, cache = forward()
            block_caches.append(self.to_keep(layer, cache, forward) if keep_cache else None)
        return x, token_cache, position_cache, block_caches

    def unembed_rows(self, x: Array) -> tuple[Array, OpCache, OpCache]:
        """x: (N, D) from `hidden_rows` -> logits (N, V), norm_cache, unembed_cache."""
        ops, p = self.ops, self.parameters
        x, norm_cache = ops.layer_norm(x, p.output_norm.weight, p.output_norm.bias, NORM_EPS)  # (N, D)
        logits, unembed_cache = ops.linear(x, p.token_embd.weight)  # (N, V)
        return logits, norm_cache, unembed_cache

    def loss_rows(self, x: Array, labels: Array, grads: GradientTree | None) -> tuple[float, Array | None]:
        """x: (N, D) from `hidden_rows` -> the mean loss, d_x (N, D): `unembed_rows`, cross-entropy and the backward of both.

        Adds to grads; grads None: the loss alone, None for d_x.
        """
        ops, p = self.ops, self.parameters
        x, norm_cache = ops.layer_norm(x, p.output_norm.weight, p.output_norm.bias, NORM_EPS)  # (N, D)
        if grads is None:
            return ops.linear_cross_entropy(x, p.token_embd.weight, labels, backward=False)
        loss, d_x = ops.linear_cross_entropy(
            x, p.token_embd.weight, labels, d_weight=grads.token_embd.weight
        )  # first use of E
        return loss, ops.layer_norm_backward(
            d_x, norm_cache, grads.output_norm.weight, grads.output_norm.bias
        )  # (N, D)

    def block_forward(
        self, layer: int, block: Block, x: Array, batch: int, kv_cache: KeyValueCache | None = None
    ) -> tuple[Array, BlockCache]:
        """x: (N, D) -> x (N, D), cache."""
        ops, d, scale = self.ops, self.config.d_model, self.lora_scale
        h, attn_norm = ops.layer_norm(x, block.attn_norm.weight, block.attn_norm.bias, NORM_EPS)  # (N, D)
        qkv, attn_qkv = project(ops, h, block.attn_qkv, scale)  # (N, 3D)
        q, k, v = ops.split(qkv, (d, d, d))  # (N, D) each
        if kv_cache is not None:
            k, v = kv_cache.extend(layer, k, v)  # (T_past + T, D)
        a, attention = ops.attention(q, k, v, batch, self.config.n_heads, causal=True)  # (N, D)
        a, attn_output = project(ops, a, block.attn_output, scale)  # (N, D)
        x = ops.add(x, a)  # (N, D)

        h, ffn_norm = ops.layer_norm(x, block.ffn_norm.weight, block.ffn_norm.bias, NORM_EPS)  # (N, D)
        f, ffn_up = project(ops, h, block.ffn_up, scale)  # (N, F)
        f, gelu = ops.gelu(f)  # (N, F)
        f, ffn_down = project(ops, f, block.ffn_down, scale)  # (N, D)
        x = ops.add(x, f)  # (N, D)
        return x, BlockCache(attn_norm, attn_qkv, attention, attn_output, ffn_norm, ffn_up, gelu, ffn_down)

    # -- backward -----------------------------------------------------------------------------------------------------

    def backward_rows(self, d_logits: Array, cache: Cache, grads: GradientTree, release_cache: bool = False) -> None:
        """d_logits: (N, V). Adds the gradient of every parameter to `grads`."""
        ops = self.ops
        d_x = ops.linear_backward(d_logits, cache.unembed, grads.token_embd.weight)  # (N, D), first use of E
        d_x = ops.layer_norm_backward(d_x, cache.output_norm, grads.output_norm.weight, grads.output_norm.bias)
        self.hidden_rows_backward(d_x, cache.token, cache.position, cache.blocks, grads, release_cache)

    def hidden_rows_backward(
        self,
        d_x: Array,
        token_cache: OpCache,
        position_cache: OpCache,
        block_caches: list[BlockCache | None],
        grads: GradientTree,
        release_cache: bool = False,
    ) -> None:
        """d_x: gradient of what `hidden_rows` gave (N, D). Adds to grads."""
        ops = self.ops
        d_x = self.blocks_backward(d_x, block_caches, grads.blk, release_cache, grads.lowest_block())  # (N, D)
        ops.embedding_backward(d_x, position_cache, grads.position_embd.weight)
        # second use of E: the same gradient collects both
        ops.embedding_backward(d_x, token_cache, grads.token_embd.weight)

    def block_backward(self, d_x: Array, cache: BlockCache, grads: Block) -> Array:
        """d_x: gradient of the block's output (N, D) -> gradient of its input (N, D). Adds to grads."""
        ops, scale = self.ops, self.lora_scale
        d_f = project_backward(ops, d_x, cache.ffn_down, grads.ffn_down, scale)  # (N, F)
        d_f = ops.gelu_backward(d_f, cache.gelu)  # (N, F)
        d_h = project_backward(ops, d_f, cache.ffn_up, grads.ffn_up, scale)  # (N, D)
        d_h = ops.layer_norm_backward(d_h, cache.ffn_norm, grads.ffn_norm.weight, grads.ffn_norm.bias)  # (N, D)
        d_x = ops.add(d_x, d_h)  # the residual stream and the branch

        d_a = project_backward(ops, d_x, cache.attn_output, grads.attn_output, scale)  # (N, D)
        d_qkv = ops.concat(ops.attention_backward(d_a, cache.attention))  # (N, 3D)
        d_h = project_backward(ops, d_qkv, cache.attn_qkv, grads.attn_qkv, scale)  # (N, D)
        d_h = ops.layer_norm_backward(d_h, cache.attn_norm, grads.attn_norm.weight, grads.attn_norm.bias)  # (N, D)
        return ops.add(d_x, d_h)


# -- in GGUF files ----------------------------------------------------------------------------------------------------

GGUF_FORMS = (
    Form(
        "gpt2",
        keys=(
            *SIZES,
            Key("n_heads", "attention.head_count_kv", says="attention.head_count =", unless=lambda config: True),
        ),
        constants={"attention.layer_norm_epsilon": NORM_EPS},
    ),
)
