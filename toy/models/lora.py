"""LoRA (Hu et al. 2021, eq. 3): a linear layer with a trainable low-rank correction beside a weight that may be frozen.

    y = x W^T + b + scale * (x A^T) B^T,     A: (rank, in), B: (out, rank), scale = alpha / rank

A starts small and random, B at zero, so that at first the layer is the one it corrects. With dropout the correction reads
x * mask, where the mask holds 0 and 1/(1-p) (Srivastava et al. 2014).
"""

import math
from typing import NamedTuple

from toy.models.parameters import Namespace
from toy.op_table import Array, OpCache, OpTable


def scale_of(alpha: float, rank: int, rslora: bool = False) -> float:
    """What the product is multiplied by: alpha / rank, or with rslora alpha / sqrt(rank), which does not shrink with the rank
    (Kalajdzievski 2023)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


class ProjectionCache(NamedTuple):
    """Of a layer with adapters; without them it is the cache of its linear layer alone."""

    base: OpCache
    down: OpCache
    up: OpCache
    mask: Array | None


def project(ops: OpTable, x: Array, layer: Namespace, scale: float = 1.0) -> tuple[Array, OpCache]:
    """x: (N, in) -> (N, out), cache. layer: a node of the parameter tree with `weight` (out, in), and maybe `bias`, and
    maybe the adapters `lora_a` (rank, in) and `lora_b` (out, rank), and while they are trained `lora_mask` (N, in)."""
    y, base = ops.linear(x, layer.weight, getattr(layer, "bias", None))  # (N, out)
    if not hasattr(layer, "lora_a"):
        return y, base
    mask = getattr(layer, "lora_mask", None)
    read = x if mask is None else ops.masked(x, mask)  # (N, in)
    low, down = ops.linear(read, layer.lora_a)  # (N, rank)
    correction, up = ops.linear(low, layer.lora_b)  # (N, out)
    return ops.add(y, ops.scale(correction, scale)), ProjectionCache(base, down, up, mask)


def project_backward(ops: OpTable, d_y: Array, cache: OpCache, grads: Namespace, scale: float = 1.0) -> Array:
    """d_y: (N, out) -> d_x (N, in). grads: the node of the gradient tree (None in it: frozen). Adds to grads."""
    adapted = isinstance(cache, ProjectionCache)
    base = cache.base if adapted else cache
    d_x = ops.linear_backward(d_y, base, grads.weight, getattr(grads, "bias", None))  # (N, in)
    if not adapted:
        return d_x
    d_low = ops.linear_backward(ops.scale(d_y, scale), cache.up, grads.lora_b)  # (N, rank)
    d_read = ops.linear_backward(d_low, cache.down, grads.lora_a)  # (N, in)
    return ops.add(d_x, d_read if cache.mask is None else ops.masked(d_read, cache.mask))


class LookupCache(NamedTuple):
    """Of an embedding with adapters; without them it is the cache of the lookup alone."""

    base: OpCache
    down: OpCache
    up: OpCache


def look_up(ops: OpTable, token_ids: Array, layer: Namespace, scale: float = 1.0) -> tuple[Array, OpCache]:
    """token_ids: (N,) -> the rows E[token] + scale * A[token] B^T (N, D), cache. layer: a node of the parameter tree with
    `weight` (V, D), and maybe the adapters `lora_a` (V, rank) and `lora_b` (D, rank): the form in which llama.cpp takes
    them."""
    x, base = ops.embedding(token_ids, layer.weight)  # (N, D)
    if not hasattr(layer, "lora_a"):
        return x, base
    low, down = ops.embedding(token_ids, layer.lora_a)  # (N, rank)
    correction, up = ops.linear(low, layer.lora_b)  # (N, D)
    return ops.add(x, ops.scale(correction, scale)), LookupCache(base, down, up)


def look_up_backward(ops: OpTable, d_x: Array, cache: OpCache, grads: Namespace, scale: float = 1.0) -> None:
    """d_x: (N, D). grads: the node of the gradient tree (None in it: frozen). Adds to grads."""
    adapted = isinstance(cache, LookupCache)
    ops.embedding_backward(d_x, cache.base if adapted else cache, grads.weight)
    if adapted:
        d_low = ops.linear_backward(ops.scale(d_x, scale), cache.up, grads.lora_b)  # (N, rank)
        ops.embedding_backward(d_low, cache.down, grads.lora_a)
