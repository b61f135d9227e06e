"""The graph table for decoding: a model's forward over a key/value cache in the device's memory, and no backward.

What differs from `NativeGraphOps`, whose compositions of ggml's operations the rest is:

* A product takes the weight as it is stored. ggml rounds the activations to the type that goes with it (8-bit integers in
  blocks for the quantised types, float16 for F16) and multiplies integers, as llama.cpp does.
* Keys and values are written into a cache and attention reads a fixed number of its rows, of which a mask leaves those that
  the token may see: the graph is the same for every token, until more rows are needed. Keys lie row by row (rows, K), values
  column by column (K, rows), because each is read along its last axis.
* Embeddings are looked up in the host's memory: one row a token, of tables in types that not every device can look up.
"""

from typing import Any, NamedTuple

import numpy as np

from toy.ops.graph.native import NativeGraphOps
from toy.ops.graph.recording import Integers, check_attention


class Weight:
    """A parameter of the model to decode with. leaf: an array or a `QuantizedMatrix`; place() gives it as a tensor of the
    device, when an op first asks for it (a table that is only looked up in stays where it is)."""

    def __init__(self, leaf, place):
        self.leaf, self._place, self._tensor = leaf, place, None

    @property
    def shape(self):
        return self.leaf.shape

    @property
    def tensor(self):
        if self._tensor is None:
            self._tensor = self._place()
        return self._tensor

    def take(self, ids):
        """Rows of the table, float32 (N, D). ids: whole numbers (N,)."""
        return self.leaf[ids] if isinstance(self.leaf, np.ndarray) else self.leaf.take(ids)


class Store(NamedTuple):
    """The device's memory for keys and values. keys: a tensor (rows, K) for each layer; values: the same as (K, rows), each
    a tensor (K*rows, 1), whose rows can be written one by one; rows: how many tokens fit."""

    keys: list[Any]
    values: list[Any]
    rows: int


class RecordedCache:
    """What a model takes for its key/value cache while its forward is recorded. n_rows: how many of the store's rows
    attention reads."""

    def __init__(self, ops, store, n_rows):
        self.ops, self.store, self.n_rows = ops, store, n_rows

    def extend(self, layer, k, v):
        """k, v: of the new tokens (N, K) -> all keys (n_rows, K), all values (K, rows of the store)."""
        g, ops, store = self.ops.graph, self.ops, self.store
        n, width = k.shape
        keys = g.set_rows(store.keys[layer], ops._contiguous(k), ops.cache_rows())
        column = g.reshape(ops._contiguous(v), (n * width, 1))
        values = g.set_rows(store.values[layer], column, ops.cache_columns(width, store.rows))
        return g.slice(keys, 0, 0, self.n_rows), g.reshape(values, (width, store.rows))


class DecodingOps(NativeGraphOps):
    """See above. n: tokens that a run of the graph reads. The arrays of a run are token_ids and positions, both (n,): a
    token's position is its row in the cache, too. Parameters are `Weight`s. rounded: products round the activations, so GELU
    may be ggml's own, on the CPU a table of float16 numbers: with it a text is llama.cpp's."""

    name = "graph-decoding"

    def __init__(self, graph, n, rounded=True):
        super().__init__(graph)
        self.n, self.rounded, self._places = n, rounded, {}
        self.attention_scale = None  # what scores are multiplied by, None: 1 / sqrt(d_head)

    def integers(self, role, n, limit):
        # token ids never reach the device: their embeddings do
        return Integers(n, limit, None, role) if role == "token_ids" else super().integers(role, n, limit)

    def cache_rows(self):
        """The rows of the cache that the tokens are written to, i32 (n,)."""
        if "rows" not in self._places:
            self._places["rows"] = self.feed((self.n,), "i32", lambda arrays: arrays["positions"])
        return self._places["rows"]

    def cache_columns(self, width, rows):
        """Where in (width, rows) the numbers of the tokens' values (n, width) are written, i32 (n*width,)."""
        if width not in self._places:
            begins = np.arange(width, dtype=np.int64) * rows
            self._places[width] = self.feed(
                (self.n * width,), "i32", lambda arrays: (arrays["positions"][:, None] + begins).reshape(-1)
            )
        return self._places[width]

    def embedding(self, token_ids, table):
        return self.feed((self.n, table.shape[1]), "f32", lambda arrays: table.take(arrays[token_ids.role])), None

    def linear(self, x, weight, bias=None):
        y = self.graph.mul_mat(weight.tensor, self._contiguous(x))
        return (y if bias is None else self.graph.add(y, bias.tensor)), None

    def rms_norm(self, x, gamma, eps=1e-5):
        return super().rms_norm(x, gamma.tensor, eps)

    def layer_norm(self, x, gamma, beta, eps=1e-5):
        return super().layer_norm(x, gamma.tensor, beta.tensor, eps)

    def gelu(self, x):
        return (self.graph.unary(self._contiguous(x), "gelu"), None) if self.rounded else super().gelu(x)

    def geglu(self, gate, up):
        return (self.graph.geglu(gate, up), None) if self.rounded else super().geglu(gate, up)

    def attention(self, q, k, v, batch, n_heads, n_kv_heads=None, causal=True, window=None, softcap=None):
        """q: (n, H), k: (n_rows, K), v: (K, rows), see `RecordedCache` -> (n, H)."""
        g, n_kv_heads = self.graph, n_kv_heads or n_heads
        check_attention(q, k, k, batch, n_heads, n_kv_heads, causal, window, softcap)
        (n, width), (n_rows, k_width) = q.shape, k.shape
        d = width // n_heads
        q = g.permute(g.reshape(self._contiguous(q), (n, n_heads, d)), (1, 0, 2))  # (H, n, d)
        k = g.permute(g.reshape(k, (n_rows, n_kv_heads, d)), (1, 0, 2))  # (K, n_rows, d)
        v = g.slice(g.reshape(v, (n_kv_heads, k_width // n_kv_heads, v.shape[1])), 2, 0, n_rows)  # (K, d, n_rows)
        scores, factor = g.mul_mat(k, q), self.attention_scale or d**-0.5  # (H, n, n_rows)
        if softcap is not None:
            scores, factor = g.scale(g.tanh(g.scale(scores, factor / softcap)), softcap), 1.0
        p = g.soft_max_ext(scores, self._cache_mask(n_rows, window), factor)
        out = g.permute(g.mul_mat(v, p), (1, 0, 2))  # (n, H, d)
        return g.reshape(self._contiguous(out), (n, width)), None

    def _cache_mask(self, n_rows, window):
        if window not in self.masks:
            row_numbers = np.arange(n_rows)

            def mask(arrays):
                positions = arrays["positions"][:, None]
                hidden = row_numbers > positions
                if window is not None:
                    hidden |= row_numbers <= positions - window
                return np.where(hidden, np.float32(-np.inf), np.float32(0))

            self.masks[window] = self.feed((self.n, n_rows), "f32", mask)
        return self.masks[window]
