"""The graph table for the CPU: one node per op, computed by the project's own kernels. See `toy.ops.graph`."""

import math
import struct
from typing import TYPE_CHECKING

import numpy as np

from toy.ops.graph.recording import GraphOps, check_attention, check_trained, is_quantized

if TYPE_CHECKING:
    from ggml_bridge.core import Tensor


# kernels that read every number once, and whose result does not depend on the number of slices
ONE_PASS = {"elementwise", "embedding", "rms_norm", "layer_norm", "rope", "add_partials", "scaled", "adamw"}
WORTH_TWO_THREADS = 2**14  # numbers: some 10 microseconds
WORTH_COMPUTING_AGAIN = 2**16  # numbers: fewer are kept for the backward, they cost little memory


class CpuGraphOps(GraphOps):
    """The ops as nodes computed by the project's kernels (CPU only).

    precision: of the products of linear layers and of `linear_cross_entropy`, from `toy.switch.kernel_precision`.
    """

    name = "graph-cpu"

    def __init__(self, graph, slots=None, finished=None, precision=0):
        from ggml_bridge import kernels

        super().__init__(graph, slots, finished)
        self.kernels, self.precision = kernels, precision
        self.n_threads = graph.backend.n_threads
        self.scratch = {}  # by size: nodes that need some use the same memory, one after the other
        self.rope_tables = {}  # by the arguments of `rope_tables`
        self.cheap = {}  # by id: (cheap result, what records it once more)
        self.nodes = {}  # by name of a kernel: how many nodes there are of it

    @staticmethod
    def runner():
        """Whose threads compute the nodes: those of the compiled kernels, which sleep where ggml's would spin."""
        from ggml_bridge import kernels

        return kernels.POOL

    def integers(self, role, n, limit):
        ids = super().integers(role, n, limit)
        # int64, what the kernels read: two int32 each
        ids.tensor = self._node(self.kernels.WIDEN, [ids.narrow], (n, 2), dtype="i32", n_tasks=1)
        return ids

    def _node(self, kernel, *arguments, called=None, **options):
        """A node that a kernel computes, named after it: "linear 3"."""
        if options.get("n_tasks") is None:
            options["n_tasks"] = self._tasks(kernel, *arguments[:2])
        return self.graph.custom(kernel, *arguments, name=self._numbered(called or self._called(kernel)), **options)

    def _node_into(self, kernel, target, inputs, **options):
        if options.get("n_tasks") is None:
            options["n_tasks"] = self._tasks(kernel, inputs, target.shape)
        return self.graph.custom_into(kernel, target, inputs, name=self._numbered(self._called(kernel)), **options)

    def _tasks(self, kernel, inputs, shape):
        """Into how many slices a node is cut: 1 where waking a second thread would take longer than the work itself."""
        if self._called(kernel) not in ONE_PASS:
            return None
        numbers = math.prod(shape) + sum(math.prod(tensor.shape) for tensor in inputs)
        return 1 if numbers < WORTH_TWO_THREADS else None

    def _called(self, kernel):
        return self.kernels.NAMES[id(kernel)]

    def _numbered(self, name):
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
        return self._linear(x, weight, bias), (x, weight)

    def _linear(self, x, weight, bias=None):
        inputs = [x, weight] if bias is None else [x, weight, bias]
        return self._node(self.kernels.LINEAR, inputs, (x.shape[0], weight.shape[0]), params=self._params())

    def _linear_backward_input(self, d_y, weight):
        shape = (d_y.shape[0], weight.shape[1])
        return self._node(self.kernels.LINEAR_BACKWARD_INPUT, [d_y, weight], shape, params=self._params())

    def _params(self, *more):
        """Of a node with products: their precision, and what else it is told."""
        return struct.pack(f"{1 + len(more)}q", self.precision, *more)

    def linear_backward(self, d_y, cache, d_weight, d_bias=None):
        x, weight = cache
        _same("linear_backward", "the columns of d_y and the rows of weight", d_y.shape[1], weight.shape[0])
        if d_weight is not None:
            check_trained(weight)
        if is_quantized(weight):
            d_x = self._quantized_linear_backward(d_y, weight)
        else:
            d_x = self._linear_backward_input(d_y, weight)
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
        params = kind + self._params()
        return self._node(self.kernels.QUANTIZED_LINEAR, inputs, shape, params=params, scratch=[scratch])

    def _quantized_linear_backward(self, d_y, weight):
        kind = self.kernels.quantized_type(weight.dtype)
        if kind is None:
            return self._banded_linear_backward(d_y, weight)
        scratch = self._quantized_scratch(weight)
        kernel, shape = self.kernels.QUANTIZED_LINEAR_BACKWARD_INPUT, (d_y.shape[0], weight.shape[1])
        return self._node(kernel, [d_y, weight, scratch], shape, params=kind + self._params(), scratch=[scratch])

    def _band_product(self, band, x):
        return self._linear(x, band) if self.precision else super()._band_product(band, x)

    def _band_product_backward(self, band, d_y):
        return self._linear_backward_input(d_y, band) if self.precision else super()._band_product_backward(band, d_y)

    def _quantized_scratch(self, weight):
        n_out, n_in = weight.shape
        return self._shared(self.n_threads * self.kernels.quantized_floats(n_in, n_out))

    def _cheap(self, result, record):
        """Mark a result that the backward computes again rather than keeps: its memory is free in between. Not a small one,
        and not a result of `again`: its backward comes at once."""
        if self.repeating or math.prod(result.shape) < WORTH_COMPUTING_AGAIN:
            return result
        self.cheap[id(result)] = (result, record)
        return result

    def _recomputed(self, x):
        """x, or a fresh copy of it if it is a cheap result (one copy for all its backward uses)."""
        if id(x) not in self.cheap:
            return x
        result, record = self.cheap[id(x)]
        if callable(record):
            record = record()
            self.cheap[id(x)] = (result, record)
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
            d_weight.tensor = self._node(kernel, inputs, d_weight.shape, params=self._params(0), writes=inputs[2:])
        else:
            d_weight.tensor = self._node_into(kernel, d_weight.tensor, inputs, params=self._params(1))
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
        partials = []  # of gamma and beta, one row a thread; all or none
        if any(slot is not None for slot in slots):
            partials = [self.graph.blank((self.n_threads, x.shape[1])) for _ in slots]
        d_x = self._node(kernel, [d_y, x, gamma, statistics, *partials], x.shape, writes=partials)
        for slot, partial in zip(slots, partials):
            if slot is not None:
                self._into(slot, self.kernels.ADD_PARTIALS, [partial])
        self.contributed(*slots)
        return d_x

    # -- elementwise --------------------------------------------------------------------------------------------------

    def gelu(self, x):
        return self._elementwise("gelu", x, cheap=True), (x,)

    def gelu_backward(self, d_y, cache):
        return self._elementwise("gelu_backward", d_y, *cache)

    def geglu(self, gate, up):
        return self._elementwise("geglu", gate, up, cheap=True), (gate, up)

    def geglu_backward(self, d_y, cache):
        return self._elementwise("geglu_backward", d_y, *cache)

    def softcap(self, x, cap=30.0):
        return self._elementwise("softcap", x, factor=cap), (x, cap)

    def softcap_backward(self, d_y, cache):
        x, cap = cache
        return self._elementwise("softcap_backward", d_y, x, factor=cap)

    def silu(self, x):
        return self._elementwise("silu", x), (x,)

    def silu_backward(self, d_y, cache):
        return self._elementwise("silu_backward", d_y, *cache)

    def swiglu(self, gate, up):
        return self._elementwise("swiglu", gate, up, cheap=True), (gate, up)

    def swiglu_backward(self, d_y, cache):
        return self._elementwise("swiglu_backward", d_y, *cache)

    def _elementwise(self, name, *matrices, cheap=False, factor=0.0):
        """A node of the kernel of that name. matrices: the op's inputs; for a backward d_y and the inputs.

        A backward gives a gradient for each input. cheap: the result is rather computed again than kept.
        """
        for matrix in matrices[1:]:
            _same(name, "the shapes", matrix.shape, matrices[0].shape)
        rows, columns = matrices[0].shape
        gradients = len(matrices) - 1 if name.endswith("_backward") else 1  # side by side in one matrix
        params, shape = self.kernels.elementwise(name, factor), (rows, gradients * columns)

        def record():
            return self._node(self.kernels.ELEMENTWISE, matrices, shape, params=params, called=name)

        out = record()
        if cheap:
            self._cheap(out, record)
        return out if gradients == 1 else self.split(out, [columns] * gradients)

    def add(self, a, b):
        return self._elementwise("add", a, b)

    def masked(self, x, mask):
        def record():
            return super(CpuGraphOps, self).masked(self._recomputed(x), mask)

        return self._cheap(super().masked(x, mask), record)

    # -- rope ---------------------------------------------------------------------------------------------------------

    def rope(self, x, positions, n_heads, base=10000.0, halves=False, factors=None, magnitude=1.0):
        stretched = () if factors is None and magnitude == 1 else (factors and tuple(factors), float(magnitude))
        cosines, sines = self._turns(positions.limit, x.shape[1] // n_heads, float(base), *stretched)
        cache = (positions, cosines, sines, n_heads, halves)
        return self._turn(x, cache, 1), cache

    def rope_backward(self, d_y, cache):
        return self._turn(d_y, cache, -1)

    def _turn(self, x, cache, direction):
        positions, cosines, sines, n_heads, halves = cache
        numbers = struct.pack("3q", n_heads, direction, halves)
        return self._node(self.kernels.ROPE, [x, positions.tensor, cosines, sines], x.shape, params=numbers)

    def _turns(self, *key):
        """The tables of `rope_tables` as constants of the graph, made once however many layers ask for them."""
        if key not in self.rope_tables:
            self.rope_tables[key] = tuple(self.constant(table) for table in rope_tables(*key))
        return self.rope_tables[key]

    # -- attention ----------------------------------------------------------------------------------------------------

    def attention(self, q, k, v, batch, n_heads, n_kv_heads=None, causal=True, window=None, softcap=None):
        n_kv_heads = n_kv_heads or n_heads
        numbers = struct.pack("5qd", batch, n_heads, n_kv_heads, int(causal), window or 0, softcap or 0.0)
        check_attention(q, k, v, batch, n_heads, n_kv_heads, causal, window, softcap)
        largest = self.graph.blank((batch * n_heads, q.shape[0] // batch))  # q.k of each query and head
        sizes = q.shape[0] // batch, k.shape[0] // batch, q.shape[1] // n_heads
        scratch = self._shared(self.n_threads * self.kernels.attention_scratch_floats(*sizes, softcap or 0.0))
        inputs = [q, k, v, largest, scratch]
        out = self._node(self.kernels.ATTENTION, inputs, q.shape, params=numbers, writes=[largest, scratch])
        return out, (inputs, numbers)

    def attention_backward(self, d_out, cache):
        inputs, numbers = cache
        q, k, v, _, scratch = inputs
        _same("attention_backward", "d_out and q", d_out.shape, q.shape)
        widths, rows = [q.shape[1], k.shape[1], v.shape[1]], max(q.shape[0], k.shape[0])
        kernel, shape = self.kernels.ATTENTION_BACKWARD, (rows, sum(widths))
        all_three = self._node(kernel, [*inputs, d_out], shape, params=numbers, writes=[scratch])
        d_q, d_k, d_v = self.split(all_three, widths)
        if q.shape[0] == k.shape[0]:
            return _Columns((d_q, d_k, d_v), all_three)
        return self.graph.slice(d_q, 0, 0, q.shape[0]), *(self.graph.slice(d, 0, 0, k.shape[0]) for d in (d_k, d_v))

    def _shared(self, floats):
        """Memory of that size for whatever one node writes down while it runs."""
        if floats not in self.scratch:
            self.scratch[floats] = self.graph.blank((floats,))
        return self.scratch[floats]

    def concat(self, parts):
        return parts.whole if isinstance(parts, _Columns) else super().concat(parts)

    # -- loss and optimizer: what `linear_cross_entropy` and `cross_entropy` are made of ------------------------------

    def _begin_loss(self, labels, columns):
        """-> (the matrix of the labels, how it is to be read, the totals that losses are added to)."""
        dense = labels.ndim == 2
        source, numbers = labels if dense else labels.tensor, struct.pack("q", int(dense))
        return source, numbers, self._node(self.kernels.COUNTED, [source], (4,), params=numbers, n_tasks=1)

    def _labels_of(self, start, band):
        source, numbers, totals = start
        if band != slice(0, source.shape[0]):
            source = self.graph.slice(source, 0, band.start, band.stop)
        return source, numbers, totals

    def _losses(self, logits, labels):
        source, numbers, totals = labels
        _same("cross_entropy", "the rows of logits and labels", logits.shape[0], source.shape[0])
        logits = logits if logits.is_contiguous else self.graph.cont(logits)
        statistics = self.graph.blank((4, logits.shape[0]))
        statistics = self._node_into(self.kernels.CROSS_ENTROPY, statistics, [logits, source], params=numbers)
        return statistics, (logits, source, statistics, totals, numbers)

    def cross_entropy_backward(self, cache):
        logits, source, statistics, totals, numbers = cache
        # the gradient takes the place of the logits, which nothing reads any more
        return self._node_into(
            self.kernels.CROSS_ENTROPY_BACKWARD, logits, [source, statistics, totals], params=numbers
        )

    def _add_losses(self, total, losses, start):
        return self._node_into(self.kernels.ADD_LOSSES, start[2] if total is None else total, [losses], n_tasks=1)

    def _mean_loss(self, total, start):
        return self._node(self.kernels.MEAN_LOSS, [total], (2,), n_tasks=1)

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
        """The gradient times factor[1], of `norm_and_factor` for one."""
        return self._node(self.kernels.SCALED, [gradient, factor], gradient.shape)

    def finish_gradient(self, gradient):
        """What the optimizer gets when every use of a parameter has added to its gradient: here, just that."""
        return gradient

    def adamw_step(self, weight, gradient, m, v, hp, factor=None):
        """factor: of `norm_and_factor`."""
        inputs = [weight, gradient, m, v, hp] if factor is None else [weight, gradient, m, v, hp, factor]
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


def rope_tables(n_positions, d_head, base, factors=None, magnitude=1.0):
    """cos and sin of position * base^(-2i/d_head) / factors[i], times the magnitude, float32 (n_positions, d_head/2) each,
    computed in double precision."""
    frequencies = base ** (-np.arange(0, d_head, 2) / d_head) / (1.0 if factors is None else np.array(factors))
    angles = np.arange(n_positions)[:, None] * frequencies
    return (magnitude * np.cos(angles)).astype(np.float32), (magnitude * np.sin(angles)).astype(np.float32)


class _Columns(tuple):
    """Column views of one matrix, `whole`, which `concat` gives back without a copy."""

    whole: "Tensor"

    def __new__(cls, parts, whole):
        self = super().__new__(cls, parts)
        self.whole = whole
        return self


def _same(op, what, given, expected):
    if given != expected:
        raise ValueError(f"{op}: {what} must agree, got {given} and {expected}")
