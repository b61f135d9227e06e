"""The vision transformer (Dosovitskiy et al. 2021): the forward pass and its backward, op by op.

    x = [class token, W_patch patch + b_patch] + P[position]              (eq. 1; a patch is its pixels in one row)
    per block:  x = x + W_output attention(LayerNorm(x)) + b              (eq. 2; every token sees every token)
                x = x + W_down gelu(W_up LayerNorm(x) + b) + b            (eq. 3)
    logits = W_head LayerNorm(x of the class token) + b                   (eq. 4)

Letters in the shapes: B images, P patches in each, T = P+1 tokens, N = B*T rows, C = numbers in a patch, D = d_model, F =
d_ff.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from toy.adamw import AdamW
from toy.config import ViTConfig
from toy.models.base import Model
from toy.models.inputs import ImageBatch
from toy.models.parameters import Block, GradientTree, Shapes, Stds, residual_stream_stds
from toy.op_table import Array, OpCache

NORM_EPS = 1e-6  # the paper's own code


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
    patch: OpCache
    class_token: OpCache
    position: OpCache
    blocks: list[BlockCache | None]  # None: not kept
    others: Array  # what the head does not read of the last x, (B, P*D)
    output_norm: OpCache
    head: OpCache


class ViT(Model):
    """A vision transformer of any size, made from a `ViTConfig`. The other arguments are those of `Model`."""

    arch = "vit"
    hp_mode = AdamW.MODE_FROM_SCRATCH
    learned_positions = True
    batch_type = ImageBatch
    config: ViTConfig

    @property
    def n_classes(self) -> int:
        return self.config.n_classes

    @staticmethod
    def parameter_shapes(c: ViTConfig) -> Shapes:
        """dict of parameter names to shapes; matrices are (out, in). attn_qkv holds the rows of q, then k, then v."""
        d = c.d_model
        shapes: Shapes = {
            "patch_embd.weight": (d, c.patch_numbers),
            "patch_embd.bias": (d,),
            "class_embd.weight": (1, d),
            "position_embd.weight": (c.n_tokens, d),
        }
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
        return shapes | {
            "output_norm.weight": (d,),
            "output_norm.bias": (d,),
            "head.weight": (c.n_classes, d),
            "head.bias": (c.n_classes,),
        }

    @staticmethod
    def parameter_stds(config: ViTConfig) -> Stds:
        """Matrices with variance 1/in, which keeps the size of what goes through them (a small ViT is too narrow for a fixed
        0.02), those into the residual stream scaled by 1/sqrt(2 n_layers); class token and positions Normal(0, 0.1); gains 1,
        biases 0."""
        shapes = ViT.parameter_shapes(config)
        stds = residual_stream_stds(shapes, config.n_layers)
        for name, shape in shapes.items():
            if name in ("class_embd.weight", "position_embd.weight"):
                stds[name] = 0.1
            elif len(shape) == 2:
                stds[name] *= shape[1] ** -0.5 / 0.02
        return stds

    # -- forward ------------------------------------------------------------------------------------------------------

    def forward(self, images: npt.ArrayLike) -> tuple[Array, tuple[Array, Cache]]:
        """images: numbers (B, height, width, channels), or (B, height, width) of one channel -> logits (B, n_classes), and
        the cache that `backward` takes. Raises ValueError for images of another size and for none."""
        images = np.asarray(images)
        is_batch = images.ndim == 4 or (images.ndim == 3 and self.config.channels == 1)
        n = len(images) if is_batch else 1
        if n == 0:
            raise ValueError(f"images must be at least one, got the shape {images.shape}")
        inputs = ImageBatch(self.config, n, self.config.n_tokens).check(images)
        inputs["patches"] = inputs["patches"].astype(self.parameters.dtype, copy=False)
        logits, cache = self.forward_rows(**inputs, batch=n)
        return logits, (logits, cache)

    def forward_rows(self, patches: Array, class_ids: Array, positions: Array, batch: int) -> tuple[Array, Cache]:
        """patches: (B*P, C), class_ids: int (B,) zeros, positions: int (N,) -> logits (B, n_classes), cache."""
        ops, p, c = self.ops, self.parameters, self.config
        x, patch = ops.linear(patches, p.patch_embd.weight, p.patch_embd.bias)  # (B*P, D)
        first, class_token = ops.embedding(class_ids, p.class_embd.weight)  # (B, D)
        x = ops.concat([first, ops.reshape(x, batch)])  # (B, T*D): an image is a row
        x = ops.reshape(x, batch * c.n_tokens)  # (N, D)
        p_embd, position = ops.embedding(positions, p.position_embd.weight)  # (N, D)
        x = ops.add(x, p_embd)  # (N, D)
        block_caches: list[BlockCache | None] = []
        for layer, block in enumerate(p.blk):
            forward = partial(self.block_forward, block, x, batch)
            x, cache = forward()
            block_caches.append(self.to_keep(layer, cache, forward))
        x, others = ops.split(ops.reshape(x, batch), (c.d_model, c.n_patches * c.d_model))  # (B, D), (B, P*D)
        x, output_norm = ops.layer_norm(x, p.output_norm.weight, p.output_norm.bias, NORM_EPS)  # (B, D)
        logits, head = ops.linear(x, p.head.weight, p.head.bias)  # (B, n_classes)
        return logits, Cache(patch, class_token, position, block_caches, others, output_norm, head)

    def block_forward(self, block: Block, x: Array, batch: int) -> tuple[Array, BlockCache]:
        """x: (N, D) -> x (N, D), cache."""
        ops, d = self.ops, self.config.d_model
        h, attn_norm = ops.layer_norm(x, block.attn_norm.weight, block.attn_norm.bias, NORM_EPS)  # (N, D)
        qkv, attn_qkv = ops.linear(h, block.attn_qkv.weight, block.attn_qkv.bias)  # (N, 3D)
        q, k, v = ops.split(qkv, (d, d, d))  # (N, D) each
        a, attention = ops.attention(q, k, v, batch, self.config.n_heads, causal=False)  # (N, D)
        a, attn_output = ops.linear(a, block.attn_output.weight, block.attn_output.bias)  # (N, D)
        x = ops.add(x, a)  # (N, D)

        h, ffn_norm = ops.layer_norm(x, block.ffn_norm.weight, block.ffn_norm.bias, NORM_EPS)  # (N, D)
        f, ffn_up = ops.linear(h, block.ffn_up.weight, block.ffn_up.bias)  # (N, F)
        f, gelu = ops.gelu(f)  # (N, F)
        f, ffn_down = ops.linear(f, block.ffn_down.weight, block.ffn_down.bias)  # (N, D)
        x = ops.add(x, f)  # (N, D)
        return x, BlockCache(attn_norm, attn_qkv, attention, attn_output, ffn_norm, ffn_up, gelu, ffn_down)

    # -- backward -----------------------------------------------------------------------------------------------------

    def backward_rows(self, d_logits: Array, cache: Cache, grads: GradientTree, release_cache: bool = False) -> None:
        """d_logits: (B, n_classes). Adds the gradient of every parameter to `grads`."""
        ops, c = self.ops, self.config
        d_x = ops.linear_backward(d_logits, cache.head, grads.head.weight, grads.head.bias)  # (B, D)
        d_x = ops.layer_norm_backward(d_x, cache.output_norm, grads.output_norm.weight, grads.output_norm.bias)
        batch = d_x.shape[0]
        d_x = ops.concat([d_x, ops.zeros_like(cache.others)])  # (B, T*D): the head read the class token alone
        d_x = ops.reshape(d_x, batch * c.n_tokens)  # (N, D)
        d_x = self.blocks_backward(d_x, cache.blocks, grads.blk, release_cache)  # (N, D)
        ops.embedding_backward(d_x, cache.position, grads.position_embd.weight)
        d_first, d_x = ops.split(ops.reshape(d_x, batch), (c.d_model, c.n_patches * c.d_model))  # (B, D), (B, P*D)
        ops.embedding_backward(d_first, cache.class_token, grads.class_embd.weight)
        d_x = ops.reshape(d_x, batch * c.n_patches)  # (B*P, D)
        ops.linear_backward(d_x, cache.patch, grads.patch_embd.weight, grads.patch_embd.bias)  # d_patches: unused

    def block_backward(self, d_x: Array, cache: BlockCache, grads: Block) -> Array:
        """d_x: gradient of the block's output (N, D) -> gradient of its input (N, D). Adds to grads."""
        ops = self.ops
        d_f = ops.linear_backward(d_x, cache.ffn_down, grads.ffn_down.weight, grads.ffn_down.bias)  # (N, F)
        d_f = ops.gelu_backward(d_f, cache.gelu)  # (N, F)
        d_h = ops.linear_backward(d_f, cache.ffn_up, grads.ffn_up.weight, grads.ffn_up.bias)  # (N, D)
        d_h = ops.layer_norm_backward(d_h, cache.ffn_norm, grads.ffn_norm.weight, grads.ffn_norm.bias)  # (N, D)
        d_x = ops.add(d_x, d_h)  # the residual stream and the branch

        d_a = ops.linear_backward(d_x, cache.attn_output, grads.attn_output.weight, grads.attn_output.bias)  # (N, D)
        d_qkv = ops.concat(ops.attention_backward(d_a, cache.attention))  # (N, 3D)
        d_h = ops.linear_backward(d_qkv, cache.attn_qkv, grads.attn_qkv.weight, grads.attn_qkv.bias)  # (N, D)
        d_h = ops.layer_norm_backward(d_h, cache.attn_norm, grads.attn_norm.weight, grads.attn_norm.bias)  # (N, D)
        return ops.add(d_x, d_h)
