"""A lens: trained projections between a frozen donor embedding (V, E) and a model of another width D.

    x = L_in e[token],  L_in: (D, E)          logits = (L_out x) e^T,  L_out: (E, D)  (only when the head is tied)

Without a lens in the parameter tree these are the plain lookup and the plain head.
"""

import dataclasses
from collections.abc import Mapping
from typing import cast

import numpy as np

from toy.config import LanguageModelConfig, LlamaConfig
from toy.models.parameters import Namespace, Shapes
from toy.op_table import Array, OpCache, OpTable
from toy.quantized import Leaf, dequantized


def lens_shapes(config: LanguageModelConfig, donor_width: int) -> Shapes:
    """dict of the names of the projections to their shapes."""
    shapes: Shapes = {"token_embd.lens": (config.d_model, donor_width)}
    if not getattr(config, "untied", False):
        shapes["output.lens"] = (donor_width, config.d_model)
    return shapes


def embed(ops: OpTable, token_ids: Array, layer: Namespace) -> tuple[Array, tuple[OpCache, OpCache | None]]:
    """token_ids: (N,) -> (N, D), cache. layer: a node of the parameter tree with `weight`, and maybe `lens`."""
    x, lookup = ops.embedding(token_ids, layer.weight)  # (N, D), or (N, E) of a donor
    if not hasattr(layer, "lens"):
        return x, (lookup, None)
    x, projection = ops.linear(x, layer.lens)  # (N, D)
    return x, (lookup, projection)


def embed_backward(ops: OpTable, d_x: Array, cache: tuple[OpCache, OpCache | None], grads: Namespace) -> None:
    """d_x: (N, D). Adds to grads, the node of the gradient tree."""
    lookup, projection = cache
    if projection is not None:
        ops.linear_backward(d_x, projection, grads.lens)  # the donor is frozen: its gradient is not wanted
    else:
        ops.embedding_backward(d_x, lookup, grads.weight)


def unembed(
    ops: OpTable, x: Array, weight: Leaf, lens: Array | None = None
) -> tuple[Array, tuple[OpCache, OpCache | None]]:
    """x: (N, D) -> logits (N, V), cache. weight: (V, D), or (V, E) of a donor with its `lens` (E, D)."""
    projection = None
    if lens is not None:
        x, projection = ops.linear(x, lens)  # (N, E)
    logits, product = ops.linear(x, weight)  # (N, V)
    return logits, (product, projection)


def unembed_backward(
    ops: OpTable,
    d_logits: Array,
    cache: tuple[OpCache, OpCache | None],
    d_weight: Array | None,
    d_lens: Array | None = None,
) -> Array:
    """d_logits: (N, V) -> d_x (N, D). Adds to the gradients."""
    product, projection = cache
    d_x = ops.linear_backward(d_logits, product, d_weight)
    return d_x if projection is None else ops.linear_backward(d_x, projection, d_lens)


def unembed_loss(
    ops: OpTable,
    x: Array,
    head: tuple[Leaf, Array | None],
    labels: Array,
    cap: float | None,
    d_head: tuple[Array | None, Array | None] | None,
) -> tuple[float, Array | None]:
    """x: (N, D), labels: of its rows -> the mean loss of the logits that `unembed` makes of x, capped, and d_x (N, D).

    head: weight and lens, d_head: their gradients, which are added to; None: the loss alone, None for d_x.
    """
    (weight, lens), projection = head, None
    if lens is not None:
        x, projection = ops.linear(x, lens)  # (N, E)
    if d_head is None:
        return ops.linear_cross_entropy(x, weight, labels, cap, backward=False)
    loss, d_x = ops.linear_cross_entropy(x, weight, labels, cap, d_head[0])
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
