"""What both spellings of the graph table share: slots, feeds, weights that stay quantised. See `toy.ops.graph`."""

from collections.abc import Callable
from typing import Any

import numpy as np

from toy.op_table import row_bands
from toy.quantized import QUANTIZED_IS_FROZEN

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
    """An integer vector (N,) that is filled at every step; its numbers are below `limit`.

    narrow: int32, what ggml's own operations read; tensor: what the ops of the table read. role: in the arrays of a step."""

    ndim = 1

    def __init__(self, n, limit, narrow, role):
        self.n, self.limit, self.narrow, self.tensor, self.role = n, limit, narrow, narrow, role


class GraphOps:
    """What both spellings share. graph: a `ggml_bridge.Graph`. slots: dict of parameter tensors' ids to their `Slot`s;
    parameters without one are frozen. finished: called with each slot whose gradient is complete."""

    def __init__(self, graph, slots=None, finished=None):
        self.graph = graph
        self.feeds = []
        self.slots = slots or {}
        self.finished = finished or (lambda slot: None)
        self.row_numbers = {}  # by size: 0, 1, 2, ... for reading the rows of a quantised weight
        self.repeating = False  # whether what is recorded has been recorded before: see `again`

    @staticmethod
    def runner():
        """Whose threads compute the nodes; None: ggml's own."""
        return None

    def integers(self, role, n, limit):
        """A vector of n integers in 0 .. limit-1 (labels: from -1) that `feeds` fills at every step.

        role: the name of its values among the arrays of a step, "token_ids", "positions" or "labels".
        """
        narrow = self.feed((n,), "i32", lambda arrays: arrays[role])
        self.graph.set_name(narrow, role)
        self.graph.limit(narrow, -1 if role == "labels" else 0, limit, role)
        return Integers(n, limit, narrow, role)

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
        if self.repeating:
            return
        for parameter in parameters:
            slot = self.slots.get(id(parameter))
            if slot is not None:
                if is_quantized(parameter):
                    raise ValueError(f"{slot.name}: {QUANTIZED_IS_FROZEN}")
                slot.uses += 1

    def contributed(self, *slots):
        """Count down a backward use of each slot (None is allowed); the last one finishes its gradient."""
        for slot in slots:
            if slot is not None:
                slot.uses -= 1
                if slot.uses == 0:
                    self.finished(slot)

    def again(self, forward):
        """forward(), recorded once more: the uses of parameters in it have been counted."""
        self.repeating = True
        try:
            return forward()
        finally:
            self.repeating = False

    # -- the loss of a band of rows at a time -------------------------------------------------------------------------

    # what a spelling has
    linear: Callable[..., Any]
    linear_backward: Callable[..., Any]
    softcap: Callable[..., Any]
    softcap_backward: Callable[..., Any]
    cross_entropy_backward: Callable[..., Any]
    _begin_loss: Callable[..., Any]  # (labels, number of classes) -> start
    _labels_of: Callable[..., Any]  # (start, band) -> the labels of a band, views
    _losses: Callable[..., Any]  # (logits, labels of a band) -> losses, the cache of `cross_entropy_backward`
    _add_losses: Callable[..., Any]  # (total or None, losses, start) -> total
    _mean_loss: Callable[..., Any]  # (total, start) -> the loss

    def linear_cross_entropy(self, x, weight, labels, cap=None, d_weight=None, backward=True):
        """Forward and backward of a band stand one after the other: the next band takes the memory of its logits. d_x is a
        gradient as `cross_entropy_backward` gives it."""
        (rows, _), columns = x.shape, weight.shape[0]
        start, total, d_x = self._begin_loss(labels, columns), None, []
        self.used(weight)  # one use, however many bands
        for band in row_bands(rows, columns):
            # views and sums stand between the products: a planner gives memory back only a few nodes after its last use
            band_labels = self._labels_of(start, band)
            part = x if band == slice(0, rows) else self.graph.slice(x, 0, band.start, band.stop)
            logits, product = self.linear(part, weight)
            logits, capped = (logits, None) if cap is None else self.softcap(logits, cap)
            losses, cache = self._losses(logits, band_labels)
            if backward:
                d_logits = self.cross_entropy_backward(cache)
                d_logits = d_logits if capped is None else self.softcap_backward(d_logits, capped)
                d_x.append(self.linear_backward(d_logits, product, d_weight))
            total = self._add_losses(total, losses, start)
        if backward:
            self.contributed(d_weight)
        return self._mean_loss(total, start), self._joined(d_x, 0) if backward else None

    def cross_entropy(self, logits, labels):
        start = self._begin_loss(labels, logits.shape[1])
        losses, cache = self._losses(logits, self._labels_of(start, slice(0, logits.shape[0])))
        return self._mean_loss(self._add_losses(None, losses, start), start), cache

    def _joined(self, parts, axis):
        """The parts as one tensor, along an axis: in pairs, so that every number is copied log2(parts) times at most."""
        while len(parts) > 1:
            pairs = zip(parts[::2], parts[1::2])
            parts = [self.graph.concat(a, b, axis=axis) for a, b in pairs] + parts[len(parts) // 2 * 2 :]
        return parts[0]

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
        parts = [self._band_product(band, x) for _, _, band in self._bands(weight)]
        y = self._joined(parts, 1)
        return y if bias is None else self.graph.add(y, bias)

    def _banded_linear_backward(self, d_y, weight):
        """d_y (N, out) -> (N, in): the sum over the bands."""
        graph, d_x = self.graph, None
        for start, stop, band in self._bands(weight):
            columns = graph.cont(graph.slice(d_y, 1, start, stop))  # (N, rows of the band)
            part = self._band_product_backward(band, columns)
            d_x = part if d_x is None else graph.add(d_x, part)
        return d_x

    def _band_product(self, band, x):
        return self.graph.mul_mat(band, x)

    def _band_product_backward(self, band, d_y):
        return self.graph.mul_mat(self.graph.transposed(band), d_y)

    # -- what is the same in both spellings ---------------------------------------------------------------------------

    def add(self, a, b):
        return self.graph.add(a, b)

    def scale(self, x, factor):
        return self.graph.scale(x if x.is_contiguous else self.graph.cont(x), factor)

    def masked(self, x, mask):
        return self.graph.mul(x if x.is_contiguous else self.graph.cont(x), mask)

    def reshape(self, x, rows):
        size = x.shape[0] * x.shape[1]
        if rows < 1 or size % rows:
            raise ValueError(f"reshape: rows must be a divisor of the {size} numbers of x {x.shape}, not {rows}")
        return self.graph.reshape(x if x.is_contiguous else self.graph.cont(x), (rows, size // rows))

    def zeros_like(self, x):
        return self.graph.full(x.shape, 0.0)

    def concat(self, parts):
        whole = parts[0]
        for part in parts[1:]:
            whole = self.graph.concat(whole, part, axis=1)
        return whole

    def split(self, x, widths):
        ends = np.cumsum(widths).tolist()
        return tuple(self.graph.slice(x, 1, end - width, end) for width, end in zip(widths, ends))


def is_quantized(weight):
    """Whether a weight tensor is of a type that the ops must dequantise; half precision counts as one."""
    return weight is not None and weight.dtype != "f32"


def check_trained(weight):
    if is_quantized(weight):
        raise ValueError(QUANTIZED_IS_FROZEN)


def check_attention(q, k, v, batch, n_heads, n_kv_heads, causal, window, softcap):
    """Raise ValueError unless the shapes and numbers are those that `reference.attention` names."""
    if (window is not None and (window < 1 or not causal)) or (softcap is not None and not softcap > 0):
        raise ValueError(
            f"attention: window={window}, softcap={softcap} and causal={causal}: a window is a whole number above 0 and "
            "needs causal=True, a softcap is a number above 0"
        )
    numbers_fit = min(batch, n_heads, n_kv_heads) > 0 and n_heads % n_kv_heads == 0
    if numbers_fit:
        (n_q, width), (n_k, kv_width) = q.shape, k.shape
        shapes_fit = v.shape == k.shape and width % n_heads == 0 and kv_width == width // n_heads * n_kv_heads
        rows_fit = n_q % batch == 0 and n_k % batch == 0 and (n_k >= n_q or not causal)
    if not (numbers_fit and shapes_fit and rows_fit):
        raise ValueError(
            f"attention: q {q.shape}, k {k.shape} and v {v.shape} do not fit batch={batch}, n_heads={n_heads}, "
            f"n_kv_heads={n_kv_heads}, causal={causal}: q is (B*Tq, n_heads*d_head), k and v (B*Tk, n_kv_heads*d_head)"
        )
