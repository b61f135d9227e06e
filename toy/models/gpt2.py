"""GPT-2 (Radford et al. 2019): the forward pass and its backward, op by op.

    x = E[token] + P[position]
    per block:  x = x + W_output attention(LayerNorm(x)) + bias         (q, k, v from one matrix, attn_qkv)
                x = x + W_down gelu(W_up LayerNorm(x) + bias) + bias
    logits = LayerNorm(x) E^T                  (tied)

The parameters carry their GGUF names. Letters in the shapes: N = B*T rows, D = d_model, F = d_ff, V = vocab_size. The parts
and their order are those of `toy/models/transformer.py`. The four matrices of a block go through `project`, which is
`ops.linear` until LoRA adapters join (`toy/models/lora.py`).
"""

from typing import NamedTuple

from toy.adamw import AdamW
from toy.config import GPT2Config
from toy.models.base import EmbedCache, KeyValueCache, LanguageModel, UnembedCache
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

    def embed(self, token_ids: Array, positions: Array) -> tuple[Array, EmbedCache]:
        """token_ids, positions: int (N,) -> x (N, D), cache."""
        ops, p = self.ops, self.parameters
        token, token_cache = ops.embedding(token_ids, p.token_embd.weight)  # (N, D), first use of E
        position, position_cache = ops.embedding(positions, p.position_embd.weight)  # (N, D)
        return ops.add(token, position), EmbedCache(token_cache, position_cache)

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

    def unembed_rows(self, x: Array) -> tuple[Array, UnembedCache]:
        """x: (N, D) -> logits (N, V), cache."""
        ops, p = self.ops, self.parameters
        x, norm = ops.layer_norm(x, p.output_norm.weight, p.output_norm.bias, NORM_EPS)  # (N, D)
        logits, linear = ops.linear(x, p.token_embd.weight)  # (N, V), second use of E
        return logits, UnembedCache(norm, linear)

    # -- backward: from the logits down -------------------------------------------------------------------------------

    def unembed_backward(self, d_logits: Array, cache: UnembedCache, grads: GradientTree) -> Array:
        """d_logits: (N, V) -> d_x (N, D). Adds to grads."""
        d_x = self.ops.linear_backward(d_logits, cache.linear, grads.token_embd.weight)  # (N, D), second use of E
        return self.ops.layer_norm_backward(d_x, cache.norm, grads.output_norm.weight, grads.output_norm.bias)

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

    def embed_backward(self, d_x: Array, cache: EmbedCache, grads: GradientTree) -> None:
        """d_x: gradient of what `embed` gave (N, D). Adds to grads."""
        self.ops.embedding_backward(d_x, cache.position, grads.position_embd.weight)
        # first use of E: its gradient collects both
        self.ops.embedding_backward(d_x, cache.token, grads.token_embd.weight)

    # -- the head and the loss in one, without all logits at a time: for training -------------------------------------

    def loss_rows(self, x: Array, labels: Array, grads: GradientTree | None) -> tuple[float, Array | None]:
        """x: (N, D) -> the mean loss, d_x (N, D): `unembed_rows`, cross-entropy and the backward of both.

        Adds to grads; grads None: the loss alone, None for d_x.
        """
        ops, p = self.ops, self.parameters
        x, norm = ops.layer_norm(x, p.output_norm.weight, p.output_norm.bias, NORM_EPS)  # (N, D)
        if grads is None:
            return ops.linear_cross_entropy(x, p.token_embd.weight, labels, backward=False)
        loss, d_x = ops.linear_cross_entropy(x, p.token_embd.weight, labels, d_weight=grads.token_embd.weight)
        return loss, ops.layer_norm_backward(d_x, norm, grads.output_norm.weight, grads.output_norm.bias)  # (N, D)


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
