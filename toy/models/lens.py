"""A lens: trained projections between a frozen donor embedding (V, E) and a model of another width D.

    x = L_in e[token],  L_in: (D, E)          logits = (L_out x) e^T,  L_out: (E, D)  (only when the head is tied)

Without a lens in the parameter tree these are the plain lookup and the plain head.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from toy.config import LanguageModelConfig, LlamaConfig
from toy.models.lora import look_up, look_up_backward, project, project_backward
from toy.models.parameters import Namespace, Shapes
from toy.op_table import Array, OpCache, OpTable
from toy.quantized import Leaf, dequantized


def lens_shapes(config: LanguageModelConfig, donor_width: int) -> Shapes:
    """dict of the names of the projections to their shapes."""
    shapes: Shapes = {"token_embd.lens": (config.d_model, donor_width)}
    if not getattr(config, "untied", False):
        shapes["output.lens"] = (donor_width, config.d_model)
    return shapes


def embed(
    ops: OpTable, token_ids: Array, layer: Namespace, scale: float = 1.0
) -> tuple[Array, tuple[OpCache, OpCache | None]]:
    """token_ids: (N,) -> (N, D), cache. layer: a node of the parameter tree with `weight`, and maybe `lens` or adapters,
    whose product is multiplied by `scale`."""
    x, lookup = look_up(ops, token_ids, layer, scale)  # (N, D), or (N, E) of a donor
    if not hasattr(layer, "lens"):
        return x, (lookup, None)
    x, projection = ops.linear(x, layer.lens)  # (N, D)
    return x, (lookup, projection)


def embed_backward(
    ops: OpTable, d_x: Array, cache: tuple[OpCache, OpCache | None], grads: Namespace, scale: float = 1.0
) -> None:
    """d_x: (N, D). Adds to grads, the node of the gradient tree."""
    lookup, projection = cache
    if projection is not None:
        ops.linear_backward(d_x, projection, grads.lens)  # the donor is frozen: its gradient is not wanted
    else:
        look_up_backward(ops, d_x, lookup, grads, scale)


def unembed(
    ops: OpTable, x: Array, layer: Namespace, lens: Array | None = None, scale: float = 1.0
) -> tuple[Array, tuple[OpCache, OpCache | None]]:
    """x: (N, D) -> logits (N, V), cache. layer: a node of the parameter tree with `weight` (V, D), or (V, E) of a donor with
    its `lens` (E, D), and maybe adapters, whose product is multiplied by `scale`."""
    projection = None
    if lens is not None:
        x, projection = ops.linear(x, lens)  # (N, E)
    logits, product = project(ops, x, layer, scale)  # (N, V)
    return logits, (product, projection)


def unembed_backward(
    ops: OpTable,
    d_logits: Array,
    cache: tuple[OpCache, OpCache | None],
    grads: Namespace,
    d_lens: Array | None = None,
    scale: float = 1.0,
) -> Array:
    """d_logits: (N, V) -> d_x (N, D). Adds to grads, the node of the gradient tree, and to d_lens."""
    product, projection = cache
    d_x = project_backward(ops, d_logits, product, grads, scale)
    return d_x if projection is None else ops.linear_backward(d_x, projection, d_lens)


def unembed_loss(
    ops: OpTable,
    x: Array,
    head: tuple[Namespace, Array | None],
    labels: Array,
    cap: float | None,
    d_head: tuple[Namespace, Array | None] | None,
    scale: float = 1.0,
) -> tuple[float, Any]:
    """x: (N, D), labels: of its rows -> the mean loss of the logits that `unembed` makes of x, capped, and d_x (N, D).

    head: the layer and the lens of `unembed`, d_head: those of the gradients, which are added to; None: the loss alone, None
    for d_x.
    """
    (layer, lens), projection = head, None
    if hasattr(layer, "lora_a"):  # the op that never has all logits knows of one matrix
        logits, cache = unembed(ops, x, layer, lens, scale)  # (N, V)
        logits, capped = (logits, None) if cap is None else ops.softcap(logits, cap)
        loss, loss_cache = ops.cross_entropy(logits, labels)
        if d_head is None:
            return loss, None
        d_logits = ops.cross_entropy_backward(loss_cache)  # (N, V)
        d_logits = d_logits if capped is None else ops.softcap_backward(d_logits, capped)
        return loss, unembed_backward(ops, d_logits, cache, *d_head, scale)
    if lens is not None:
        x, projection = ops.linear(x, lens)  # (N, E)
    if d_head is None:
        return ops.linear_cross_entropy(x, layer.weight, labels, cap, backward=False)
    loss, d_x = ops.linear_cross_entropy(x, layer.weight, labels, cap, d_head[0].weight)
    return loss, d_x if projection is None else ops.linear_backward(d_x, projection, d_head[1])


def without_lens(config: LlamaConfig, parameters: Mapping[str, Leaf]) -> tuple[LlamaConfig, dict[str, np.ndarray]]:
    """The same model without a lens: its config (untied now) and its parameters, float32, the donor looked at once and for
    all. parameters: dict of names to arrays; the donor's embedding may be a `toy.quantized.QuantizedMatrix`."""
    parameters = dict(parameters)
    lens_in = dequantized(parameters.pop("token_embd.lens"))  # (D, E)
    donor = dequantized(parameters.pop("token_embd.weight"))  # (V, E)
    embedding = {"token_embd.weight": donor @ lens_in.T}  # (V, D)
    if "output.lens" in parameters:
        embedding["output.weight"] = donor @ parameters.pop("output.lens")  # (V, D)
    return dataclasses.replace(config, untied=True), embedding | cast(dict[str, np.ndarray], parameters)
