"""The graph table for any ggml device: compositions of ggml's forward operations. See `toy.ops.graph`.

The formulas are the rules of `ggml_bridge/ops.py`. Here is what a whole model adds to them: the slots that collect the
gradients of its parameters, heads, frozen weights that are read a band at a time, and the optimizer's end of a step.
"""

import numpy as np

from ggml_bridge import ops as rules
from toy.ops.graph.recording import GraphOps, check_attention, check_trained, is_quantized


class NativeGraphOps(GraphOps):
    """The ops as compositions of ggml's forward operations, for any ggml device."""

    name = "graph-native"

    def __init__(self, graph, slots=None, finished=None):
        super().__init__(graph, slots, finished)
        self.masks = {}  # by (T_q, T_k, window)
        self.rope_factors = {}  # by their values
        # by what it is, or the tensor with the number: a row of equal numbers, as wide as the widest trained parameter
        self.rows = {}
        self.row_parts = {}  # by (what, columns)

    # -- embedding ----------------------------------------------------------------------------------------------------

    def embedding(self, token_ids, table):
        self.used(table)
        return rules.get_rows(self.graph, table, token_ids.tensor)[0], (token_ids, table)

    def embedding_backward(self, d_out, cache, d_table):
        if d_table is None:
            return
        token_ids, table = cache
        check_trained(table)
        d_out = self._contiguous(d_out)
        d_table.tensor, _ = rules.get_rows_backward(
            self.graph, d_out, None, table, token_ids.tensor, collected=d_table.tensor
        )
        self.contributed(d_table)

    # -- linear -------------------------------------------------------------------------------------------------------

    def linear(self, x, weight, bias=None):
        self.used(weight, bias)
        if is_quantized(weight):
            return self._banded_linear(x, weight, bias), (None, weight)
        y, _ = rules.matmul(self.graph, weight, x)
        return (y if bias is None else self.graph.add(y, bias)), (x, weight)

    def linear_backward(self, d_y, cache, d_weight, d_bias=None):
        x, weight = cache
        d_y = self._contiguous(d_y)
        if d_weight is not None:
            check_trained(weight)
        if is_quantized(weight):
            d_x = self._banded_linear_backward(d_y, weight)
        else:
            of_weight, d_x = rules.matmul_backward(self.graph, d_y, None, weight, x)
            self._collect(d_weight, of_weight)
        if d_bias is not None:
            self._collect(d_bias, rules.columns_summed(self.graph, d_y))
        self.contributed(d_weight, d_bias)
        return d_x

    # -- norms --------------------------------------------------------------------------------------------------------

    def rms_norm(self, x, gamma, eps=1e-5):
        self.used(gamma)
        y, kept = rules.rms_norm(self.graph, x, gamma, eps)
        return y, (kept, x, gamma)

    def rms_norm_backward(self, d_y, cache, d_gamma):
        d_x, *gradients = rules.rms_norm_backward(self.graph, self._contiguous(d_y), *cache)
        return self._collected(d_x, [d_gamma], gradients)

    def layer_norm(self, x, gamma, beta, eps=1e-5):
        self.used(gamma, beta)
        y, kept = rules.layer_norm(self.graph, x, gamma, beta, eps)
        return y, (kept, x, gamma, beta)

    def layer_norm_backward(self, d_y, cache, d_gamma, d_beta):
        d_x, *gradients = rules.layer_norm_backward(self.graph, self._contiguous(d_y), *cache)
        return self._collected(d_x, [d_gamma, d_beta], gradients)

    # -- elementwise --------------------------------------------------------------------------------------------------

    def gelu(self, x):
        y, kept = rules.gelu(self.graph, x)
        return y, (kept, x)

    def gelu_backward(self, d_y, cache):
        return rules.gelu_backward(self.graph, self._contiguous(d_y), *cache)[0]

    def geglu(self, gate, up):
        y, kept = rules.geglu(self.graph, gate, up)
        return y, (kept, gate, up)

    def geglu_backward(self, d_y, cache):
        return rules.geglu_backward(self.graph, self._contiguous(d_y), *cache)

    def softcap(self, x, cap=30.0):
        y, kept = rules.softcap(self.graph, x, cap)
        return y, (kept, x)

    def softcap_backward(self, d_y, cache):
        return rules.softcap_backward(self.graph, self._contiguous(d_y), *cache)[0]

    def silu(self, x):
        y, kept = rules.silu(self.graph, x)
        return y, (kept, x)

    def silu_backward(self, d_y, cache):
        return rules.silu_backward(self.graph, self._contiguous(d_y), *cache)[0]

    def swiglu(self, gate, up):
        y, kept = rules.swiglu(self.graph, gate, up)
        return y, (kept, gate, up)

    def swiglu_backward(self, d_y, cache):
        return rules.swiglu_backward(self.graph, self._contiguous(d_y), *cache)

    # -- rope ---------------------------------------------------------------------------------------------------------

    def rope(self, x, positions, n_heads, base=10000.0, halves=False, factors=None, magnitude=1.0):
        if factors is not None:
            factors = self._rope_factors(tuple(factors))
        options = {"base": base, "halves": halves, "factors": factors, "magnitude": magnitude}
        cache = (positions, n_heads, options)
        return self._turned(self.graph.rope, x, cache), cache

    def rope_backward(self, d_y, cache):
        return self._turned(self.graph.rope_back, d_y, cache)

    def _turned(self, rotate, x, cache):
        positions, n_heads, options = cache
        heads = self.graph.reshape(self._contiguous(x), (x.shape[0], n_heads, x.shape[1] // n_heads))
        return self.graph.reshape(rotate(heads, positions.tensor, **options), x.shape)

    def _rope_factors(self, factors):
        if factors not in self.rope_factors:
            self.rope_factors[factors] = self.constant(np.array(factors, np.float32))
        return self.rope_factors[factors]

    # -- attention ----------------------------------------------------------------------------------------------------

    def attention(self, q, k, v, batch, n_heads, n_kv_heads=None, causal=True, window=None, softcap=None):
        g, n_kv_heads = self.graph, n_kv_heads or n_heads
        check_attention(q, k, v, batch, n_heads, n_kv_heads, causal, window, softcap)
        width = q.shape[1]
        q = self._to_heads(q, batch, n_heads)  # (B, H, Tq, d_head)
        k = self._to_heads(k, batch, n_kv_heads)  # (B, G, Tk, d_head)
        v = self._to_heads(v, batch, n_kv_heads)  # (B, G, Tk, d_head)
        mask = self._mask(q.shape[2], k.shape[2], window) if causal else None
        scores, slope, factor = g.mul_mat(k, q), None, q.shape[3] ** -0.5  # (B, H, Tq, Tk)
        if softcap is not None:
            capped, slope = rules.softcap(g, g.scale(scores, factor), softcap)
            p, kept = rules.softmax(g, capped, mask)
        else:
            p, kept = rules.softmax(g, scores, mask, factor)
        out = g.mul_mat(g.transposed(v), p)  # (B, H, Tq, d_head)
        return self._from_heads(out, width), (q, k, v, p, scores, kept, slope)

    def attention_backward(self, d_out, cache):
        g = self.graph
        q, k, v, p, scores, kept, slope = cache
        (batch, n_heads), n_kv_heads = q.shape[:2], k.shape[1]
        d_out = self._to_heads(d_out, batch, n_heads)  # (B, H, Tq, d_head)
        d_p = g.mul_mat(v, d_out)  # (B, H, Tq, Tk)
        (d_scores,) = rules.softmax_backward(g, d_p, kept, scores)  # (B, H, Tq, Tk)
        if slope is not None:
            d_scores = g.scale(rules.softcap_backward(g, d_scores, slope, scores)[0], q.shape[3] ** -0.5)
        d_q = g.mul_mat(g.transposed(k), d_scores)  # (B, H, Tq, d_head)
        d_k = g.mul_mat(g.transposed(q), g.transposed(d_scores))  # (B, H, Tk, d_head)
        d_v = g.mul_mat(g.transposed(d_out), g.transposed(p))  # (B, H, Tk, d_head)
        d_k, d_v = (self._sum_groups(d, n_kv_heads) for d in (d_k, d_v))  # (B, G, Tk, d_head)
        return tuple(self._from_heads(d, d.shape[1] * d.shape[3]) for d in (d_q, d_k, d_v))

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
        """(B, H, T, d_head) -> (B, G, T, d_head): the query heads of a group share one key/value head."""
        batch, heads, t, d = x.shape
        group = heads // n_kv_heads
        if group == 1:
            return x
        x = self.graph.reshape(x, (batch * n_kv_heads, group, t * d))
        total = self.graph.cont(self.graph.slice(x, 1, 0, 1))
        for i in range(1, group):
            total = self.graph.add(total, self.graph.slice(x, 1, i, i + 1))
        return self.graph.reshape(total, (batch, n_kv_heads, t, d))

    def _mask(self, t_q, t_k, window):
        key = (t_q, t_k, window)
        if key not in self.masks:
            hidden = np.triu(np.ones((t_q, t_k), bool), k=t_k - t_q + 1)
            if window is not None:
                hidden |= np.tril(np.ones((t_q, t_k), bool), k=t_k - t_q - window)
            self.masks[key] = self.constant(np.where(hidden, -np.inf, 0.0).astype(np.float32))
        return self.masks[key]

    # -- loss and optimizer -------------------------------------------------------------------------------------------

    # The gradient that `cross_entropy_backward` gives is of the *sum* over the rows (see `toy.ops.graph`).

    def _begin_loss(self, labels, columns):
        """-> the inputs that are made of the labels: targets and weights of the rows, 1/count."""
        start = rules.loss_inputs(self.graph, labels if labels.ndim == 2 else labels.tensor, columns, self._widest())
        self.rows["1/count"] = start.inverse_count
        return start

    def _labels_of(self, start, band):
        labels = (start.target, start.weights)
        if band == slice(0, start.weights.shape[0]):
            return labels
        return tuple(self.graph.slice(tensor, 0, band.start, band.stop) for tensor in labels)

    def _losses(self, logits, labels):
        return rules.sum_of_losses(self.graph, self._contiguous(logits), *labels)

    def cross_entropy_backward(self, cache):
        return rules.sum_of_losses_backward(self.graph, *cache)

    def _add_losses(self, total, losses, start):
        return losses if total is None else self.graph.add(total, losses)

    def _mean_loss(self, total, start):
        return rules.mean_loss(self.graph, total, start.inverse_count)

    def loss_value(self, loss):
        """The mean loss, of a computed graph."""
        return float(loss.download()[0])

    def finish_gradient(self, gradient):
        """The division by the number of rows that count, which the loss left out."""
        return self._times("1/count", gradient)

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
        at_least_clip = g.scale(g.relu(g.scale(norm, 1.0, -clip)), 1.0, clip)
        return g.concat(norm, g.div(g.full((1,), clip), at_least_clip), axis=0)

    def scaled(self, gradient, factor):
        """The gradient times factor[1], of `norm_and_factor` for one."""
        if factor not in self.rows:
            self.rows[factor] = self.graph.repeat(self.graph.slice(factor, 0, 1, 2), (1, self._widest()))
        return self._times(factor, gradient)

    def adamw_step(self, weight, gradient, m, v, hp, factor=None):
        """factor: of `norm_and_factor`."""
        gradient = gradient if factor is None else self.scaled(gradient, factor)
        self.graph.opt_step_adamw(weight, gradient, m, v, hp)

    def compute(self):
        self.graph.compute()

    # -- small things -------------------------------------------------------------------------------------------------

    def _collect(self, slot, contribution):
        if slot is not None:
            slot.tensor = contribution if slot.tensor is None else self.graph.add(slot.tensor, contribution)

    def _collected(self, d_x, slots, gradients):
        """d_x, with the gradients of the parameters in their slots."""
        for slot, gradient in zip(slots, gradients, strict=True):
            self._collect(slot, gradient)
        self.contributed(*slots)
        return d_x

    def _times(self, what, gradient):
        """The gradient times the number that self.rows[what] repeats."""
        columns = gradient.shape[-1]
        if (what, columns) not in self.row_parts:
            self.row_parts[what, columns] = rules.part_of_row(self.graph, self.rows[what], columns)
        return self.graph.mul(gradient, self.row_parts[what, columns])

    def _widest(self):
        """Columns of the widest trained parameter."""
        return max((slot.shape[-1] for slot in self.slots.values()), default=1)

    def _contiguous(self, x):
        return rules.contiguous(self.graph, x)
