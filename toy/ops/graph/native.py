"""The graph table for any ggml device: compositions of ggml's forward operations. See `toy.ops.graph`."""

import numpy as np

from toy.ops.graph.recording import GraphOps, Integers, check_trained, is_quantized


class NativeGraphOps(GraphOps):
    """The ops as compositions of ggml's forward operations, for any ggml device.

    `mul_mat(a, b)` is b a^T, so y = x W^T needs no transposed copy, and the two products of its backward need one each.
    """

    name = "graph-native"

    def __init__(self, graph, slots=None, finished=None):
        super().__init__(graph, slots, finished)
        self.transposes = {}  # by id: (tensor, its transposed copy)
        self.masks = {}  # by (T_q, T_k)
        self.inverse_count = None  # (1,) 1 / rows that count, set by cross_entropy

    def integers(self, role, n, limit):
        ids = Integers(role, n, limit)
        if role != "labels":  # what labels are used for is fed by cross_entropy
            ids.tensor = self.feed((n,), "i32", lambda arrays: arrays[role])
        return ids

    def transposed(self, x):
        """A contiguous copy of x^T, (columns, rows); one copy however often it is asked for."""
        if id(x) not in self.transposes:
            self.transposes[id(x)] = (x, self.graph.cont(self.graph.transpose(x)))
        return self.transposes[id(x)][1]

    def column_sums(self, x):
        """(N, D) -> (D,)."""
        return self.graph.reshape(self.graph.sum_rows(self.transposed(x)), (x.shape[1],))

    # -- embedding ----------------------------------------------------------------------------------------------------

    def embedding(self, token_ids, table):
        self.used(table)
        return self.graph.get_rows(table, token_ids.tensor), (token_ids, table)

    def embedding_backward(self, d_out, cache, d_table):
        if d_table is None:
            return
        token_ids, table = cache
        check_trained(table)
        graph, n, rows = self.graph, token_ids.n, table.shape[0]
        # d_table = one_hot^T d_out; row v of one_hot^T (V, N) has a 1 where token n is v, at the flat index v*N + n
        flat = self.feed((n,), "i32", lambda arrays: arrays[token_ids.role] * n + np.arange(n))
        one_hot = graph.set_rows(graph.full((rows * n, 1), 0.0), graph.full((n, 1), 1.0), flat)
        self._collect(d_table, graph.mul_mat(self.transposed(d_out), graph.reshape(one_hot, (rows, n))))
        self.contributed(d_table)

    # -- linear -------------------------------------------------------------------------------------------------------

    def linear(self, x, weight, bias=None):
        self.used(weight, bias)
        if is_quantized(weight):
            return self._banded_linear(x, weight, bias), (None, weight)
        y = self.graph.mul_mat(weight, x)
        return (y if bias is None else self.graph.add(y, bias)), (x, weight)

    def linear_backward(self, d_y, cache, d_weight, d_bias=None):
        x, weight = cache
        d_y = self._contiguous(d_y)
        if is_quantized(weight):
            d_x = self._banded_linear_backward(d_y, weight)
        else:
            d_x = self.graph.mul_mat(self.transposed(weight), d_y)
        if d_weight is not None:
            check_trained(weight)
            self._collect(d_weight, self.graph.mul_mat(self.transposed(x), self.transposed(d_y)))
        if d_bias is not None:
            self._collect(d_bias, self.column_sums(d_y))
        self.contributed(d_weight, d_bias)
        return d_x

    # -- norms --------------------------------------------------------------------------------------------------------

    def rms_norm(self, x, gamma, eps=1e-5):
        self.used(gamma)
        x_hat = self.graph.rms_norm(x, eps)
        return self.graph.mul(x_hat, gamma), (x, x_hat, gamma, eps)

    def rms_norm_backward(self, d_y, cache, d_gamma):
        g = self.graph
        x, x_hat, gamma, eps = cache
        if d_gamma is not None:
            self._collect(d_gamma, self.column_sums(g.mul(d_y, x_hat)))
        d_x_hat = g.mul(d_y, gamma)
        projected = g.sub(d_x_hat, g.mul(x_hat, g.mean(g.mul(d_x_hat, x_hat))))
        std = g.sqrt(g.scale(g.mean(g.sqr(x)), 1.0, eps))  # (N, 1)
        d_x = g.div(projected, std)
        self.contributed(d_gamma)
        return d_x

    def layer_norm(self, x, gamma, beta, eps=1e-5):
        self.used(gamma, beta)
        x_hat = self.graph.norm(x, eps)
        return self.graph.add(self.graph.mul(x_hat, gamma), beta), (x, x_hat, gamma, eps)

    def layer_norm_backward(self, d_y, cache, d_gamma, d_beta):
        g = self.graph
        x, x_hat, gamma, eps = cache
        if d_gamma is not None:
            self._collect(d_gamma, self.column_sums(g.mul(d_y, x_hat)))
        if d_beta is not None:
            self._collect(d_beta, self.column_sums(d_y))
        d_x_hat = g.mul(d_y, gamma)
        projected = g.sub(g.sub(d_x_hat, g.mean(d_x_hat)), g.mul(x_hat, g.mean(g.mul(d_x_hat, x_hat))))
        centred = g.sub(x, g.mean(x))
        std = g.sqrt(g.scale(g.mean(g.sqr(centred)), 1.0, eps))  # (N, 1)
        d_x = g.div(projected, std)
        self.contributed(d_gamma, d_beta)
        return d_x

    # -- elementwise: GELU is composed, because ggml's own is a table of half-precision numbers on the CPU ----------------

    def gelu(self, x):
        g = self.graph
        square = g.sqr(x)
        tanh = g.tanh(g.mul(x, g.scale(square, _GELU_SCALE * _GELU_CUBIC, _GELU_SCALE)))
        return g.mul(g.scale(x, 0.5), g.scale(tanh, 1.0, 1.0)), (x, tanh)

    def gelu_backward(self, d_y, cache):
        g = self.graph
        x, tanh = cache
        d_inner = g.scale(g.sqr(x), 3 * _GELU_SCALE * _GELU_CUBIC, _GELU_SCALE)
        d_tanh = g.mul(g.scale(g.sqr(tanh), -0.5, 0.5), g.mul(x, d_inner))
        return g.mul(d_y, g.add(g.scale(tanh, 0.5, 0.5), d_tanh))

    def silu(self, x):
        return self.graph.silu(x), (x,)

    def silu_backward(self, d_y, cache):
        return self.graph.silu_back(d_y, cache[0])

    def swiglu(self, gate, up):
        return self.graph.mul(self.graph.silu(gate), up), (gate, up)

    def swiglu_backward(self, d_y, cache):
        g = self.graph
        gate, up = cache
        return g.silu_back(g.mul(d_y, up), gate), g.mul(d_y, g.silu(gate))

    # -- rope ---------------------------------------------------------------------------------------------------------

    def rope(self, x, positions, n_heads, base=10000.0):
        heads = self.graph.reshape(self._contiguous(x), (x.shape[0], n_heads, x.shape[1] // n_heads))
        turned = self.graph.rope(heads, positions.tensor, base=base)
        return self.graph.reshape(turned, x.shape), (positions, n_heads, base)

    def rope_backward(self, d_y, cache):
        positions, n_heads, base = cache
        heads = self.graph.reshape(self._contiguous(d_y), (d_y.shape[0], n_heads, d_y.shape[1] // n_heads))
        return self.graph.reshape(self.graph.rope_back(heads, positions.tensor, base=base), d_y.shape)

    # -- attention ----------------------------------------------------------------------------------------------------

    def attention(self, q, k, v, batch, n_heads, n_kv_heads=None, causal=True):
        g, n_kv_heads = self.graph, n_kv_heads or n_heads
        width = q.shape[1]
        q = self._to_heads(q, batch, n_heads)  # (B, H, Tq, d)
        k = self._to_heads(k, batch, n_kv_heads)  # (B, K, Tk, d)
        v = self._to_heads(v, batch, n_kv_heads)  # (B, K, Tk, d)
        mask = self._mask(q.shape[2], k.shape[2]) if causal else None
        p = g.soft_max_ext(g.mul_mat(k, q), mask, q.shape[3] ** -0.5)  # (B, H, Tq, Tk)
        out = g.mul_mat(g.cont(g.transpose(v)), p)  # (B, H, Tq, d)
        return self._from_heads(out, width), (q, k, v, p, batch, n_heads, n_kv_heads)

    def attention_backward(self, d_out, cache):
        g = self.graph
        q, k, v, p, batch, n_heads, n_kv_heads = cache
        d_out = self._to_heads(d_out, batch, n_heads)  # (B, H, Tq, d)
        d_p = g.mul_mat(v, d_out)  # (B, H, Tq, Tk)
        d_s = g.mul(p, g.sub(d_p, g.sum_rows(g.mul(d_p, p))))
        d_s = g.scale(d_s, q.shape[3] ** -0.5)  # (B, H, Tq, Tk)
        d_q = g.mul_mat(g.cont(g.transpose(k)), d_s)  # (B, H, Tq, d)
        d_k = g.mul_mat(g.cont(g.transpose(q)), g.cont(g.transpose(d_s)))  # (B, H, Tk, d)
        d_v = g.mul_mat(g.cont(g.transpose(d_out)), g.cont(g.transpose(p)))  # (B, H, Tk, d)
        d_k, d_v = (self._sum_groups(d, n_kv_heads) for d in (d_k, d_v))  # (B, K, Tk, d)
        return tuple(self._from_heads(d, d.shape[1] * d.shape[3]) for d in (d_q, d_k, d_v))

    def concat(self, parts):
        whole = parts[0]
        for part in parts[1:]:
            whole = self.graph.concat(whole, part, axis=1)
        return whole

    def _to_heads(self, x, batch, heads):
        """(B*T, heads*d) -> (B, heads, T, d), contiguous."""
        rows, width = x.shape
        x = self.graph.reshape(self._contiguous(x), (batch, rows // batch, heads, width // heads))
        return self.graph.cont(self.graph.permute(x, (0, 2, 1, 3)))

    def _from_heads(self, x, width):
        """(B, heads, T, d) -> (B*T, heads*d)."""
        rows = x.shape[0] * x.shape[2]
        return self.graph.reshape(self.graph.cont(self.graph.permute(x, (0, 2, 1, 3))), (rows, width))

    def _sum_groups(self, x, n_kv_heads):
        """(B, H, T, d) -> (B, K, T, d): the query heads of a group share one key/value head."""
        batch, heads, t, d = x.shape
        group = heads // n_kv_heads
        if group == 1:
            return x
        x = self.graph.reshape(x, (batch * n_kv_heads, group, t * d))
        total = self.graph.cont(self.graph.slice(x, 1, 0, 1))
        for i in range(1, group):
            total = self.graph.add(total, self.graph.slice(x, 1, i, i + 1))
        return self.graph.reshape(total, (batch, n_kv_heads, t, d))

    def _mask(self, t_q, t_k):
        if (t_q, t_k) not in self.masks:
            future = np.triu(np.ones((t_q, t_k), bool), k=t_k - t_q + 1)
            self.masks[t_q, t_k] = self.constant(np.where(future, -np.inf, 0.0).astype(np.float32))
        return self.masks[t_q, t_k]

    # -- loss and optimizer -------------------------------------------------------------------------------------------

    def cross_entropy(self, logits, labels):
        """The gradient that `cross_entropy_backward` gives is of the *sum* over the rows (see the top of the file); a loss
        above 87 nats (a probability below the smallest float32) is reported as 87."""
        g = self.graph
        n, vocab = logits.shape
        p = g.soft_max_ext(logits)  # (N, V)
        dense = labels.ndim == 2
        count = _count_rows if dense else _count_labels
        self.inverse_count = self.feed((1,), "f32", lambda arrays: 1.0 / count(arrays["labels"]))
        if dense:
            log_p = g.log(self._at_least(p, _SMALLEST))
            total = g.neg(g.sum(g.mul(labels, log_p)))
            return g.mul(total, self.inverse_count), (p, labels, None, None)
        # the flat index of each row's target among the N*V probabilities; a row that does not count has weight 0
        flat = self.feed((n,), "i32", lambda arrays: np.arange(n) * vocab + np.maximum(arrays["labels"], 0))
        weights = self.feed((n, 1), "f32", lambda arrays: np.float32(arrays["labels"] >= 0)[:, None])
        target = g.get_rows(g.reshape(p, (n * vocab, 1)), flat)  # (N, 1)
        log_p = g.log(self._at_least(target, _SMALLEST))
        total = g.neg(g.sum(g.mul(log_p, weights)))
        return g.mul(total, self.inverse_count), (p, None, (flat, target), weights)

    def cross_entropy_backward(self, cache):
        g = self.graph
        p, rows, target, weights = cache
        if rows is not None:
            return g.sub(g.mul(p, g.sum_rows(rows)), rows)
        flat, target_p = target
        n, vocab = p.shape
        # softmax - one_hot: only the target's entry of each row changes
        d_logits = g.set_rows(g.reshape(p, (n * vocab, 1)), g.scale(target_p, 1.0, -1.0), flat)
        return g.mul(g.reshape(d_logits, (n, vocab)), weights)

    def loss_value(self, loss):
        """The mean loss, of a computed graph."""
        return float(loss.download()[0])

    def finish_gradient(self, gradient):
        """The division by the number of rows that count, which the loss left out."""
        return self.graph.mul(gradient, self.inverse_count)

    def squares(self, slot):
        """A tensor that holds the sum of squares of a gradient, for `norm_and_factor`."""
        return self.graph.sum(self.graph.sqr(slot.tensor))

    def norm_and_factor(self, squares, clip):
        """(2,): the L2 norm of the whole gradient, and the factor that makes it at most `clip` (None: any length)."""
        g = self.graph
        total = squares[0]
        for part in squares[1:]:
            total = g.add(total, part)
        norm = g.sqrt(total)
        if clip is None:
            return g.concat(norm, g.full((1,), 1.0), axis=0)
        return g.concat(norm, g.div(g.full((1,), clip), self._at_least(norm, clip)), axis=0)

    def scaled(self, gradient, factor):
        """The gradient times the factor of `norm_and_factor`."""
        return self.graph.mul(gradient, self.graph.slice(factor, 0, 1, 2))

    def adamw_step(self, weight, gradient, m, v, hp):
        self.graph.opt_step_adamw(weight, gradient, m, v, hp)

    def compute(self):
        self.graph.compute()

    # -- small things -------------------------------------------------------------------------------------------------

    def _collect(self, slot, contribution):
        slot.tensor = contribution if slot.tensor is None else self.graph.add(slot.tensor, contribution)

    def _contiguous(self, x):
        return x if x.is_contiguous else self.graph.cont(x)

    def _at_least(self, x, low):
        """max(x, low), elementwise."""
        return self.graph.scale(self.graph.relu(self.graph.scale(x, 1.0, -low)), 1.0, low)


_GELU_SCALE = 0.7978845608028654  # sqrt(2/pi)
_GELU_CUBIC = 0.044715
_SMALLEST = 1e-37  # just above the smallest normal float32


def _count_labels(labels):
    return np.full(1, max(np.count_nonzero(labels >= 0), 1))


def _count_rows(rows):
    return np.full(1, max(np.count_nonzero(rows.any(axis=1)), 1))
