"""The graph table for the CPU: one node per op, computed by the project's own kernels. See `toy.ops.graph`."""

import struct

import numpy as np

from toy.ops.graph.recording import GraphOps, Integers, check_trained, is_quantized


class CpuGraphOps(GraphOps):
    """The ops as nodes computed by the project's kernels (CPU only)."""

    name = "graph-cpu"

    def __init__(self, graph, slots=None, finished=None):
        from ggml_bridge import kernels

        super().__init__(graph, slots, finished)
        self.kernels = kernels
        self.n_threads = graph.backend.n_threads
        self.scratch = {}  # by size: nodes that need some use the same memory, one after the other
        self.again = {}  # by id: (cheap result, what records it once more)
        self.nodes = {}  # by name of a kernel: how many nodes there are of it

    def integers(self, role, n, limit):
        ids = super().integers(role, n, limit)
        # int64, what the kernels read: two int32 each
        ids.tensor = self._node(self.kernels.WIDEN, [ids.narrow], (n, 2), dtype="i32", n_tasks=1)
        return ids

    def _node(self, kernel, *arguments, **options):
        """A node that a kernel computes, named after it: "linear 3"."""
        return self.graph.custom(kernel, *arguments, name=self._name(kernel), **options)

    def _node_into(self, kernel, *arguments, **options):
        return self.graph.custom_into(kernel, *arguments, name=self._name(kernel), **options)

    def _name(self, kernel):
        name = self.kernels.NAMES[id(kernel)]
        self.nodes[name] = self.nodes.get(name, 0) + 1
        return f"{name} {self.nodes[name]}"

    # -- embedding ----------------------------------------------------------------------------------------------------

    def embedding(self, token_ids, table):
        self.used(table)
        inputs, shape = [token_ids.tensor, table], (token_ids.n, table.shape[1])
        if not is_quantized(table):
            return self._node(self.kernels.EMBEDDING, inputs, shape), (token_ids, table)
        kind = self.kernels.quantized_type(table.dtype)
        if kind is None:
            out = self.graph.get_rows(table, token_ids.narrow)
        else:
            out = self._node(self.kernels.QUANTIZED_EMBEDDING, inputs, shape, params=kind)
        return out, (token_ids, table)

    def embedding_backward(self, d_out, cache, d_table):
        if d_table is not None:
            check_trained(cache[1])
            self._into(d_table, self.kernels.EMBEDDING_BACKWARD, [cache[0].tensor, d_out])
            self.contributed(d_table)

    # -- linear -------------------------------------------------------------------------------------------------------

    def linear(self, x, weight, bias=None):
        self.used(weight, bias)
        _same("linear", "the columns of x and weight", x.shape[1], weight.shape[1])
        if is_quantized(weight):
            return self._quantized_linear(x, weight, bias), (None, weight)
        inputs = [x, weight] if bias is None else [x, weight, bias]
        return self._node(self.kernels.LINEAR, inputs, (x.shape[0], weight.shape[0])), (x, weight)

    def linear_backward(self, d_y, cache, d_weight, d_bias=None):
        x, weight = cache
        _same("linear_backward", "the columns of d_y and the rows of weight", d_y.shape[1], weight.shape[0])
        if d_weight is not None:
            check_trained(weight)
        if is_quantized(weight):
            d_x = self._quantized_linear_backward(d_y, weight)
        else:
            shape = (d_y.shape[0], weight.shape[1])
            d_x = self._node(self.kernels.LINEAR_BACKWARD_INPUT, [d_y, weight], shape)
        if d_weight is not None:
            self._weight_gradient(d_y, x, d_weight, d_bias)
        elif d_bias is not None:
            rows = d_y if d_y.is_contiguous else self.graph.cont(d_y)
            self._into(d_bias, self.kernels.ADD_PARTIALS, [rows])
            self.contributed(d_bias)
        return d_x

    def _quantized_linear(self, x, weight, bias):
        kind = self.kernels.quantized_type(weight.dtype)
        if kind is None:
            return self._banded_linear(x, weight, bias)
        scratch = self._quantized_scratch(weight)
        inputs = [x, weight, scratch] if bias is None else [x, weight, scratch, bias]
        shape = (x.shape[0], weight.shape[0])
        return self._node(self.kernels.QUANTIZED_LINEAR, inputs, shape, params=kind, writes=[scratch])

    def _quantized_linear_backward(self, d_y, weight):
        kind = self.kernels.quantized_type(weight.dtype)
        if kind is None:
            return self._banded_linear_backward(d_y, weight)
        scratch = self._quantized_scratch(weight)
        kernel, shape = self.kernels.QUANTIZED_LINEAR_BACKWARD_INPUT, (d_y.shape[0], weight.shape[1])
        return self._node(kernel, [d_y, weight, scratch], shape, params=kind, writes=[scratch])

    def _quantized_scratch(self, weight):
        n_out, n_in = weight.shape
        return self._shared(self.n_threads * self.kernels.quantized_floats(n_in, n_out))

    def _cheap(self, result, record):
        """Mark a result that the backward computes again rather than keeps: its memory is free in between."""
        self.again[id(result)] = (result, record)
        return result

    def _recomputed(self, x):
        """x, or a fresh copy of it if it is a cheap result (one copy for all its backward uses)."""
        if id(x) not in self.again:
            return x
        result, record = self.again[id(x)]
        if callable(record):
            record = record()
            self.again[id(x)] = (result, record)
        return record

    def _weight_gradient(self, d_y, x, d_weight, d_bias):
        x = self._recomputed(x)
        kernel, first = self.kernels.LINEAR_BACKWARD_WEIGHT, d_weight.tensor is None
        inputs = [d_y, x]
        if d_bias is not None:
            if first != (d_bias.tensor is None):
                raise ValueError(f"{d_weight.name} and {d_bias.name} must be used together")
            d_bias.tensor = d_bias.tensor or self.graph.blank(d_bias.shape)
            inputs.append(d_bias.tensor)
        if first:  # nothing to add to: the product is written, which saves filling a matrix with zeros
            d_weight.tensor = self._node(kernel, inputs, d_weight.shape, params=struct.pack("q", 0), writes=inputs[2:])
        else:
            d_weight.tensor = self._node_into(kernel, d_weight.tensor, inputs, params=struct.pack("q", 1))
        self.contributed(d_weight, d_bias)

    # -- norms --------------------------------------------------------------------------------------------------------

    def rms_norm(self, x, gamma, eps=1e-5):
        return self._norm(self.kernels.RMS_NORM, x, [gamma], eps)

    def layer_norm(self, x, gamma, beta, eps=1e-5):
        return self._norm(self.kernels.LAYER_NORM, x, [gamma, beta], eps)

    def _norm(self, kernel, x, parameters, eps):
        self.used(*parameters)
        _same("norm", "the columns of x and gamma", (x.shape[1],), parameters[0].shape)
        statistics = self.graph.blank((2, x.shape[0]))  # 1/std and, for LayerNorm, the mean of each row
        inputs = [x, parameters[0], statistics, *parameters[1:]]

        def record():
            return self._node(kernel, inputs, x.shape, params=struct.pack("f", eps), writes=[statistics])

        return self._cheap(record(), record), (x, parameters[0], statistics)

    def rms_norm_backward(self, d_y, cache, d_gamma):
        return self._norm_backward(self.kernels.RMS_NORM_BACKWARD, d_y, cache, [d_gamma])

    def layer_norm_backward(self, d_y, cache, d_gamma, d_beta):
        return self._norm_backward(self.kernels.LAYER_NORM_BACKWARD, d_y, cache, [d_gamma, d_beta])

    def _norm_backward(self, kernel, d_y, cache, slots):
        x, gamma, statistics = cache
        slots = [slot for slot in slots if slot is not None]
        partials = [self.graph.blank((self.n_threads, x.shape[1])) for _ in slots]  # one row a thread
        d_x = self._node(kernel, [d_y, x, gamma, statistics, *partials], x.shape, writes=partials)
        for slot, partial in zip(slots, partials):
            self._into(slot, self.kernels.ADD_PARTIALS, [partial])
        self.contributed(*slots)
        return d_x

    # -- elementwise --------------------------------------------------------------------------------------------------

    def gelu(self, x):
        def record():
            return self._node(self.kernels.GELU, [x], x.shape)

        return self._cheap(record(), record), (x,)

    def gelu_backward(self, d_y, cache):
        return self._node(self.kernels.GELU_BACKWARD, [cache[0], d_y], d_y.shape)

    def silu(self, x):
        return self._node(self.kernels.SILU, [x], x.shape), (x,)

    def silu_backward(self, d_y, cache):
        return self._node(self.kernels.SILU_BACKWARD, [cache[0], d_y], d_y.shape)

    def swiglu(self, gate, up):
        def record():
            return self._node(self.kernels.SWIGLU, [gate, up], gate.shape)

        return self._cheap(record(), record), (gate, up)

    def swiglu_backward(self, d_y, cache):
        rows, width = d_y.shape
        both = self._node(self.kernels.SWIGLU_BACKWARD, [*cache, d_y], (rows, 2 * width))
        return self.split(both, (width, width))

    # -- rope ---------------------------------------------------------------------------------------------------------

    def rope(self, x, positions, n_heads, base=10000.0):
        d_head = x.shape[1] // n_heads
        frequencies = float(base) ** (-np.arange(0, d_head, 2) / d_head)
        angles = np.arange(positions.limit)[:, None] * frequencies  # (context, d_head/2) float64
        cache = (positions, self._table(np.cos(angles)), self._table(np.sin(angles)), n_heads)
        return self._turn(x, cache, 1), cache

    def rope_backward(self, d_y, cache):
        return self._turn(d_y, cache, -1)

    def _turn(self, x, cache, direction):
        positions, cosines, sines, n_heads = cache
        numbers = struct.pack("2q", n_heads, direction)
        return self._node(self.kernels.ROPE, [x, positions.tensor, cosines, sines], x.shape, params=numbers)

    def _table(self, array):
        array = array.astype(np.float32)
        key = array.tobytes()
        if key not in self.scratch:
            self.scratch[key] = self.constant(array)
        return self.scratch[key]

    # -- attention ----------------------------------------------------------------------------------------------------

    def attention(self, q, k, v, batch, n_heads, n_kv_heads=None, causal=True):
        n_kv_heads = n_kv_heads or n_heads
        numbers = struct.pack("4q", batch, n_heads, n_kv_heads, int(causal))
        log_sum = self.graph.blank((batch * n_heads, q.shape[0] // batch))
        scratch = self._scratch(k.shape[0] // batch)
        inputs = [q, k, v, log_sum, scratch]
        out = self._node(self.kernels.ATTENTION, inputs, q.shape, params=numbers, writes=[log_sum, scratch])
        return out, (inputs, out, numbers)

    def attention_backward(self, d_out, cache):
        inputs, out, numbers = cache
        widths = [matrix.shape[1] for matrix in inputs[:3]]
        shape = (d_out.shape[0], sum(widths))
        scratch = inputs[4]
        kernel, inputs = self.kernels.ATTENTION_BACKWARD, [*inputs, d_out, out]
        both = self._node(kernel, inputs, shape, params=numbers, writes=[scratch])
        return _Columns(self.split(both, widths), both)

    def _scratch(self, t_k):
        return self._shared(self.n_threads * self.kernels.attention_scratch_floats(t_k))

    def _shared(self, floats):
        """Memory of that size for whatever one node writes down while it runs."""
        if floats not in self.scratch:
            self.scratch[floats] = self.graph.blank((floats,))
        return self.scratch[floats]

    def concat(self, parts):
        if isinstance(parts, _Columns):
            return parts.whole
        whole = parts[0]
        for part in parts[1:]:
            whole = self.graph.concat(whole, part, axis=1)
        return whole

    # -- loss and optimizer -------------------------------------------------------------------------------------------

    def cross_entropy(self, logits, labels):
        dense = labels.ndim == 2
        source = labels if dense else labels.tensor
        statistics = self.graph.blank((4, logits.shape[0]))
        numbers = struct.pack("q", int(dense))
        statistics = self._node_into(self.kernels.CROSS_ENTROPY, statistics, [logits, source], params=numbers)
        loss = self._node(self.kernels.MEAN_LOSS, [statistics], (2,), n_tasks=1)
        return loss, (logits, source, statistics, loss, numbers)

    def cross_entropy_backward(self, cache):
        logits, source, statistics, loss, numbers = cache
        # the gradient takes the place of the logits, which nothing reads any more
        return self._node_into(self.kernels.CROSS_ENTROPY_BACKWARD, logits, [source, statistics, loss], params=numbers)

    def loss_value(self, loss):
        """The mean loss, of a computed graph."""
        return float(loss.download()[0])

    def squares(self, slot):
        """A tensor that holds the sum of squares of a gradient, for `norm_and_factor`."""
        return self._node(self.kernels.SQUARES, [slot.tensor], (2 * self.n_threads,))

    def norm_and_factor(self, squares, clip):
        """(2,): the L2 norm of the whole gradient, and the factor that makes it at most `clip` (None: any length)."""
        whole = squares[0]
        for part in squares[1:]:
            whole = self.graph.concat(whole, part, axis=0)
        numbers = struct.pack("d", np.inf if clip is None else clip)
        return self._node(self.kernels.NORM_AND_FACTOR, [whole], (2,), params=numbers, n_tasks=1)

    def scaled(self, gradient, factor):
        """The gradient times the factor of `norm_and_factor`."""
        return self._node(self.kernels.SCALED, [gradient, factor], gradient.shape)

    def finish_gradient(self, gradient):
        """What the optimizer gets when every use of a parameter has added to its gradient: here, just that."""
        return gradient

    def adamw_step(self, weight, gradient, m, v, hp):
        inputs = [weight, gradient, m, v, hp]
        self._node(self.kernels.ADAMW, inputs, (1,), writes=[weight, m, v])

    def compute(self):
        self.kernels.compute(self.graph)

    # -- gradients ----------------------------------------------------------------------------------------------------

    def _zeros(self, slot):
        if slot.tensor is None:
            slot.tensor = self.graph.full(slot.shape, 0.0)

    def _into(self, slot, kernel, inputs):
        self._zeros(slot)
        slot.tensor = self._node_into(kernel, slot.tensor, inputs)


class _Columns(tuple):
    """Column views of one matrix, `whole`, which `concat` gives back without a copy."""

    def __new__(cls, parts, whole):
        self = super().__new__(cls, parts)
        self.whole = whole
        return self


def _same(op, what, given, expected):
    if given != expected:
        raise ValueError(f"{op}: {what} must agree, got {given} and {expected}")
