"""LoRA (Hu et al. 2021, eq. 3): a linear layer with a trainable low-rank correction beside a weight that may be frozen.

    y = x W^T + b + scale * (x A^T) B^T,     A: (rank, in), B: (out, rank), scale = alpha / rank

A starts small and random, B at zero, so that at first the layer is the one it corrects.
"""

from typing import NamedTuple

from toy.models.parameters import Namespace
from toy.op_table import Array, OpCache, OpTable


class ProjectionCache(NamedTuple):
    base: OpCache
    down: OpCache | None
    up: OpCache | None


def project(ops: OpTable, x: Array, layer: Namespace, scale: float = 1.0) -> tuple[Array, ProjectionCache]:
    """x: (N, in) -> (N, out), cache. layer: a node of the parameter tree with `weight` (out, in), and maybe `bias`, and
    maybe the adapters `lora_a` (rank, in) and `lora_b` (out, rank)."""
    y, base = ops.linear(x, layer.weight, getattr(layer, "bias", None))  # (N, out)
    if not hasattr(layer, "lora_a"):
        return y, ProjectionCache(base, None, None)
    low, down = ops.linear(x, layer.lora_a)  # (N, rank)
    correction, up = ops.linear(low, layer.lora_b)  # (N, out)
    return ops.add(y, ops.scale(correction, scale)), ProjectionCache(base, down, up)


def project_backward(ops: OpTable, d_y: Array, cache: ProjectionCache, grads: Namespace, scale: float = 1.0) -> Array:
    """d_y: (N, out) -> d_x (N, in). grads: the node of the gradient tree (None in it: frozen). Adds to grads."""
    d_x = ops.linear_backward(d_y, cache.base, grads.weight, getattr(grads, "bias", None))  # (N, in)
    if cache.down is None:
        return d_x
    d_low = ops.linear_backward(ops.scale(d_y, scale), cache.up, grads.lora_b)  # (N, rank)
    return ops.add(d_x, ops.linear_backward(d_low, cache.down, grads.lora_a))
