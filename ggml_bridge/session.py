"""Session: one ggml graph, built verb by verb, with a backward pass and AdamW inside the graph.

The order of a training session (calls out of order raise RuntimeError and say what comes first):

    with ggml_bridge.Session(device="cpu") as s:
        w = s.input_2d_f32_persistent(n_out, n_in)      # 1. weights
        s.set_param(w)                                  # 2. which of them are trained
        s.finalize_weights()                            # 3. memory for them
        s.upload_row_major(w, array)                    # 4. values
        x = s.input_2d_f32(n_rows, n_in)                # 5. inputs and the forward pass
        logits = s.matmul(w, x)
        labels = s.input_1d_i32(n_rows)
        hp = s.input_2d_f32(1, 7)
        loss = s.cross_entropy_loss(logits, labels)
        s.set_output(loss)
        s.set_loss(loss)                                # 6. what is minimised
        s.build_backward()                              # 7. gradients
        s.opt_step_adamw(w, hp)                         # 8. one for each weight
        s.realize_backward()                            # 9. memory for everything else
        for step in range(100):
            s.graph_reset() if step == 0 else s.graph_reset_grads_only()
            s.upload_row_major(x, ...); s.upload_int_array(labels, ...); s.upload_row_major(hp, ...)
            s.compute_backward()                        # forward, backward and AdamW in one go
            print(s.download_row_major(loss, 1, 1))

For a forward pass alone: build_forward_only(t), realize(), then upload, compute(), download.

Shapes are (rows, cols), row-major like numpy. Weight matrices are (out, in): `matmul(w, x)` is x @ w.T.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ggml_bridge import library, ops
from ggml_bridge.records import Explanation, Node

if TYPE_CHECKING:
    from typing_extensions import Self

    from ggml_bridge.core import Backend, Graph, Tensor


class Step(NamedTuple):
    """One verb of the forward pass, kept for the backward pass."""

    backward: Callable[..., tuple[Tensor | None, ...]]  # a function of ops.py
    out: Tensor
    inputs: tuple[Tensor, ...]
    cache: Any  # what `backward` needs


class Optimized(NamedTuple):
    """AdamW's moments of a weight."""

    weight: Tensor
    m: Tensor
    v: Tensor


class Session:
    """One device, its weights, one graph and its buffers; freed together by `close()` or the end of a `with` block.

    device: a name from `ggml_bridge.devices()`, or "cpu", "metal", "vulkan", "gpu".
    n_threads: CPU threads; None takes TOY_NUM_THREADS or the processors of this process.
    graph_capacity: the most nodes the graph may get.

    A session is for one thread at a time: a call while another thread computes raises RuntimeError. Several sessions
    may exist and compute at once. Wrong shapes, types and ranges raise ValueError or TypeError, calls out of order,
    calls on a closed session and an exhausted capacity RuntimeError, and want of memory MemoryError.
    NaN and infinities may be uploaded; they spread as in any floating-point computation.
    """

    def __init__(self, device: str = "cpu", n_threads: int | None = None, graph_capacity: int = 65536) -> None:
        self._backend: Backend = library.start().Backend(device, n_threads)
        try:
            self._graph: Graph = self._backend.graph(graph_capacity)
        except Exception:
            self._backend.close()
            raise
        self._tape: list[Step] = []
        self._params: list[Tensor] = []
        self._optimized: dict[Tensor, Optimized] = {}  # by weight
        # tensor -> its gradient, not yet divided by the number of tokens that count
        self._gradients: dict[Tensor, Tensor | None] = {}
        self._divided: dict[Tensor, Tensor] = {}  # tensor -> its gradient as the user sees it
        self._watched: list[Tensor] = []  # gradients that can be downloaded
        self._masks: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}  # by (rows, cols, n_past): persistent masks
        self._losses: dict[Tensor, Any] = {}  # cross-entropy output -> its cache
        self._loss: Tensor | None = None
        self._has_root = False
        self._weights_final = False
        self._has_weights = False
        self._has_backward = False
        self._is_armed = False  # a reset came after the last compute_backward
        self._n_inputs = 0

    # --- life

    @property
    def closed(self) -> bool:
        return self._backend.closed

    @property
    def device(self) -> str:
        """The name of the device."""
        return self._backend.device_name

    @property
    def n_threads(self) -> int:
        """CPU threads of a computation; may be set between computations."""
        return self._backend.n_threads

    @n_threads.setter
    def n_threads(self, value: int) -> None:
        self._backend.n_threads = value

    def close(self) -> None:
        """Free the graph, the weights and the device, in this order. A second call does nothing."""
        self._backend.close()
        # the tape holds handles, which are of no more use
        self._tape, self._gradients, self._divided, self._watched = [], {}, {}, []

    def __enter__(self) -> Self:
        self._backend.check_idle()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def set_graph_capacity(self, n_nodes: int) -> None:
        """The most nodes the graph may get."""
        self._backend.check_idle()
        self._graph.capacity = n_nodes

    def explain(self) -> Explanation:
        """Every node with its device, the number of splits and bytes; `str()` of it is a table."""
        self._backend.check_idle()
        return self._graph.explain()

    def describe(self) -> list[Node]:
        """The nodes as a list of `Node` records."""
        self._backend.check_idle()
        return self._graph.describe()

    # --- checks

    def _tensor(self, value: Tensor, verb: str, what: str) -> Tensor:
        if not isinstance(value, library.start().Tensor):
            raise TypeError(f"{verb}: {what} must be a Tensor, not {type(value).__name__}")
        if value.owner is not self._graph and value.owner is not self._backend:
            value.shape  # noqa: B018  raises RuntimeError when its session is closed
            raise ValueError(f"{verb}: {what} = {value!r} belongs to another session")
        value.shape  # noqa: B018
        return value

    def _matrix(self, value: Tensor, verb: str, what: str) -> Tensor:
        """A f32 tensor of one or two axes."""
        tensor = self._tensor(value, verb, what)
        if tensor.dtype != "f32":
            raise ValueError(f"{verb}: {what} must be f32, not {tensor!r}")
        if tensor.ndim > 2:
            raise ValueError(f"{verb}: {what} must have one or two axes, not {tensor!r}")
        return tensor

    def _two_axes(self, value: Tensor, verb: str, what: str) -> Tensor:
        tensor = self._matrix(value, verb, what)
        if tensor.ndim != 2:
            raise ValueError(f"{verb}: {what} must be (rows, cols), not {tensor!r}")
        return tensor

    def _forward(self, verb: str) -> None:
        """Raise unless a verb of the forward pass is in order."""
        self._backend.check_idle()
        if self._graph.is_allocated:
            raise RuntimeError(f"{verb}: the graph is realized; nothing more can be added to it")
        if self._has_backward:
            raise RuntimeError(f"{verb}: build_backward was called; the forward pass comes before it")
        if self._has_weights and not self._weights_final:
            raise RuntimeError(f"{verb}: finalize_weights comes before the forward pass")

    def _record(
        self, backward: Callable[..., tuple[Tensor | None, ...]], out_and_cache: tuple[Tensor, Any], *inputs: Tensor
    ) -> Tensor:
        out, cache = out_and_cache
        self._tape.append(Step(backward, out, inputs, cache))
        return out

    def _contiguous(self, x: Tensor) -> Tensor:
        """x itself, or a contiguous copy of a view (whose gradient then goes to the view)."""
        if x.is_contiguous:
            return x
        return self._record(ops.cont_2d_backward, ops.cont_2d(self._graph, x, *ops.as_matrix(x)), x)

    # --- tensors

    def _input(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        self._backend.check_idle()
        if self._graph.is_allocated:
            raise RuntimeError("the graph is realized; inputs are made before that")
        self._n_inputs += 1
        return self._graph.input(shape, dtype, name=f"input_{self._n_inputs}")

    def input_1d_i32(self, n: int) -> Tensor:
        """An input of n integers: token ids, positions or labels."""
        return self._input((n,), "i32")

    def input_1d_f32(self, n: int) -> Tensor:
        """An input of n numbers."""
        return self._input((n,), "f32")

    def input_2d_f32(self, rows: int, cols: int) -> Tensor:
        """An input matrix."""
        return self._input((rows, cols), "f32")

    def _persistent(self, shape: tuple[int, ...]) -> Tensor:
        self._backend.check_idle()
        if self._weights_final:
            raise RuntimeError("persistent inputs come before finalize_weights")
        self._n_inputs += 1
        tensor = self._backend.persistent(shape, name=f"weight_{self._n_inputs}")
        self._has_weights = True
        return tensor

    def input_1d_f32_persistent(self, n: int) -> Tensor:
        """n numbers in memory of their own: a bias, a gain. They stay until the session is closed."""
        return self._persistent((n,))

    def input_2d_f32_persistent(self, rows: int, cols: int) -> Tensor:
        """A matrix in memory of its own: a weight (out, in). It stays until the session is closed."""
        return self._persistent((rows, cols))

    def set_param(self, weight: Tensor) -> None:
        """Mark a persistent tensor as trained: build_backward computes its gradient."""
        weight = self._tensor(weight, "set_param", "weight")
        self._backend.check_idle()
        if self._weights_final:
            raise RuntimeError("set_param comes before finalize_weights")
        if not weight.is_persistent:
            raise ValueError(f"set_param: {weight!r} is not persistent; only persistent inputs can be trained")
        if weight not in self._params:
            self._params.append(weight)

    def finalize_weights(self) -> None:
        """Allocate the persistent tensors; after that they can be uploaded and used."""
        self._backend.check_idle()
        if self._weights_final:
            raise RuntimeError("finalize_weights was called already")
        if not self._has_weights:
            raise RuntimeError("finalize_weights: input_1d_f32_persistent or input_2d_f32_persistent come first")
        self._backend.allocate()
        self._weights_final = True

    # --- data

    def _check_memory(self, tensor: Tensor, verb: str) -> None:
        if tensor.is_persistent:
            if not self._weights_final:
                raise RuntimeError(f"{verb}: finalize_weights comes before uploads and downloads of weights")
        elif not self._graph.is_allocated:
            raise RuntimeError(f"{verb}: realize_backward (or realize) comes before uploads and downloads of inputs")

    def upload_row_major(self, tensor: Tensor, values: npt.ArrayLike) -> None:
        """Copy a float array of the tensor's shape, (rows, cols) or (n,), into an input or a persistent tensor."""
        tensor = self._tensor(tensor, "upload_row_major", "tensor")
        self._check_memory(tensor, "upload_row_major")
        if tensor.dtype == "i32":
            raise ValueError(f"upload_row_major: {tensor!r} holds integers; upload_int_array is for those")
        tensor.upload(values)

    def upload_int_array(self, tensor: Tensor, values: npt.ArrayLike) -> None:
        """Copy integers into an i32 input. Token ids must be rows of the tables they are looked up in, labels classes
        of the loss or -1 (not counted); anything else raises ValueError."""
        tensor = self._tensor(tensor, "upload_int_array", "tensor")
        self._check_memory(tensor, "upload_int_array")
        if tensor.dtype != "i32":
            raise ValueError(f"upload_int_array: {tensor!r} holds floats; upload_row_major is for those")
        tensor.upload(values)

    def zero_tensor(self, tensor: Tensor) -> None:
        """Fill an input or a persistent tensor with zeros."""
        tensor = self._tensor(tensor, "zero_tensor", "tensor")
        self._check_memory(tensor, "zero_tensor")
        tensor.zero()

    def download(self, tensor: Tensor) -> np.ndarray:
        """The values of a persistent tensor, an input, an output or a gradient, as a new array of its shape."""
        tensor = self._tensor(tensor, "download", "tensor")
        self._check_memory(tensor, "download")
        return tensor.download()

    def download_row_major(self, tensor: Tensor, rows: int, cols: int) -> np.ndarray:
        """Like `download`, as an array (rows, cols) with as many elements as the tensor has."""
        values = self.download(tensor)
        for what, number in (("rows", rows), ("cols", cols)):
            if isinstance(number, bool) or not isinstance(number, numbers.Integral):
                raise TypeError(f"download_row_major: {what} must be an integer, not {type(number).__name__}")
        if rows < 1 or cols < 1 or rows * cols != values.size:
            raise ValueError(f"download_row_major: {tensor!r} has {values.size} elements, not {rows} x {cols}")
        return values.reshape(int(rows), int(cols))

    # --- the forward pass

    def get_rows(self, table: Tensor, ids: Tensor) -> Tensor:
        """Rows of a table: table (V, D), ids i32 (N,) -> (N, D)."""
        self._forward("get_rows")
        table = self._two_axes(table, "get_rows", "table")
        ids = self._tensor(ids, "get_rows", "ids")
        if ids.dtype != "i32" or ids.ndim != 1 or not ids.is_input:
            raise ValueError(f"get_rows: ids must be an input_1d_i32, not {ids!r}")
        table = self._contiguous(table)
        return self._record(ops.get_rows_backward, ops.get_rows(self._graph, table, ids), table, ids)

    def _broadcast(self, a: Tensor, b: Tensor, verb: str) -> tuple[Tensor, Tensor]:
        """a and b, exchanged if need be so that b is broadcast to a (numpy's rules)."""
        a, b = self._matrix(a, verb, "a"), self._matrix(b, verb, "b")
        try:
            shape = np.broadcast_shapes(a.shape, b.shape)
        except ValueError:
            shape = None
        if shape == a.shape:
            return self._contiguous(a), self._contiguous(b)
        if shape == b.shape:
            return self._contiguous(b), self._contiguous(a)
        raise ValueError(f"{verb}: one of {a!r} and {b!r} must be broadcast to the other")

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """a + b; one may be broadcast to the other: a bias (D,) to (N, D)."""
        self._forward("add")
        a, b = self._broadcast(a, b, "add")
        return self._record(ops.add_backward, ops.add(self._graph, a, b), a, b)

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        """a * b, elementwise; one may be broadcast to the other."""
        self._forward("mul")
        a, b = self._broadcast(a, b, "mul")
        return self._record(ops.mul_backward, ops.mul(self._graph, a, b), a, b)

    def matmul(self, w: Tensor, x: Tensor) -> Tensor:
        """x @ w.T: w (out, in), x (N, in) -> (N, out). Scores of attention are matmul(k, q), its output matmul(v.T, p)."""
        self._forward("matmul")
        w, x = self._two_axes(w, "matmul", "w"), self._two_axes(x, "matmul", "x")
        if w.shape[1] != x.shape[1]:
            raise ValueError(f"matmul: w (out, in) = {w!r} and x (N, in) = {x!r} must agree in their second axis")
        return self._record(ops.matmul_backward, ops.matmul(self._graph, w, x), w, x)

    def scale(self, a: Tensor, factor: float) -> Tensor:
        """a * factor, a Python number."""
        self._forward("scale")
        a = self._contiguous(self._matrix(a, "scale", "a"))
        return self._record(ops.scale_backward, ops.scale(self._graph, a, factor), a)

    def _gain(self, gain: Tensor, x: Tensor, verb: str, what: str) -> Tensor:
        gain = self._matrix(gain, verb, what)
        if ops.as_matrix(gain) != (1, x.shape[-1]):
            raise ValueError(f"{verb}: {what} must be ({x.shape[-1]},) for x = {x!r}, not {gain!r}")
        return self._contiguous(gain)

    def layer_norm(self, x: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-5) -> Tensor:
        """(x - mean) / sqrt(variance + eps) * gamma + beta, row by row: x (N, D), gamma and beta (D,)."""
        self._forward("layer_norm")
        x = self._contiguous(self._two_axes(x, "layer_norm", "x"))
        gamma, beta = self._gain(gamma, x, "layer_norm", "gamma"), self._gain(beta, x, "layer_norm", "beta")
        out = ops.layer_norm(self._graph, x, gamma, beta, eps)
        return self._record(ops.layer_norm_backward, out, x, gamma, beta)

    def rms_norm(self, x: Tensor, gamma: Tensor, eps: float = 1e-5) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * gamma, row by row: x (N, D), gamma (D,)."""
        self._forward("rms_norm")
        x = self._contiguous(self._two_axes(x, "rms_norm", "x"))
        gamma = self._gain(gamma, x, "rms_norm", "gamma")
        return self._record(ops.rms_norm_backward, ops.rms_norm(self._graph, x, gamma, eps), x, gamma)

    def gelu(self, x: Tensor) -> Tensor:
        """GELU, tanh form, elementwise; exact to float32."""
        self._forward("gelu")
        x = self._contiguous(self._matrix(x, "gelu", "x"))
        return self._record(ops.gelu_backward, ops.gelu(self._graph, x), x)

    def silu(self, x: Tensor) -> Tensor:
        """x * sigmoid(x), elementwise."""
        self._forward("silu")
        x = self._contiguous(self._matrix(x, "silu", "x"))
        return self._record(ops.silu_backward, ops.silu(self._graph, x), x)

    def softmax(self, x: Tensor) -> Tensor:
        """softmax over the last axis."""
        self._forward("softmax")
        x = self._contiguous(self._matrix(x, "softmax", "x"))
        return self._record(ops.softmax_backward, ops.softmax(self._graph, x), x)

    def diag_mask_inf(self, x: Tensor, n_past: int = 0) -> Tensor:
        """-inf where the column is greater than n_past + the row: a query sees itself and what came before it."""
        self._forward("diag_mask_inf")
        x = self._contiguous(self._two_axes(x, "diag_mask_inf", "x"))
        if isinstance(n_past, bool) or not isinstance(n_past, numbers.Integral):
            raise TypeError(f"diag_mask_inf: n_past must be an integer, not {type(n_past).__name__}")
        if not 0 <= n_past <= 2**31 - 1:
            raise ValueError(f"diag_mask_inf: n_past must be from 0 to 2^31 - 1, not {n_past}")
        rows, cols = x.shape
        below, additive = self._mask(rows, cols, int(n_past))
        out = ops.diag_mask_inf(self._graph, x, below, additive)
        return self._record(ops.diag_mask_inf_backward, out, x)

    def _mask(self, rows: int, cols: int, n_past: int) -> tuple[Tensor, Tensor]:
        """Persistent masks of 1/0 and 0/-inf. Equal masks are made once."""
        key = (rows, cols, n_past)
        if key not in self._masks:
            # TRI is no verb, and a row of the mask differs from the next: so two constants, written once
            self._masks[key] = (
                self._backend.persistent((rows, cols), name=f"mask {rows}x{cols} 1/0"),
                self._backend.persistent((rows, cols), name=f"mask {rows}x{cols} 0/-inf"),
            )
            self._backend.allocate()
            seen = np.arange(cols) <= np.arange(rows)[:, None] + n_past
            below, additive = self._masks[key]
            below.upload(seen.astype(np.float32))
            additive.upload(np.where(seen, np.float32(0), np.float32(-np.inf)))
        return self._masks[key]

    def transpose(self, x: Tensor) -> Tensor:
        """x.T, (rows, cols) -> (cols, rows), as a view."""
        self._forward("transpose")
        x = self._two_axes(x, "transpose", "x")
        return self._record(ops.transpose_backward, ops.transpose(self._graph, x), x)

    def cont_2d(self, x: Tensor, rows: int, cols: int) -> Tensor:
        """A contiguous copy of x, in row-major order, with the shape (rows, cols)."""
        self._forward("cont_2d")
        x = self._matrix(x, "cont_2d", "x")
        return self._record(ops.cont_2d_backward, ops.cont_2d(self._graph, x, rows, cols), x)

    def concat(self, a: Tensor, b: Tensor, axis: int = 1) -> Tensor:
        """a and b side by side (axis 1) or one below the other (axis 0)."""
        self._forward("concat")
        a, b = self._two_axes(a, "concat", "a"), self._two_axes(b, "concat", "b")
        if axis not in (0, 1, -1, -2) or isinstance(axis, bool):
            raise ValueError(f"concat: axis must be 0 (rows) or 1 (columns), not {axis!r}")
        a, b = self._contiguous(a), self._contiguous(b)
        return self._record(ops.concat_backward, ops.concat(self._graph, a, b, axis % 2), a, b)

    def cross_entropy_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean over the rows that count of -log softmax(logits)[label] -> (1,).

        logits (N, V). labels: an input_1d_i32 (N,) with -1 = not counted, or an input_2d_f32 (N, V) with a distribution
        in each row and zeros in rows that do not count.
        """
        self._forward("cross_entropy_loss")
        logits = self._contiguous(self._two_axes(logits, "cross_entropy_loss", "logits"))
        labels = self._tensor(labels, "cross_entropy_loss", "labels")
        expected = logits.shape[:1] if labels.dtype == "i32" else logits.shape
        if labels.is_persistent or not labels.is_input or labels.shape != expected:
            raise ValueError(
                f"cross_entropy_loss: labels must be an input_1d_i32 of {logits.shape[0]} or an input_2d_f32 of "
                f"{logits.shape}, not {labels!r}"
            )
        columns = max([weight.shape[-1] for weight in self._params], default=1)
        loss, cache = ops.cross_entropy(self._graph, logits, labels, columns)
        self._losses[loss] = cache
        return self._record(_cross_entropy_step, (loss, cache), logits)

    # --- what is computed

    def set_output(self, tensor: Tensor) -> None:
        """Keep a result, so that it can be downloaded after a computation."""
        tensor = self._tensor(tensor, "set_output", "tensor")
        self._graph.output(tensor)

    def set_loss(self, loss: Tensor) -> None:
        """Choose what build_backward differentiates: one number. The last call counts."""
        loss = self._matrix(loss, "set_loss", "loss")
        self._forward("set_loss")
        if np.prod(loss.shape) != 1:
            raise ValueError(f"set_loss: the loss must be one number, not {loss!r}")
        if not any(step.out is loss for step in self._tape):
            raise ValueError(f"set_loss: {loss!r} is not computed by the forward pass")
        self._loss = loss

    def build_forward_only(self, tensor: Tensor) -> None:
        """Compute a tensor (and keep it as an output). Needed for a forward pass without a backward pass."""
        tensor = self._tensor(tensor, "build_forward_only", "tensor")
        self._forward("build_forward_only")
        self._graph.output(tensor)
        self._has_root = True

    def realize(self) -> None:
        """Give a forward pass its memory; after that inputs can be uploaded. (With a backward pass: realize_backward.)"""
        self._backend.check_idle()
        if not self._has_root:
            raise RuntimeError("realize: build_forward_only comes first")
        if self._has_backward:
            raise RuntimeError("realize: this session has a backward pass; realize_backward allocates both")
        self._graph.allocate()

    def compute(self) -> None:
        """Run the forward pass."""
        self._backend.check_idle()
        if self._has_backward or not self._graph.is_allocated:
            raise RuntimeError("compute: build_forward_only and realize come first (or: compute_backward)")
        self._graph.compute()

    # --- the backward pass

    def build_backward(self) -> None:
        """Record the gradients of the loss with respect to every param."""
        self._forward("build_backward")
        if self._loss is None:
            raise RuntimeError("build_backward: set_loss comes first")
        if not self._params:
            raise RuntimeError("build_backward: set_param comes first, so that there is something to train")
        g = self._graph
        depends = set(self._params)  # tensors whose gradient is needed
        for step in self._tape:
            if any(tensor in depends for tensor in step.inputs):
                depends.add(step.out)
        if self._loss not in depends:
            raise RuntimeError("build_backward: the loss does not depend on any param")
        gradients: dict[Tensor, Tensor | None] = {}
        if self._loss in self._losses:
            gradients[self._loss] = None  # _cross_entropy_step starts from the sum of the losses
        else:
            gradients[self._loss] = g.full(self._loss.shape, 1.0)
        for step in reversed(self._tape):
            if step.out not in gradients or step.out not in depends:
                continue
            if not any(tensor in depends for tensor in step.inputs):
                continue
            for tensor, gradient in zip(
                step.inputs, step.backward(g, gradients[step.out], step.cache, *step.inputs), strict=True
            ):
                if gradient is None or tensor not in depends:
                    continue
                # a tensor that is used several times collects all its gradients
                known = gradients.get(tensor)
                gradients[tensor] = gradient if known is None else g.add(known, gradient)
        self._gradients = gradients
        self._has_backward = True

    def _gradient(self, tensor: Tensor, verb: str) -> Tensor:
        """The gradient of the mean loss with respect to a tensor."""
        self._backend.check_idle()
        if not self._has_backward:
            raise RuntimeError(f"{verb}: build_backward comes first")
        if tensor in self._divided:
            return self._divided[tensor]
        gradient = self._gradients.get(tensor)
        if gradient is None:
            raise ValueError(
                f"{verb}: {tensor!r} has no gradient: the loss does not depend on it, "
                "or nothing before it was marked with set_param"
            )
        if self._graph.is_allocated:
            raise RuntimeError(f"{verb} comes before realize_backward")
        if self._loss in self._losses:
            *_, inverse_count = self._losses[self._loss]
            factor = ops.part_of_row(self._graph, inverse_count, tensor.shape[-1])
            gradient = self._graph.mul(gradient, factor)
        self._divided[tensor] = gradient
        return gradient

    def tensor_grad(self, tensor: Tensor) -> Tensor:
        """The gradient of the loss with respect to a param or a result computed from params; it can be downloaded
        after compute_backward."""
        tensor = self._tensor(tensor, "tensor_grad", "tensor")
        gradient = self._gradient(tensor, "tensor_grad")
        if gradient not in self._watched:
            self._graph.output(gradient)
            self._watched.append(gradient)
        return gradient

    def opt_step_adamw(self, weight: Tensor, hp: Tensor) -> Tensor:
        """Update a param with AdamW at the end of every compute_backward. Returns the weight as it is afterwards.

        hp: a (1, 7) or (7,) f32 tensor [lr, beta1, beta2, eps, weight_decay, s5, s6]; several weights may share it.
        The moments m and v are kept by the session and zeroed by graph_reset.
        """
        weight = self._tensor(weight, "opt_step_adamw", "weight")
        hp = self._matrix(hp, "opt_step_adamw", "hp")
        if weight not in self._params:
            raise ValueError(f"opt_step_adamw: {weight!r} is no param; set_param marks those")
        if ops.as_matrix(hp) != (1, 7):
            raise ValueError(f"opt_step_adamw: hp must be (1, 7) or (7,), not {hp!r}")
        if weight in self._optimized:
            raise RuntimeError(f"opt_step_adamw: {weight!r} has an optimizer step already")
        gradient = self._gradient(weight, "opt_step_adamw")
        if self._graph.is_allocated:
            raise RuntimeError("opt_step_adamw comes before realize_backward")
        m = self._backend.persistent(weight.shape, name=f"{weight.name}: m")
        v = self._backend.persistent(weight.shape, name=f"{weight.name}: v")
        updated = self._graph.opt_step_adamw(weight, gradient, m, v, hp)
        self._optimized[weight] = Optimized(weight, m, v)
        return updated

    def extend_backward_graph(self, tensor: Tensor) -> None:
        """Compute one more tensor in every compute_backward. Optimizer steps are part of the graph anyway."""
        tensor = self._tensor(tensor, "extend_backward_graph", "tensor")
        if not self._has_backward:
            raise RuntimeError("extend_backward_graph: build_backward comes first")
        self._graph.output(tensor)

    def realize_backward(self) -> None:
        """Give the graph its memory; after that inputs can be uploaded."""
        self._backend.check_idle()
        if not self._has_backward or self._loss is None:
            raise RuntimeError("realize_backward: build_backward comes first")
        self._graph.output(self._loss)
        self._graph.allocate()

    def _realized(self, verb: str) -> None:
        self._backend.check_idle()
        if not self._has_backward or not self._graph.is_allocated:
            raise RuntimeError(f"{verb}: realize_backward comes first")

    def graph_reset(self) -> None:
        """Zero the gradients and AdamW's moments; comes before the first compute_backward."""
        self.graph_reset_grads_only()
        for _, m, v in self._optimized.values():
            m.zero()
            v.zero()

    def graph_reset_grads_only(self) -> None:
        """Zero the gradients, keep AdamW's moments; comes before every further compute_backward."""
        self._realized("graph_reset")
        for gradient in self._watched:
            self._graph.clear(gradient)
        self._is_armed = True

    def compute_backward(self) -> None:
        """Run the forward pass, the backward pass and the optimizer steps once."""
        self._realized("compute_backward")
        if not self._is_armed:
            raise RuntimeError("compute_backward: graph_reset (first) or graph_reset_grads_only comes before it")
        self._graph.compute()
        self._is_armed = False


def _cross_entropy_step(g: Graph, d_loss: Tensor | None, cache: Any, logits: Tensor) -> tuple[Tensor]:
    """d_loss is None when the loss itself is differentiated: then the gradient of the sum, divided by the count later.
    Otherwise the loss is a part of a larger formula, and the division cannot wait."""
    d_logits = ops.cross_entropy_backward(g, cache)
    if d_loss is None:
        return (d_logits,)
    *_, inverse_count = cache
    factor = g.mul(g.reshape(d_loss, (1, 1)), ops.part_of_row(g, inverse_count, 1))
    return (g.mul(d_logits, factor),)
