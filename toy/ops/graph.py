"""The op table of a ggml graph: the same calls as `reference`, recorded instead of computed.

A model's forward and backward run once on one of these tables, with graph tensors in place of arrays; afterwards the whole
training step is one `compute` of the graph. There are two spellings:

* `CpuGraphOps`: one node per op, computed by the project's own kernels (ggml_bridge/kernels.pyx) on ggml's threads;
* `NativeGraphOps`: compositions of ggml's own forward operations, each of which every ggml device has (Metal's list), and no
  backward operation of ggml. Its loss is summed over the rows inside the graph; the division by their number comes
  with the optimizer, because small gradients would vanish in the half-precision products of some devices.

Shapes, caches and the meaning of every op are those of `reference.py`. What is different:

* Integers (`token_ids`, `positions`, `labels`) are made by `integers()`: the caller fills them before each compute, through
  `feeds`, a list of (tensor, function); the function takes the arrays by role and returns what to upload.
* A parameter gradient is a `Slot`: the first backward that adds to it makes it, later ones add in place. `finished(slot)` is
  called as soon as every use of its parameter has added, so that the optimizer can follow at once.
* A quantised weight is a tensor of that type (`Backend.mapped` or `persistent`), half precision among them. It is frozen.
"""

import struct

import numpy as np

from toy.ops.reference import QUANTIZED_IS_FROZEN

# numbers of a quantised weight that ggml's own operations dequantise at a time: 8 MB, whatever the size of the matrix
_BAND = 2**21


class Slot:
    """Where the gradient of one parameter is collected. tensor: None before the first contribution."""

    def __init__(self, name, parameter):
        self.name, self.parameter, self.tensor = name, parameter, None
        self.uses = 0  # forward uses that have not had their backward yet

    @property
    def shape(self):
        return self.parameter.shape


class Integers:
    """An integer vector (N,) that is filled at every step. role: "token_ids", "positions" or "labels".

    tensor: what the ops read; narrow: the same numbers as ggml's own operations read them (`CpuGraphOps`)."""

    ndim = 1

    def __init__(self, role, n, limit):
        self.role, self.n, self.limit, self.tensor, self.narrow = role, n, limit, None, None


class _GraphOps:
    """What both spellings share. graph: a `ggml_bridge.Graph`. slots: dict of parameter tensors' ids to their `Slot`s;
    parameters without one are frozen. finished: called with each slot whose gradient is complete."""

    def __init__(self, graph, slots=None, finished=None):
        self.graph = graph
        self.feeds = []
        self.slots = slots or {}
        self.finished = finished or (lambda slot: None)
        self.token_rows = None  # set by integers()
        self.row_numbers = {}  # by size: 0, 1, 2, ... for reading the rows of a quantised weight

    def integers(self, role, n, limit):
        """A vector of n integers in 0 .. limit-1 (labels: from -1) that `feeds` fills at every step."""
        return Integers(role, n, limit)

    def feed(self, shape, dtype, function):
        """A graph input whose value at each step is function(arrays by role)."""
        tensor = self.graph.input(shape, dtype)
        self.feeds.append((tensor, function))
        return tensor

    def constant(self, array):
        """A graph input that is uploaded once."""
        tensor = self.graph.input(array.shape, "i32" if array.dtype.kind in "iu" else "f32")
        self.feeds.append((tensor, array))
        return tensor

    def used(self, *parameters):
        """Count a forward use of parameters (None is allowed), each of which will have one backward."""
        for parameter in parameters:
            slot = self.slots.get(id(parameter))
            if slot is not None:
                if _is_quantized(parameter):
                    raise ValueError(f"{slot.name}: {QUANTIZED_IS_FROZEN}")
                slot.uses += 1

    def contributed(self, *slots):
        """Count down a backward use of each slot (None is allowed); the last one finishes its gradient."""
        for slot in slots:
            if slot is not None:
                slot.uses -= 1
                if slot.uses == 0:
                    self.finished(slot)

    # -- quantised weights, by ggml's own operations -------------------------------------------------------------------
    # mul_mat with a quantised operand would round the other one; so a band of rows is read as float32 (GET_ROWS) and then
    # multiplied, a band at a time, and read again for the backward.

    def _bands(self, weight):
        """Yields (start, stop, rows start to stop-1 as float32)."""
        n_out, n_in = weight.shape
        if n_out not in self.row_numbers:
            self.row_numbers[n_out] = self.constant(np.arange(n_out, dtype=np.int32))
        numbers, step = self.row_numbers[n_out], max(1, _BAND // n_in)
        for start in range(0, n_out, step):
            stop = min(start + step, n_out)
            yield start, stop, self.graph.get_rows(weight, self.graph.slice(numbers, 0, start, stop))

    def _banded_linear(self, x, weight, bias):
        """x (N, in) -> (N, out): the bands give columns of y."""
        parts = [self.graph.mul_mat(band, x) for _, _, band in self._bands(weight)]
        while len(parts) > 1:  # in pairs: every column is copied log2(bands) times at most
            pairs = zip(parts[::2], parts[1::2])
            parts = [self.graph.concat(a, b, axis=1) for a, b in pairs] + parts[len(parts) // 2 * 2 :]
        return parts[0] if bias is None else self.graph.add(parts[0], bias)

    def _banded_linear_backward(self, d_y, weight):
        """d_y (N, out) -> (N, in): the sum over the bands."""
        graph, d_x = self.graph, None
        for start, stop, band in self._bands(weight):
            columns = graph.cont(graph.slice(d_y, 1, start, stop))  # (N, rows of the band)
            part = graph.mul_mat(graph.cont(graph.transpose(band)), columns)
            d_x = part if d_x is None else graph.add(d_x, part)
        return d_x

    # -- what is the same in both spellings ---------------------------------------------------------------------------

    def add(self, a, b):
        return self.graph.add(a, b)

    def scale(self, x, factor):
        return self.graph.scale(x if x.is_contiguous else self.graph.cont(x), factor)

    def split(self, x, widths):
        ends = np.cumsum(widths).tolist()
        return tuple(self.graph.slice(x, 1, end - width, end) for width, end in zip(widths, ends))


class CpuGraphOps(_GraphOps):
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
        ids = Integers(role, n, limit)
        narrow = self.feed((n,), "i32", lambda arrays: arrays[role])
        self.graph.limit(narrow, -1 if role == "labels" else 0, limit, role)
        ids.narrow = narrow
        # int64, what the kernels read: two int32 each
        ids.tensor = self._node(self.kernels.WIDEN, [narrow], (n, 2), dtype="i32", n_tasks=1)
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
        if not _is_quantized(table):
            return self._node(self.kernels.EMBEDDING, inputs, shape), (token_ids, table)
        kind = self.kernels.quantized_type(table.dtype)
        if kind is None:
            out = self.graph.get_rows(table, token_ids.narrow)
        else:
            out = self._node(self.kernels.QUANTIZED_EMBEDDING, inputs, shape, params=kind)
        return out, (token_ids, table)

    def embedding_backward(self, d_out, cache, d_table):
        if d_table is not None:
            _check_trained(cache[1])
            self._into(d_table, self.kernels.EMBEDDING_BACKWARD, [cache[0].tensor, d_out])
            self.contributed(d_table)

    # -- linear -------------------------------------------------------------------------------------------------------

    def linear(self, x, weight, bias=None):
        self.used(weight, bias)
        _same("linear", "the columns of x and weight", x.shape[1], weight.shape[1])
        if _is_quantized(weight):
            return self._quantized_linear(x, weight, bias), (None, weight)
        inputs = [x, weight] if bias is None else [x, weight, bias]
        return self._node(self.kernels.LINEAR, inputs, (x.shape[0], weight.shape[0])), (x, weight)

    def linear_backward(self, d_y, cache, d_weight, d_bias=None):
        x, weight = cache
        _same("linear_backward", "the columns of d_y and the rows of weight", d_y.shape[1], weight.shape[0])
        if d_weight is not None:
            _check_trained(weight)
        if _is_quantized(weight):
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


class NativeGraphOps(_GraphOps):
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
        _check_trained(table)
        graph, n, rows = self.graph, token_ids.n, table.shape[0]
        # d_table = one_hot^T d_out; row v of one_hot^T (V, N) has a 1 where token n is v, at the flat index v*N + n
        flat = self.feed((n,), "i32", lambda arrays: arrays[token_ids.role] * n + np.arange(n))
        one_hot = graph.set_rows(graph.full((rows * n, 1), 0.0), graph.full((n, 1), 1.0), flat)
        self._collect(d_table, graph.mul_mat(self.transposed(d_out), graph.reshape(one_hot, (rows, n))))
        self.contributed(d_table)

    # -- linear -------------------------------------------------------------------------------------------------------

    def linear(self, x, weight, bias=None):
        self.used(weight, bias)
        if _is_quantized(weight):
            return self._banded_linear(x, weight, bias), (None, weight)
        y = self.graph.mul_mat(weight, x)
        return (y if bias is None else self.graph.add(y, bias)), (x, weight)

    def linear_backward(self, d_y, cache, d_weight, d_bias=None):
        x, weight = cache
        d_y = self._contiguous(d_y)
        if _is_quantized(weight):
            d_x = self._banded_linear_backward(d_y, weight)
        else:
            d_x = self.graph.mul_mat(self.transposed(weight), d_y)
        if d_weight is not None:
            _check_trained(weight)
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


class _Columns(tuple):
    """Column views of one matrix, `whole`, which `concat` gives back without a copy."""

    def __new__(cls, parts, whole):
        self = super().__new__(cls, parts)
        self.whole = whole
        return self


def _is_quantized(weight):
    """Whether a weight tensor is of a type that the ops must dequantise; half precision counts as one."""
    return weight is not None and weight.dtype != "f32"


def _check_trained(weight):
    if _is_quantized(weight):
        raise ValueError(QUANTIZED_IS_FROZEN)


def _same(op, what, given, expected):
    if given != expected:
        raise ValueError(f"{op}: {what} must agree, got {given} and {expected}")
