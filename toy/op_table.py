"""An op table as a type: what a model may call, whatever it runs on.

`toy/ops/reference.py` has the same functions with their formulas, shapes and sources; `toy/ops/accelerated.py` has them as
compiled kernels. The tables of `toy.ops.graph` take and give nodes of a graph where the types here say arrays.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from toy.quantized import Leaf

Array = np.ndarray
OpCache = Any  # what the backward of an op needs: of the op alone, opaque to models
Result = TypeVar("Result")

# numbers of the logits that `linear_cross_entropy` has at a time (64 MB), and the rows that pay for reading a whole head
LOGITS_AT_ONCE, LEAST_ROWS = 2**24, 128


def row_bands(rows: int, columns: int) -> list[slice]:
    """Bands of rows, nearly equal, of a matrix (rows, columns) of which no more than `LOGITS_AT_ONCE` numbers, or
    `LEAST_ROWS` rows, are to be there at a time. One band where it is small."""
    bands = -(-rows // max(LOGITS_AT_ONCE // columns, LEAST_ROWS))
    ends = [rows * i // max(bands, 1) for i in range(bands + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(ends)]


class OpTable(Protocol):
    """Every op: a forward that gives `(out, cache)`, and below it a backward that takes the cache.

    A backward gives the gradients of the activations and *adds* those of the parameters into the arrays it is given (None:
    that parameter is frozen). Activations are (N, D), weights (out, in).
    """

    name: str

    def embedding(self, token_ids: Array, table: Leaf) -> tuple[Array, OpCache]: ...
    def embedding_backward(self, d_out: Array, cache: OpCache, d_table: Array | None) -> None: ...

    def linear(self, x: Array, weight: Leaf, bias: Array | None = None) -> tuple[Array, OpCache]: ...
    def linear_backward(
        self, d_y: Array, cache: OpCache, d_weight: Array | None, d_bias: Array | None = None
    ) -> Array: ...

    def add(self, a: Array, b: Array) -> Array: ...
    def scale(self, x: Array, factor: float) -> Array: ...
    def masked(self, x: Array, mask: Array) -> Array: ...
    def split(self, x: Array, widths: Sequence[int]) -> tuple[Array, ...]: ...
    def concat(self, parts: Sequence[Array]) -> Array: ...
    def reshape(self, x: Array, rows: int) -> Array: ...
    def zeros_like(self, x: Array) -> Array: ...

    def rms_norm(self, x: Array, gamma: Array, eps: float = 1e-5) -> tuple[Array, OpCache]: ...
    def rms_norm_backward(self, d_y: Array, cache: OpCache, d_gamma: Array | None) -> Array: ...

    def layer_norm(self, x: Array, gamma: Array, beta: Array, eps: float = 1e-5) -> tuple[Array, OpCache]: ...
    def layer_norm_backward(self, d_y: Array, cache: OpCache, d_gamma: Array | None, d_beta: Array | None) -> Array: ...

    def gelu(self, x: Array) -> tuple[Array, OpCache]: ...
    def gelu_backward(self, d_y: Array, cache: OpCache) -> Array: ...

    def geglu(self, gate: Array, up: Array) -> tuple[Array, OpCache]: ...
    def geglu_backward(self, d_y: Array, cache: OpCache) -> tuple[Array, Array]: ...

    def softcap(self, x: Array, cap: float = 30.0) -> tuple[Array, OpCache]: ...
    def softcap_backward(self, d_y: Array, cache: OpCache) -> Array: ...

    def silu(self, x: Array) -> tuple[Array, OpCache]: ...
    def silu_backward(self, d_y: Array, cache: OpCache) -> Array: ...

    def swiglu(self, gate: Array, up: Array) -> tuple[Array, OpCache]: ...
    def swiglu_backward(self, d_y: Array, cache: OpCache) -> tuple[Array, Array]: ...

    def rope(
        self,
        x: Array,
        positions: Array,
        n_heads: int,
        base: float = 10000.0,
        halves: bool = False,
        factors: Sequence[float] | None = None,
        magnitude: float = 1.0,
    ) -> tuple[Array, OpCache]: ...
    def rope_backward(self, d_y: Array, cache: OpCache) -> Array: ...

    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        batch: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        causal: bool = True,
        window: int | None = None,
        softcap: float | None = None,
    ) -> tuple[Array, OpCache]: ...
    def attention_backward(self, d_out: Array, cache: OpCache) -> tuple[Array, Array, Array]: ...

    def cross_entropy(self, logits: Array, labels: Array) -> tuple[float, OpCache]: ...
    def cross_entropy_backward(self, cache: OpCache) -> Array: ...

    def linear_cross_entropy(
        self,
        x: Array,
        weight: Leaf,
        labels: Array,
        cap: float | None = None,
        d_weight: Array | None = None,
        backward: bool = True,
    ) -> tuple[float, Any]: ...

    def again(self, forward: Callable[[], Result]) -> Result: ...

    def adamw_step(
        self, weight: Array, gradient: Array, m: Array, v: Array, hp: Array, factor: float | None = None
    ) -> None: ...
    def sum_of_squares(self, x: Array) -> float: ...
