"""TransformerLM, the readable model: the forward pass and its backward, op by op.

    x = E[token] + P[position]
    per block:  x = x + W_o attention(RMSNorm(x))
                x = x + W_ff2 gelu(W_ff1 RMSNorm(x))
    logits = RMSNorm(x) E^T                    (the embedding E is used twice: "tied")

Letters in the shapes: N = B*T rows (one per token), D = d_model, F = d_ff, V = vocab_size, H = n_heads.
The ops are in `toy/ops/reference.py`, each with its own backward. `LanguageModel` runs the parts below in this order:

    forward     embed              block_forward, block by block             unembed_rows
    backward    unembed_backward   block_backward, the last block first      embed_backward

A backward calls the backward of each op, the last one first: read it beside its forward, from the bottom upwards. Where two
paths of the forward meet (`add`), the gradient goes into both; where one value was used twice, the gradients of its uses are
summed.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from toy.adamw import AdamW
from toy.config import TransformerConfig
from toy.models.base import EmbedCache, KeyValueCache, LanguageModel, UnembedCache
from toy.models.parameters import Block, GradientTree, Shapes, Stds
from toy.op_table import Array, OpCache

NORM_EPS = 1e-5


class BlockCache(NamedTuple):
    """What one block's backward needs: the cache of each op, in forward order."""

    norm1: OpCache
    q: OpCache
    k: OpCache
    v: OpCache
    attention: OpCache
    w_o: OpCache
    norm2: OpCache
    ff1: OpCache
    gelu: OpCache
    ff2: OpCache


class TransformerLM(LanguageModel):
    """A decoder-only transformer language model, made from its sizes or, like the other models, from a `TransformerConfig`:
    `TransformerLM(config, seed=0)`.

    seed, init_scale: of the initialisation. ops: an op table (None: the current backend's). dtype: float32, or float64 with
    the reference table. parameters: a ready tree to use instead. Raises ValueError as `TransformerConfig` does.
    """

    arch = "transformer"
    hp_mode = AdamW.MODE_FROM_SCRATCH
    learned_positions = True
    block_list = "blocks"
    config: TransformerConfig

    def __init__(
        self,
        vocab_size: int | TransformerConfig,
        d_model: int | None = None,
        d_ff: int | None = None,
        n_heads: int | None = None,
        n_layers: int | None = None,
        context_length: int | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        config, sizes = vocab_size, (d_model, d_ff, n_heads, n_layers, context_length)
        if not isinstance(config, TransformerConfig):
            # a size of None is refused by the config
            config = TransformerConfig(vocab_size, d_model, n_heads, d_ff, n_layers, context_length)  # type: ignore[arg-type]
        elif any(size is not None for size in sizes):
            raise TypeError("TransformerLM takes a config or the sizes, not both: TransformerLM(config, seed=0)")
        if type(config) is not TransformerConfig:  # a GPT2Config is one too, by its fields
            raise TypeError(f"TransformerLM takes a TransformerConfig, got a {type(config).__name__}")
        super().__init__(config, seed, **options)

    @staticmethod
    def parameter_shapes(c: TransformerConfig) -> Shapes:
        return parameter_shapes(c.vocab_size, c.d_model, c.d_ff, c.n_heads, c.d_head, c.n_layers, c.context_length)

    @staticmethod
    def parameter_stds(config: TransformerConfig) -> Stds:
        """Normal(0, 0.02) for matrices; the two that write into the residual stream are scaled by 1/sqrt(2 n_layers), so
        that its variance does not grow with depth (Radford et al. 2019, section 2.3)."""
        stds: Stds = {}
        for name in TransformerLM.parameter_shapes(config):
            if name.endswith("gamma"):
                stds[name] = "ones"
            elif name.endswith(("w_o", "w_ff2")):
                stds[name] = 0.02 / (2 * config.n_layers) ** 0.5
            else:
                stds[name] = 0.02
        return stds

    @property
    def token_embed(self) -> Array:
        return self.parameters.token_embed

    @property
    def pos_embed(self) -> Array:
        return self.parameters.pos_embed

    @property
    def norm_final_gamma(self) -> Array:
        return self.parameters.norm_final_gamma

    @property
    def blocks(self) -> list[Block]:
        return self.parameters.blocks

    def new_gradients(self) -> "Gradients":
        c = self.config
        return Gradients(
            c.vocab_size, c.d_model, c.d_ff, c.n_heads, c.d_head, c.n_layers, c.context_length, self.token_embed.dtype
        )

    # -- forward ------------------------------------------------------------------------------------------------------

    def embed(self, token_ids: Array, positions: Array) -> tuple[Array, EmbedCache]:
        """token_ids, positions: int (N,) -> x (N, D), cache."""
        ops, p = self.ops, self.parameters
        token, token_cache = ops.embedding(token_ids, p.token_embed)  # (N, D), first use of E
        position, position_cache = ops.embedding(positions, p.pos_embed)  # (N, D)
        return ops.add(token, position), EmbedCache(token_cache, position_cache)

    def block_forward(
        self, layer: int, block: Block, x: Array, batch: int, kv_cache: KeyValueCache | None = None
    ) -> tuple[Array, BlockCache]:
        """x: (N, D) -> x (N, D), cache."""
        ops, heads = self.ops, self.config.n_heads
        h, norm1 = ops.rms_norm(x, block.norm1_gamma, NORM_EPS)  # (N, D)
        q, q_cache = ops.linear(h, block.w_q)  # (N, H*d_head)
        k, k_cache = ops.linear(h, block.w_k)  # (N, H*d_head)
        v, v_cache = ops.linear(h, block.w_v)  # (N, H*d_head)
        if kv_cache is not None:
            k, v = kv_cache.extend(layer, k, v)  # (T_past + T, H*d_head)
        a, attention = ops.attention(q, k, v, batch, heads, causal=True)  # (N, H*d_head)
        a, o_cache = ops.linear(a, block.w_o)  # (N, D)
        x = ops.add(x, a)  # (N, D)

        h, norm2 = ops.rms_norm(x, block.norm2_gamma, NORM_EPS)  # (N, D)
        f, ff1 = ops.linear(h, block.w_ff1)  # (N, F)
        f, gelu = ops.gelu(f)  # (N, F)
        f, ff2 = ops.linear(f, block.w_ff2)  # (N, D)
        x = ops.add(x, f)  # (N, D)
        return x, BlockCache(norm1, q_cache, k_cache, v_cache, attention, o_cache, norm2, ff1, gelu, ff2)

    def unembed_rows(self, x: Array) -> tuple[Array, UnembedCache]:
        """x: (N, D) -> logits (N, V), cache."""
        ops, p = self.ops, self.parameters
        x, norm = ops.rms_norm(x, p.norm_final_gamma, NORM_EPS)  # (N, D)
        logits, linear = ops.linear(x, p.token_embed)  # (N, V), second use of E
        return logits, UnembedCache(norm, linear)

    # -- backward: from the logits down ------------------------------------------------------------------------------------

    def unembed_backward(self, d_logits: Array, cache: UnembedCache, grads: GradientTree) -> Array:
        """d_logits: (N, V) -> d_x (N, D). Adds to grads."""
        d_x = self.ops.linear_backward(d_logits, cache.linear, grads.token_embed)  # (N, D), second use of E
        return self.ops.rms_norm_backward(d_x, cache.norm, grads.norm_final_gamma)  # (N, D)

    def block_backward(self, d_x: Array, cache: BlockCache, grads: Block) -> Array:
        """d_x: gradient of the block's output (N, D) -> gradient of its input (N, D). Adds to grads."""
        ops = self.ops
        d_f = ops.linear_backward(d_x, cache.ff2, grads.w_ff2)  # (N, F)
        d_f = ops.gelu_backward(d_f, cache.gelu)  # (N, F)
        d_h = ops.linear_backward(d_f, cache.ff1, grads.w_ff1)  # (N, D)
        d_h = ops.rms_norm_backward(d_h, cache.norm2, grads.norm2_gamma)  # (N, D)
        d_x = ops.add(d_x, d_h)  # the residual stream and the branch

        d_a = ops.linear_backward(d_x, cache.w_o, grads.w_o)  # (N, H*d_head)
        d_q, d_k, d_v = ops.attention_backward(d_a, cache.attention)  # (N, H*d_head) each
        d_h = ops.linear_backward(d_q, cache.q, grads.w_q)  # (N, D)
        d_h = ops.add(d_h, ops.linear_backward(d_k, cache.k, grads.w_k))  # h was read three times
        d_h = ops.add(d_h, ops.linear_backward(d_v, cache.v, grads.w_v))
        d_h = ops.rms_norm_backward(d_h, cache.norm1, grads.norm1_gamma)  # (N, D)
        return ops.add(d_x, d_h)

    def embed_backward(self, d_x: Array, cache: EmbedCache, grads: GradientTree) -> None:
        """d_x: gradient of what `embed` gave (N, D). Adds to grads."""
        self.ops.embedding_backward(d_x, cache.position, grads.pos_embed)
        self.ops.embedding_backward(d_x, cache.token, grads.token_embed)  # first use of E: its gradient collects both

    # -- the head and the loss in one, without all logits at a time: for training ------------------------------------------

    def loss_rows(self, x: Array, labels: Array, grads: GradientTree | None) -> tuple[float, Array | None]:
        """x: (N, D) -> the mean loss, d_x (N, D): `unembed_rows`, cross-entropy and the backward of both.

        Adds to grads; grads None: the loss alone, None for d_x.
        """
        ops, p = self.ops, self.parameters
        x, norm = ops.rms_norm(x, p.norm_final_gamma, NORM_EPS)  # (N, D)
        if grads is None:
            return ops.linear_cross_entropy(x, p.token_embed, labels, backward=False)
        loss, d_x = ops.linear_cross_entropy(x, p.token_embed, labels, d_weight=grads.token_embed)
        return loss, ops.rms_norm_backward(d_x, norm, grads.norm_final_gamma)  # (N, D)


def parameter_shapes(
    vocab_size: int, d_model: int, d_ff: int, n_heads: int, d_head: int, n_layers: int, context_length: int
) -> Shapes:
    """dict of parameter names to shapes; matrices are (out, in)."""
    h = n_heads * d_head
    shapes: Shapes = {
        "token_embed": (vocab_size, d_model),
        "pos_embed": (context_length, d_model),
        "norm_final_gamma": (d_model,),
    }
    for i in range(n_layers):
        shapes |= {
            f"blocks.{i}.norm1_gamma": (d_model,),
            f"blocks.{i}.norm2_gamma": (d_model,),
            f"blocks.{i}.w_q": (h, d_model),
            f"blocks.{i}.w_k": (h, d_model),
            f"blocks.{i}.w_v": (h, d_model),
            f"blocks.{i}.w_o": (d_model, h),
            f"blocks.{i}.w_ff1": (d_ff, d_model),
            f"blocks.{i}.w_ff2": (d_model, d_ff),
        }
    return shapes


class Gradients(GradientTree):
    """The gradients of a TransformerLM, a mirror of its parameters: `token_embed`, `pos_embed`, `norm_final_gamma`,
    `blocks` (each with norm1_gamma, norm2_gamma, w_q, w_k, w_v, w_o, w_ff1, w_ff2), and `loss`. All zeros when made."""

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        d_ff: int,
        n_heads: int,
        d_head: int,
        n_layers: int,
        context_length: int,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        shapes = parameter_shapes(vocab_size, d_model, d_ff, n_heads, d_head, n_layers, context_length)
        zeros = GradientTree.zeros(shapes, dtype)
        super().__init__(dict(zeros.items()), zeros.flat)
