"""A lens: trained projections between a frozen donor embedding (V, E) and a model of another width D.

    x = L_in e[token],  L_in: (D, E)          logits = (L_out x) e^T,  L_out: (E, D)  (only when the head is tied)

Without a lens in the parameter tree these are the plain lookup and the plain head.
"""

import dataclasses

from toy.quantized import dequantized


def lens_shapes(config, donor_width):
    """dict of the names of the projections to their shapes."""
    shapes = {"token_embd.lens": (config.d_model, donor_width)}
    if not getattr(config, "untied", False):
        shapes["output.lens"] = (donor_width, config.d_model)
    return shapes


def embed(ops, token_ids, layer):
    """token_ids: (N,) -> (N, D), cache. layer: a node of the parameter tree with `weight`, and maybe `lens`."""
    x, lookup = ops.embedding(token_ids, layer.weight)  # (N, D), or (N, E) of a donor
    if not hasattr(layer, "lens"):
        return x, (lookup, None)
    x, projection = ops.linear(x, layer.lens)  # (N, D)
    return x, (lookup, projection)


def embed_backward(ops, d_x, cache, grads):
    """d_x: (N, D). Adds to grads, the node of the gradient tree."""
    lookup, projection = cache
    if projection is not None:
        ops.linear_backward(d_x, projection, grads.lens)  # the donor is frozen: its gradient is not wanted
    else:
        ops.embedding_backward(d_x, lookup, grads.weight)


def unembed(ops, x, weight, lens=None):
    """x: (N, D) -> logits (N, V), cache. weight: (V, D), or (V, E) of a donor with its `lens` (E, D)."""
    projection = None
    if lens is not None:
        x, projection = ops.linear(x, lens)  # (N, E)
    logits, product = ops.linear(x, weight)  # (N, V)
    return logits, (product, projection)


def unembed_backward(ops, d_logits, cache, d_weight, d_lens=None):
    """d_logits: (N, V) -> d_x (N, D). Adds to the gradients."""
    product, projection = cache
    d_x = ops.linear_backward(d_logits, product, d_weight)
    return d_x if projection is None else ops.linear_backward(d_x, projection, d_lens)


def without_lens(config, parameters):
    """The same model without a lens: its config (untied now) and its parameters, float32, the donor looked at once and for
    all. parameters: dict of names to arrays; the donor's embedding may be a `toy.quantized.QuantizedMatrix`."""
    parameters = dict(parameters)
    lens_in, donor = parameters.pop("token_embd.lens"), parameters.pop("token_embd.weight")
    donor = dequantized(donor)  # (V, E)
    embedding = {"token_embd.weight": donor @ lens_in.T}  # (V, D)
    if "output.lens" in parameters:
        embedding["output.weight"] = donor @ parameters.pop("output.lens")  # (V, D)
    return dataclasses.replace(config, untied=True), embedding | parameters
