# Part of core.pyx: graphs, their nodes and their memory.

cdef dict UNARY = {
    "abs": GGML_UNARY_OP_ABS, "sgn": GGML_UNARY_OP_SGN, "neg": GGML_UNARY_OP_NEG, "step": GGML_UNARY_OP_STEP,
    "tanh": GGML_UNARY_OP_TANH, "relu": GGML_UNARY_OP_RELU, "sigmoid": GGML_UNARY_OP_SIGMOID,
    "silu": GGML_UNARY_OP_SILU, "exp": GGML_UNARY_OP_EXP, "expm1": GGML_UNARY_OP_EXPM1,
    "softplus": GGML_UNARY_OP_SOFTPLUS, "gelu_erf": GGML_UNARY_OP_GELU_ERF, "gelu": GGML_UNARY_OP_GELU,
}  # fmt: skip

cdef set VIEWS = {GGML_OP_RESHAPE, GGML_OP_VIEW, GGML_OP_PERMUTE, GGML_OP_TRANSPOSE}

# operations whose kernels may write their output over an input of the same layout, and over which inputs
cdef set IN_PLACE_FIRST = {
    GGML_OP_SCALE, GGML_OP_SQR, GGML_OP_SQRT, GGML_OP_LOG, GGML_OP_UNARY, GGML_OP_ROPE, GGML_OP_ROPE_BACK,
    GGML_OP_RMS_NORM, GGML_OP_SOFT_MAX,
}  # fmt: skip
cdef set IN_PLACE_BOTH = {GGML_OP_ADD, GGML_OP_SUB, GGML_OP_MUL, GGML_OP_DIV}


@cython.final
@cython.no_gc_clear
cdef class Graph:
    """A recorded computation: inputs, nodes, outputs; then `allocate()` once and `compute()` as often as wanted.

    Nodes run in the order in which they were recorded, so a node that writes into a tensor (cpy, set_rows, add_into,
    opt_step_adamw, ...) sees what came before it and is seen by what comes after it. Nodes that neither lead to an
    output nor write into a tensor are dropped by `allocate()`. Memory of intermediate results is reused within a run;
    inputs, outputs and persistent tensors keep theirs.

    Constructors have ggml's names and argument order, and check what ggml would abort on: TypeError for a wrong kind
    of argument, ValueError for shapes, types, ranges and tensors of another session, RuntimeError for a closed or
    allocated graph and an exhausted capacity.
    """

    cdef readonly Backend backend
    cdef readonly bint closed
    cdef readonly bint is_allocated
    cdef bint computed
    cdef set cleared  # outputs that hold zeros before the first compute
    cdef bint inputs_written
    cdef size_t capacity_limit
    cdef list blocks
    cdef list buffers
    cdef list inputs  # Leaf
    cdef list used_inputs  # Leaf, those that live nodes read
    cdef list custom_parameters
    cdef dict transposes  # address of an owner of memory -> {address of a tensor in it: address of its transposed copy}
    cdef ggml_tensor **nodes
    cdef unsigned char *keep  # the node writes into a tensor: never dropped
    cdef size_t n_nodes, room
    cdef ggml_tensor **live
    cdef size_t n_live
    cdef Block graph_block
    cdef ggml_cgraph *cgraph
    cdef object __weakref__

    def __cinit__(self, backend, capacity=DEFAULT_CAPACITY):
        self.closed = True
        if not isinstance(backend, Backend):
            raise TypeError(f"a Graph needs a Backend, not {type(backend).__name__}")
        self.backend = backend
        self.backend.check_idle()
        self.blocks = []
        self.buffers = []
        self.inputs = []
        self.used_inputs = []
        self.custom_parameters = []
        self.transposes = {}
        self.cleared = set()
        self.closed = False
        self.capacity = capacity
        self.backend.graphs.add(self)

    def __dealloc__(self):
        self.release()

    def __enter__(self):
        self.check_idle()
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        """Free the graph's memory; a second call does nothing."""
        if not self.closed:
            if self.backend.busy:
                raise RuntimeError("the session is busy in another thread; close the graph when that is done")
            self.release()

    cdef void release(self) noexcept:
        cdef Buffer buffer
        self.closed = True
        if self.buffers is not None:
            for buffer in self.buffers:
                buffer.release()
            self.buffers.clear()
            self.blocks.clear()
            self.inputs.clear()
            self.used_inputs.clear()
            self.custom_parameters.clear()
            self.transposes.clear()
        self.cgraph = NULL
        self.graph_block = None
        free(self.nodes)
        free(self.keep)
        free(self.live)
        self.nodes = NULL
        self.keep = NULL
        self.live = NULL
        self.n_nodes = self.room = self.n_live = 0

    cpdef check_idle(self):
        """Raise RuntimeError when closed, or busy in another thread."""
        if self.closed:
            raise RuntimeError("the graph is closed; record a new one")
        self.backend.check_idle()

    @property
    def capacity(self):
        """The most nodes this graph may get."""
        return self.capacity_limit

    @capacity.setter
    def capacity(self, value):
        cdef int64_t number = checked_int(value, "capacity")
        if not 1 <= number <= (1 << 26):
            raise ValueError(f"capacity must be from 1 to {1 << 26} nodes, not {number}")
        if number < <int64_t>self.n_nodes:
            raise ValueError(f"capacity {number} is below the {self.n_nodes} nodes that are recorded already")
        self.capacity_limit = number

    @property
    def n_recorded(self):
        """Nodes recorded so far."""
        return self.n_nodes

    # --- checks that every constructor makes

    cdef int check_recording(self) except -1:
        self.check_idle()
        if self.is_allocated:
            raise RuntimeError("the graph is allocated: nothing more can be recorded; make a new graph")
        return 0

    cdef ggml_context *recording(self, size_t n_tensors=1) except NULL:
        """The context for the next node; n_tensors: how many tensors its constructor makes."""
        self.check_recording()
        if self.n_nodes >= self.capacity_limit:
            raise RuntimeError(
                f"the graph's capacity of {self.capacity_limit} nodes is used up; "
                "set a larger one (Session: graph_capacity= or set_graph_capacity; Graph: capacity=)"
            )
        if not self.blocks or (<Block>self.blocks[-1]).room < n_tensors:
            self.blocks.append(Block(min(1024, 64 << len(self.blocks))))
        cdef Block block = self.blocks[-1]
        block.room -= n_tensors
        return block.ctx

    cdef Tensor arg(self, value, str op, str what):
        """A tensor that this graph may use."""
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {what} must be a Tensor, not {type(value).__name__}")
        cdef Tensor tensor = value
        tensor.check_open()
        if tensor.owner is not self and tensor.owner is not self.backend:
            raise ValueError(f"{op}: {what} = {tensor!r} belongs to another session")
        if tensor.leaf is not None and tensor.leaf.released:
            raise ValueError(f"{op}: the memory of {what} = {tensor!r} was given back (release_tensors)")
        if tensor.repacked and not (op == "mul_mat" and what == "a"):
            raise ValueError(f"{op}: {what} = {tensor!r} is repacked for products, which only mul_mat takes, as its a")
        return tensor

    cdef Tensor arg_f32(self, value, str op, str what):
        """A float32 tensor whose last axis has no gaps."""
        cdef Tensor tensor = self.arg(value, op, what)
        if tensor.t.type != GGML_TYPE_F32:
            raise ValueError(f"{op}: {what} must be f32, not {tensor!r}")
        if not rows_contiguous(tensor.t):
            raise ValueError(f"{op}: the last axis of {what} = {tensor!r} is strided; take cont() of it first")
        return tensor

    cdef Tensor arg_contiguous(self, value, str op, str what):
        cdef Tensor tensor = self.arg_f32(value, op, what)
        if not ggml_is_contiguous(tensor.t):
            raise ValueError(f"{op}: {what} = {tensor!r} is a view with gaps; take cont() of it first")
        return tensor

    cdef Tensor arg_writable(self, value, str op, str what):
        """A float32 tensor that a node may write into: persistent, or computed by this graph."""
        cdef Tensor tensor = self.arg_contiguous(value, op, what)
        if tensor.leaf is None and tensor.is_persistent:
            raise ValueError(f"{op}: {what} = {tensor!r} is mapped memory, which is read-only")
        if tensor.leaf is not None and not tensor.is_persistent:
            raise ValueError(f"{op}: {what} = {tensor!r} is an input; write into a persistent tensor instead")
        self.transposes.pop(<uintptr_t>root_of(tensor.t), None)
        return tensor

    cdef int arg_index(self, Tensor ids, int64_t rows, str op, str what) except -1:
        """Make sure that ids, an i32 tensor, can only ever hold 0..rows-1."""
        if ids.t.type != GGML_TYPE_I32:
            raise ValueError(f"{op}: {what} must be i32, not {ids!r}")
        if not ggml_is_contiguous(ids.t):
            raise ValueError(f"{op}: {what} = {ids!r} is a view with gaps")
        if ids.leaf is not None:
            self.limit(ids, 0, rows, f"rows of a table in {op}")
        elif not 0 < ids.bound <= rows:
            raise ValueError(f"{op}: {what} = {ids!r} must be an input, a persistent tensor, or argmax over <= {rows} columns")
        return 0

    def limit(self, tensor, low, high, reason=None):
        """Demand that the i32 input or persistent tensor only ever gets values in low..high-1.

        Checked at every upload, and now if it was uploaded already: what a kernel uses as an index must be limited.
        """
        cdef Tensor ids = self.arg(tensor, "limit", "tensor")
        if ids.leaf is None or ids.t.type != GGML_TYPE_I32:
            raise ValueError(f"limit: {ids!r} is no i32 input or persistent tensor")
        cdef int64_t lowest = checked_int(low, "low")
        cdef int64_t highest = checked_int(high, "high")
        if lowest >= highest:
            raise ValueError(f"limit: low = {lowest} must be below high = {highest}")
        cdef Leaf leaf = ids.leaf
        if not leaf.written and not lowest <= 0 < highest:
            raise ValueError(f"limit: {ids!r} holds zeros until it is uploaded, outside {lowest}..{highest - 1}")
        if leaf.written and (leaf.seen_low < lowest or leaf.seen_high >= highest):
            raise ValueError(
                f"limit: {ids!r} already holds values from {leaf.seen_low} to {leaf.seen_high}, "
                f"outside {lowest}..{highest - 1} ({reason or 'limit'})"
            )
        if max(leaf.low, lowest) >= min(leaf.high, highest):
            raise ValueError(f"limit: {ids!r} is limited to {leaf.low}..{leaf.high - 1} already")
        if highest < leaf.high or lowest > leaf.low:
            leaf.reason = reason or leaf.reason
        leaf.low = max(leaf.low, lowest)
        leaf.high = min(leaf.high, highest)

    cdef Tensor record(self, ggml_tensor *t, int ndim, bint keep=False, Leaf leaf=None, int64_t bound=0):
        """Append a node."""
        if t.view_src != NULL and ggml_is_contiguous(t):
            # axes of length 1 keep odd strides in a view, and not every check in ggml overlooks them
            canonical_strides(t)
        cdef size_t room
        cdef void *grown
        if self.n_nodes == self.room:
            room = max(64, 2 * self.room)
            grown = realloc(self.nodes, room * sizeof(ggml_tensor *))
            if grown == NULL:
                raise MemoryError()
            self.nodes = <ggml_tensor **>grown
            grown = realloc(self.keep, room)
            if grown == NULL:
                raise MemoryError()
            self.keep = <unsigned char *>grown
            self.room = room
        self.nodes[self.n_nodes] = t
        self.keep[self.n_nodes] = keep
        self.n_nodes += 1
        return make_tensor(t, self, ndim, leaf, bound)

    # --- inputs and outputs

    def input(self, shape, dtype="f32", name=None):
        """A tensor that Python uploads to before `compute()`; it keeps its values until the next upload."""
        cdef ggml_type kind = <ggml_type>type_number(dtype)
        shape = checked_shape(shape, kind)
        if ggml_is_quantized(kind):
            raise ValueError(f"inputs are f32, f16, bf16 or i32, not {dtype}; make a persistent tensor")
        cdef ggml_context *ctx = self.recording()
        cdef int64_t ne[4]
        to_ne(shape, ne)
        cdef ggml_tensor *t = ggml_new_tensor(ctx, kind, 4, ne)
        set_name(t, name)
        # the output flag keeps other nodes out of its memory: an input may be read again by the next run
        ggml_set_input(t)
        ggml_set_output(t)
        cdef Leaf leaf = make_leaf(t)
        self.inputs.append(leaf)
        return make_tensor(t, self, len(shape), leaf)

    def output(self, tensor):
        """Keep a node's result, so that it can be downloaded after `compute()`. Returns the tensor."""
        cdef Tensor out = self.arg(tensor, "output", "tensor")
        self.check_recording()
        if out.is_persistent or (out.leaf is not None and out.t.op == GGML_OP_NONE):
            return out  # it keeps its memory anyway
        ggml_set_output(out.t)
        if out.leaf is None:
            ggml_set_output(root_of(out.t))
        return out

    def set_name(self, tensor, name):
        """Name a tensor (at most 63 bytes), for `describe()` and `explain()`."""
        cdef Tensor out = self.arg(tensor, "set_name", "tensor")
        self.check_recording()
        set_name(out.t, name)
        return out

    def on_upload(self, tensor, listener):
        """Call listener(array) after every upload to an input, to derive other inputs from it.

        A part (slice) of such an input can no longer be uploaded by itself.
        """
        cdef Tensor source = self.arg(tensor, "on_upload", "tensor")
        if source.leaf is None or source.is_persistent:
            raise ValueError(f"on_upload: {source!r} is no input")
        self.check_recording()
        if source.leaf.listeners is None:
            source.leaf.listeners = []
        source.leaf.listeners.append(listener)

    def clear(self, tensor):
        """Fill the memory of an output with zeros, until the next `compute()`."""
        cdef Tensor out = self.arg(tensor, "clear", "tensor")
        out.check_memory()
        if out.leaf is not None or out.is_persistent or not (root_of(out.t).flags & GGML_TENSOR_FLAG_OUTPUT):
            raise ValueError(f"clear: {out!r} is no output")
        if not ggml_is_contiguous(out.t):
            raise ValueError(f"clear: {out!r} is a view with gaps")
        ggml_backend_tensor_memset(out.t, 0, 0, ggml_nbytes(out.t))
        self.cleared.add(<uintptr_t>out.t)

    cdef int check_download(self, Tensor tensor) except -1:
        if not (root_of(tensor.t).flags & GGML_TENSOR_FLAG_OUTPUT):
            raise RuntimeError(
                f"{tensor!r} is an intermediate result whose memory is reused: mark it with output() "
                "(Session: set_output) before the graph is allocated"
            )
        if not self.computed and <uintptr_t>tensor.t not in self.cleared:
            raise RuntimeError(f"{tensor!r} has no value yet: compute() comes first")
        return 0

    # --- views and copies

    def slice(self, a, axis, start, stop):
        """Rows, columns, ... start..stop-1 along one axis, as a view."""
        cdef Tensor x = self.arg(a, "slice", "a")
        cdef int64_t along = checked_int(axis, "slice: axis")
        cdef int64_t first = checked_int(start, "slice: start")
        cdef int64_t last = checked_int(stop, "slice: stop")
        if not -x.ndim <= along < x.ndim:
            raise ValueError(f"slice: axis {along} is out of range for {x!r}")
        cdef int d = x.ndim - 1 - (along % x.ndim)  # ggml's number of the axis
        if not 0 <= first < last <= x.t.ne[d]:
            raise ValueError(f"slice: {first}..{last} is no part of axis {along} of {x!r}, which has {x.t.ne[d]}")
        if ggml_is_quantized(x.t.type) and d == 0:
            raise ValueError(f"slice: the last axis of {x!r} is stored in blocks and cannot be cut")
        cdef ggml_context *ctx = self.recording()
        cdef int64_t ne[4]
        cdef int i
        for i in range(4):
            ne[i] = x.t.ne[i]
        ne[d] = last - first
        cdef ggml_tensor *t = ggml_view_4d(
            ctx, x.t, ne[0], ne[1], ne[2], ne[3], x.t.nb[1], x.t.nb[2], x.t.nb[3], first * x.t.nb[d]
        )
        t.nb[0] = x.t.nb[0]
        return self.record(t, x.ndim, False, x.leaf, x.bound)

    def reshape(self, a, shape):
        """The same elements in another shape, as a view; a must be contiguous."""
        cdef Tensor x = self.arg(a, "reshape", "a")
        shape = checked_shape(shape, x.t.type)
        if not ggml_is_contiguous(x.t):
            raise ValueError(f"reshape: {x!r} is a view with gaps; take cont() of it first")
        cdef int64_t ne[4]
        to_ne(shape, ne)
        if ne[0] * ne[1] * ne[2] * ne[3] != ggml_nelements(x.t):
            raise ValueError(f"reshape: {x!r} has {ggml_nelements(x.t)} elements, shape {shape} has another number")
        cdef ggml_tensor *t = ggml_reshape_4d(self.recording(), x.t, ne[0], ne[1], ne[2], ne[3])
        return self.record(t, len(shape), False, x.leaf, x.bound)

    def permute(self, a, axes):
        """Axes in another order, as a view (numpy.transpose)."""
        cdef Tensor x = self.arg(a, "permute", "a")
        if not isinstance(axes, (tuple, list)) or sorted(axes) != list(range(x.ndim)):
            raise ValueError(f"permute: axes must be an order of {tuple(range(x.ndim))}, not {axes!r}")
        if ggml_is_quantized(x.t.type) and axes[x.ndim - 1] != x.ndim - 1:
            raise ValueError(f"permute: the last axis of {x!r} is stored in blocks and must stay last")
        cdef int place_of[4]
        cdef int i
        for i in range(4):
            if x.t.nb[i] > INT32_MAX:
                raise ValueError(f"permute: {x!r} has strides beyond 2^31 bytes, which ggml_permute cannot express")
            place_of[i] = i
        for i in range(x.ndim):
            place_of[x.ndim - 1 - <int>axes[i]] = x.ndim - 1 - i
        cdef ggml_tensor *t = ggml_permute(
            self.recording(), x.t, place_of[0], place_of[1], place_of[2], place_of[3]
        )
        return self.record(t, x.ndim, False, x.leaf, x.bound)

    def transpose(self, a):
        """The last two axes exchanged, as a view."""
        cdef Tensor x = self.arg(a, "transpose", "a")
        if x.ndim < 2:
            raise ValueError(f"transpose: {x!r} has one axis only")
        axes = list(range(x.ndim))
        axes[-2:] = axes[:-3:-1]
        return self.permute(a, axes)

    def transposed(self, a):
        """A contiguous copy of a with its last two axes exchanged: one copy for all who ask, until a node writes into a.

        Where the view is contiguous as it is (one row, one column) nothing is copied.
        """
        cdef Tensor x = self.arg(a, "transposed", "a")
        self.check_recording()
        cdef dict copies = self.transposes.setdefault(<uintptr_t>root_of(x.t), {})
        key = <uintptr_t>x.t
        if key not in copies:
            view = self.transpose(a)
            if view.is_contiguous:
                return view
            copies[key] = <uintptr_t>(<Tensor>self.cont(view)).t
        return make_tensor(<ggml_tensor *><uintptr_t>copies[key], self, x.ndim)

    def cont(self, a, shape=None):
        """A contiguous copy, optionally in another shape with the same number of elements."""
        cdef Tensor x = self.arg(a, "cont", "a")
        if ggml_is_quantized(x.t.type):
            raise ValueError(f"cont: {x!r} is quantized; cast it to f32")
        shape = x.shape if shape is None else checked_shape(shape, x.t.type)
        cdef int64_t ne[4]
        to_ne(shape, ne)
        if ne[0] * ne[1] * ne[2] * ne[3] != ggml_nelements(x.t):
            raise ValueError(f"cont: {x!r} has {ggml_nelements(x.t)} elements, shape {shape} has another number")
        return self.record(ggml_cont_4d(self.recording(), x.t, ne[0], ne[1], ne[2], ne[3]), len(shape))

    def cast(self, a, dtype):
        """A copy in another type: among f32, f16 and bf16, or from a quantized type to f32."""
        cdef Tensor x = self.arg(a, "cast", "a")
        cdef ggml_type kind = <ggml_type>type_number(dtype)
        floats = (GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16)
        if kind not in floats or not (x.t.type in floats or (ggml_is_quantized(x.t.type) and kind == GGML_TYPE_F32)):
            raise ValueError(f"cast: {x!r} cannot be cast to {dtype}")
        return self.record(ggml_cast(self.recording(), x.t, kind), x.ndim)

    def cpy(self, a, target):
        """Copy a into target (as many elements; target persistent or computed). Returns target as it is afterwards."""
        cdef Tensor x = self.arg(a, "cpy", "a")
        cdef Tensor y = self.arg(target, "cpy", "target")
        floats = (GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16)
        if x.t.type not in floats or y.t.type not in floats:
            raise ValueError(f"cpy: both tensors must be f32, f16 or bf16: {x!r}, {y!r}")
        if y.t.type == GGML_TYPE_F32:
            y = self.arg_writable(target, "cpy", "target")
        elif not ggml_is_contiguous(y.t) or (y.leaf is None) == y.is_persistent:
            raise ValueError(f"cpy: target = {y!r} must be contiguous, and persistent or computed")
        self.transposes.pop(<uintptr_t>root_of(y.t), None)
        if ggml_nelements(x.t) != ggml_nelements(y.t):
            raise ValueError(f"cpy: {x!r} and {y!r} have different numbers of elements")
        if root_of(x.t) == root_of(y.t):
            raise ValueError(f"cpy: {x!r} and {y!r} share memory")
        return self.record(ggml_cpy(self.recording(), x.t, y.t), y.ndim, True)

    def concat(self, a, b, axis=-1):
        """a and b one after the other along an axis; the other axes must agree."""
        cdef Tensor x = self.arg(a, "concat", "a")
        cdef Tensor y = self.arg(b, "concat", "b")
        cdef int64_t along = checked_int(axis, "concat: axis")
        if x.ndim != y.ndim or not -x.ndim <= along < x.ndim:
            raise ValueError(f"concat: {x!r} and {y!r} cannot be put together along axis {along}")
        if x.t.type != y.t.type or x.t.type not in (GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16):
            raise ValueError(f"concat: {x!r} and {y!r} must be of the same type, f32, f16 or bf16")
        if not rows_contiguous(x.t) or not rows_contiguous(y.t):
            raise ValueError(f"concat: the last axis of {x!r} or {y!r} is strided; take cont() of it first")
        cdef int d = x.ndim - 1 - (along % x.ndim)
        cdef int i
        for i in range(4):
            if i != d and x.t.ne[i] != y.t.ne[i]:
                raise ValueError(f"concat: {x!r} and {y!r} differ in another axis than {along}")
        checked_shape(tuple([x.t.ne[i] + (y.t.ne[i] if i == d else 0) for i in range(3, -1, -1)]), x.t.type)
        return self.record(ggml_concat(self.recording(), x.t, y.t, d), x.ndim)

    def repeat(self, a, shape):
        """a repeated until it fills shape; every axis of shape must be a multiple of a's."""
        cdef Tensor x = self.arg_f32(a, "repeat", "a")
        shape = checked_shape(shape, GGML_TYPE_F32)
        cdef int64_t ne[4]
        to_ne(shape, ne)
        cdef int i
        for i in range(4):
            if ne[i] % x.t.ne[i]:
                raise ValueError(f"repeat: {x!r} does not fit into {shape} a whole number of times")
        return self.record(ggml_repeat_4d(self.recording(), x.t, ne[0], ne[1], ne[2], ne[3]), len(shape))

    def full(self, shape, value):
        """A new f32 tensor with every element equal to value."""
        shape = checked_shape(shape, GGML_TYPE_F32)
        cdef double number = checked_float(value, "full: value")
        cdef ggml_context *ctx = self.recording(2)
        cdef int64_t ne[4]
        to_ne(shape, ne)
        return self.record(ggml_fill_inplace(ctx, ggml_new_tensor(ctx, GGML_TYPE_F32, 4, ne), number), len(shape))

    def blank(self, shape):
        """A new f32 tensor that is not filled with anything: for nodes that write all of it before it is read."""
        shape = checked_shape(shape, GGML_TYPE_F32)
        cdef int64_t ne[4]
        to_ne(shape, ne)
        return make_tensor(ggml_new_tensor(self.recording(), GGML_TYPE_F32, 4, ne), self, len(shape))

    # --- elementwise

    cdef tuple binary_args(self, a, b, str op):
        """a and b with b repeatable into a."""
        cdef Tensor x = self.arg(a, op, "a")
        cdef Tensor y = self.arg(b, op, "b")
        floats = (GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16)
        if x.t.type not in floats or y.t.type not in (GGML_TYPE_F32, x.t.type):
            raise ValueError(f"{op}: types do not go together: {x!r}, {y!r}")
        if not rows_contiguous(x.t) or not rows_contiguous(y.t):
            raise ValueError(f"{op}: the last axis of {x!r} or {y!r} is strided; take cont() of it first")
        cdef int i
        for i in range(4):
            if x.t.ne[i] % y.t.ne[i]:
                raise ValueError(f"{op}: {y!r} cannot be broadcast to {x!r}: every axis of b must divide a's")
        return x, y

    def add(self, a, b):
        """a + b; b is repeated to a's shape."""
        x, y = self.binary_args(a, b, "add")
        return self.record(ggml_add(self.recording(), (<Tensor>x).t, (<Tensor>y).t), x.ndim)

    def sub(self, a, b):
        """a - b; b is repeated to a's shape."""
        x, y = self.binary_args(a, b, "sub")
        return self.record(ggml_sub(self.recording(), (<Tensor>x).t, (<Tensor>y).t), x.ndim)

    def mul(self, a, b):
        """a * b, elementwise; b is repeated to a's shape."""
        x, y = self.binary_args(a, b, "mul")
        return self.record(ggml_mul(self.recording(), (<Tensor>x).t, (<Tensor>y).t), x.ndim)

    def div(self, a, b):
        """a / b, elementwise; b is repeated to a's shape."""
        x, y = self.binary_args(a, b, "div")
        return self.record(ggml_div(self.recording(), (<Tensor>x).t, (<Tensor>y).t), x.ndim)

    def scale(self, a, factor, bias=0.0):
        """a * factor + bias."""
        cdef Tensor x = self.arg_contiguous(a, "scale", "a")
        cdef double s = checked_float(factor, "scale: factor")
        cdef double b = checked_float(bias, "scale: bias")
        return self.record(ggml_scale_bias(self.recording(), x.t, s, b), x.ndim)

    def sqr(self, a):
        cdef Tensor x = self.arg_f32(a, "sqr", "a")
        return self.record(ggml_sqr(self.recording(), x.t), x.ndim)

    def sqrt(self, a):
        cdef Tensor x = self.arg_f32(a, "sqrt", "a")
        return self.record(ggml_sqrt(self.recording(), x.t), x.ndim)

    def log(self, a):
        cdef Tensor x = self.arg_f32(a, "log", "a")
        return self.record(ggml_log(self.recording(), x.t), x.ndim)

    def sin(self, a):
        cdef Tensor x = self.arg_f32(a, "sin", "a")
        return self.record(ggml_sin(self.recording(), x.t), x.ndim)

    def cos(self, a):
        cdef Tensor x = self.arg_f32(a, "cos", "a")
        return self.record(ggml_cos(self.recording(), x.t), x.ndim)

    def unary(self, a, function):
        """function(a), elementwise: abs sgn neg step tanh relu sigmoid silu exp expm1 softplus gelu_erf gelu.

        gelu, the tanh form, is a float16 table on the CPU, with errors of 2e-3: what llama.cpp computes, and nothing to train
        with (ops.gelu is).
        """
        if function not in UNARY:
            raise ValueError(f"unary: {function!r} is none of {', '.join(UNARY)}")
        cdef Tensor x = self.arg_f32(a, function, "a")
        if not ggml_is_contiguous_1(x.t):
            raise ValueError(f"{function}: {x!r} is a view with gaps; take cont() of it first")
        cdef int number = UNARY[function]
        return self.record(ggml_unary(self.recording(), x.t, <ggml_unary_op>number), x.ndim)

    def tanh(self, a):
        return self.unary(a, "tanh")

    def exp(self, a):
        return self.unary(a, "exp")

    def neg(self, a):
        return self.unary(a, "neg")

    def sigmoid(self, a):
        return self.unary(a, "sigmoid")

    def silu(self, a):
        return self.unary(a, "silu")

    def relu(self, a):
        return self.unary(a, "relu")

    def silu_back(self, d_y, x):
        """The gradient of silu at x: d_y * (sigmoid(x) * (1 + x * (1 - sigmoid(x))))."""
        cdef Tensor d = self.arg_contiguous(d_y, "silu_back", "d_y")
        cdef Tensor a = self.arg_contiguous(x, "silu_back", "x")
        if not same_shape(d.t, a.t):
            raise ValueError(f"silu_back: {d!r} and {a!r} must be of the same shape")
        return self.record(ggml_silu_back(self.recording(), d.t, a.t), a.ndim)

    def swiglu(self, gate, up):
        """silu(gate) * up."""
        return self.glu(gate, up, GGML_GLU_OP_SWIGLU, "swiglu")

    def geglu(self, gate, up):
        """gelu(gate) * up, with the GELU of `unary`: a float16 table on the CPU."""
        return self.glu(gate, up, GGML_GLU_OP_GEGLU, "geglu")

    cdef Tensor glu(self, gate, up, ggml_glu_op kind, str op):
        cdef Tensor a = self.arg_f32(gate, op, "gate")
        cdef Tensor b = self.arg_f32(up, op, "up")
        if not same_shape(a.t, b.t):
            raise ValueError(f"{op}: {a!r} and {b!r} must be of the same shape")
        if not ggml_is_contiguous_1(a.t) or not ggml_is_contiguous_1(b.t):
            raise ValueError(f"{op}: {a!r} or {b!r} is a view with gaps; take cont() of it first")
        return self.record(ggml_glu_split(self.recording(), a.t, b.t, kind), a.ndim)

    # --- sums

    def sum(self, a):
        """The sum of all elements, shape (1,)."""
        cdef Tensor x = self.arg_contiguous(a, "sum", "a")
        return self.record(ggml_sum(self.recording(), x.t), 1)

    def sum_rows(self, a):
        """The sum over the last axis, which stays with length 1."""
        cdef Tensor x = self.arg_f32(a, "sum_rows", "a")
        return self.record(ggml_sum_rows(self.recording(), x.t), x.ndim)

    def mean(self, a):
        """The mean over the last axis, which stays with length 1."""
        cdef Tensor x = self.arg_f32(a, "mean", "a")
        return self.record(ggml_mean(self.recording(), x.t), x.ndim)

    def cumsum(self, a):
        """Running sums along the last axis."""
        cdef Tensor x = self.arg_f32(a, "cumsum", "a")
        return self.record(ggml_cumsum(self.recording(), x.t), x.ndim)

    def argmax(self, a):
        """The column of the largest element of every row of a matrix (N, V): i32 (N,)."""
        cdef Tensor x = self.arg_contiguous(a, "argmax", "a")
        if x.t.ne[2] != 1 or x.t.ne[3] != 1:
            raise ValueError(f"argmax: {x!r} must be a matrix")
        return self.record(ggml_argmax(self.recording(), x.t), 1, False, None, x.t.ne[0])

    # --- matrices, normalisation, attention

    def mul_mat(self, a, b):
        """b @ a^T over the last two axes: a (..., n, k), b (..., m, k) -> (..., m, n).

        A weight matrix (out, in) is a, the activations (N, in) are b. a may be f32, f16, bf16 or quantized, b is f32.
        The leading axes of a must divide those of b (several heads may share one matrix).
        """
        cdef Tensor x = self.arg(a, "mul_mat", "a")
        cdef Tensor y = self.arg_f32(b, "mul_mat", "b")
        if x.t.type == GGML_TYPE_I32:
            raise ValueError(f"mul_mat: a = {x!r} must be floating point")
        if not rows_contiguous(x.t) or ggml_is_transposed(x.t):
            raise ValueError(f"mul_mat: the last axis of a = {x!r} is strided; take cont() of it first")
        if y.t.nb[0] > y.t.nb[1] and y.t.ne[1] > 1:
            raise ValueError(f"mul_mat: b = {y!r} is transposed; take cont() of it first")
        if x.t.ne[0] != y.t.ne[0]:
            raise ValueError(f"mul_mat: the last axes of {x!r} and {y!r} must agree (b @ a^T)")
        if y.t.ne[2] % x.t.ne[2] or y.t.ne[3] % x.t.ne[3]:
            raise ValueError(f"mul_mat: the leading axes of a = {x!r} must divide those of b = {y!r}")
        checked_shape((y.t.ne[3], y.t.ne[2], y.t.ne[1], x.t.ne[1]), GGML_TYPE_F32)
        return self.record(ggml_mul_mat(self.recording(), x.t, y.t), max(x.ndim, y.ndim, 2))

    def soft_max_ext(self, a, mask=None, scale=1.0):
        """softmax(a * scale + mask) over the last axis.

        mask: None, or (..., rows, columns) with a's columns, at least a's rows, leading axes that divide a's.
        """
        cdef Tensor x = self.arg_contiguous(a, "soft_max_ext", "a")
        cdef double factor = checked_float(scale, "soft_max_ext: scale")
        cdef ggml_tensor *m = NULL
        cdef Tensor y
        if mask is not None:
            y = self.arg(mask, "soft_max_ext", "mask")
            m = y.t
            if m.type not in (GGML_TYPE_F32, GGML_TYPE_F16) or not ggml_is_contiguous(m):
                raise ValueError(f"soft_max_ext: mask = {y!r} must be contiguous and f32 or f16")
            if m.ne[0] != x.t.ne[0] or m.ne[1] < x.t.ne[1] or x.t.ne[2] % m.ne[2] or x.t.ne[3] % m.ne[3]:
                raise ValueError(f"soft_max_ext: mask = {y!r} does not fit {x!r}")
        return self.record(ggml_soft_max_ext(self.recording(), x.t, m, factor, 0.0), x.ndim)

    def norm(self, a, eps):
        """(a - mean) / sqrt(variance + eps) over the last axis."""
        cdef Tensor x = self.arg_f32(a, "norm", "a")
        cdef double epsilon = checked_float(eps, "norm: eps")
        if epsilon < 0:
            raise ValueError(f"norm: eps must not be negative: {eps}")
        return self.record(ggml_norm(self.recording(), x.t, epsilon), x.ndim)

    def rms_norm(self, a, eps):
        """a / sqrt(mean(a^2) + eps) over the last axis."""
        cdef Tensor x = self.arg_f32(a, "rms_norm", "a")
        cdef double epsilon = checked_float(eps, "rms_norm: eps")
        if epsilon < 0:
            raise ValueError(f"rms_norm: eps must not be negative: {eps}")
        return self.record(ggml_rms_norm(self.recording(), x.t, epsilon), x.ndim)

    cdef tuple rope_args(self, a, positions, n_dims, base, halves, factors, magnitude, str op):
        cdef Tensor x = self.arg_f32(a, op, "a")
        cdef Tensor p = self.arg(positions, op, "positions")
        if x.ndim < 3:
            raise ValueError(f"{op}: a must be (..., positions, heads, head_size), not {x!r}")
        if p.t.type != GGML_TYPE_I32 or p.ndim != 1 or p.t.ne[0] != x.t.ne[2] or not ggml_is_contiguous(p.t):
            raise ValueError(f"{op}: positions must be i32 ({x.t.ne[2]},), not {p!r}")
        cdef int64_t rotated = x.t.ne[0] if n_dims is None else checked_int(n_dims, f"{op}: n_dims")
        if not 2 <= rotated <= x.t.ne[0] or rotated % 2:
            raise ValueError(f"{op}: n_dims must be even, from 2 to {x.t.ne[0]}, not {rotated}")
        cdef double frequency = checked_float(base, f"{op}: base")
        if frequency <= 0:
            raise ValueError(f"{op}: base must be positive, not {base}")
        cdef Tensor f = None
        if factors is not None:
            f = self.arg_f32(factors, op, "factors")
            if f.ndim != 1 or f.t.ne[0] != rotated // 2 or not ggml_is_contiguous(f.t):
                raise ValueError(f"{op}: factors must be f32 ({rotated // 2},), one for each pair, not {f!r}")
        cdef int mode = GGML_ROPE_TYPE_NEOX if halves else 0
        return x, p, f, rotated, mode, frequency, checked_float(magnitude, f"{op}: magnitude")

    def rope(self, a, positions, n_dims=None, base=10000.0, halves=False, factors=None, magnitude=1.0):
        """Rotary positions over pairs of the last axis: a (..., T, heads, d), positions i32 (T,).

        halves: pairs are (i, i + n_dims/2), not (2i, 2i+1). factors: f32 (n_dims/2,), they divide the frequencies, or None.
        magnitude: multiplies what was turned.
        """
        x, p, f, rotated, mode, frequency, scale = self.rope_args(
            a, positions, n_dims, base, halves, factors, magnitude, "rope"
        )
        return self.record(
            ggml_rope_ext(
                self.recording(), (<Tensor>x).t, (<Tensor>p).t, NULL if f is None else (<Tensor>f).t, rotated, mode, 0,
                frequency, 1.0, 0.0, scale, 0.0, 0.0
            ),
            x.ndim,
        )

    def rope_back(self, d_y, positions, n_dims=None, base=10000.0, halves=False, factors=None, magnitude=1.0):
        """The gradient of `rope`: the opposite rotation."""
        x, p, f, rotated, mode, frequency, scale = self.rope_args(
            d_y, positions, n_dims, base, halves, factors, magnitude, "rope_back"
        )
        return self.record(
            ggml_rope_ext_back(
                self.recording(), (<Tensor>x).t, (<Tensor>p).t, NULL if f is None else (<Tensor>f).t, rotated, mode, 0,
                frequency, 1.0, 0.0, scale, 0.0, 0.0
            ),
            x.ndim,
        )

    def get_rows(self, a, ids):
        """Rows of a table: a (V, D), ids i32 (N,) -> (N, D); or per batch, a (B, V, D), ids (B, N) -> (B, N, D)."""
        cdef Tensor x = self.arg(a, "get_rows", "a")
        cdef Tensor i = self.arg(ids, "get_rows", "ids")
        if x.t.type == GGML_TYPE_I32 or not rows_contiguous(x.t):
            raise ValueError(f"get_rows: a = {x!r} must be floating point with contiguous rows")
        if x.t.ne[2] != i.t.ne[1] or x.t.ne[3] != i.t.ne[2] or i.t.ne[3] != 1:
            raise ValueError(f"get_rows: the leading axes of a = {x!r} must be those of ids = {i!r}")
        self.arg_index(i, x.t.ne[1], "get_rows", "ids")
        return self.record(ggml_get_rows(self.recording(), x.t, i.t), max(x.ndim, 2))

    def set_rows(self, target, rows, ids):
        """Write rows into target: target (V, D), rows (N, D), ids i32 (N,); or per batch with a leading axis.

        target is f32, or a persistent f16 tensor, where the rows are rounded. Rows must not be named twice (their order is
        not defined). Returns target as it is afterwards.
        """
        cdef Tensor x = self.arg(target, "set_rows", "target")
        if x.t.type == GGML_TYPE_F16 and x.is_persistent and x.leaf is not None:
            self.transposes.pop(<uintptr_t>root_of(x.t), None)
        else:
            x = self.arg_writable(target, "set_rows", "target")
        cdef Tensor y = self.arg_f32(rows, "set_rows", "rows")
        cdef Tensor i = self.arg(ids, "set_rows", "ids")
        if x.t.ne[0] != y.t.ne[0] or x.t.ne[2] != y.t.ne[2] or x.t.ne[3] != y.t.ne[3]:
            raise ValueError(f"set_rows: rows = {y!r} do not fit target = {x!r}")
        if y.t.ne[1] != i.t.ne[0] or y.t.ne[2] % i.t.ne[1] or y.t.ne[3] % i.t.ne[2] or i.t.ne[3] != 1:
            raise ValueError(f"set_rows: ids = {i!r} do not fit rows = {y!r}")
        if root_of(x.t) == root_of(y.t):
            raise ValueError(f"set_rows: {x!r} and {y!r} share memory")
        self.arg_index(i, x.t.ne[1], "set_rows", "ids")
        return self.record(ggml_set_rows(self.recording(), x.t, y.t, i.t), x.ndim, x.is_persistent)

    # --- writing into tensors

    def add_into(self, target, b):
        """target += b (b is repeated to target's shape). Returns target as it is afterwards."""
        cdef Tensor x = self.arg_writable(target, "add_into", "target")
        x, y = self.binary_args(target, b, "add_into")
        return self.record(ggml_add_inplace(self.recording(), (<Tensor>x).t, (<Tensor>y).t), x.ndim, True)

    def fill_into(self, target, value):
        """target = value everywhere. Returns target as it is afterwards."""
        cdef Tensor x = self.arg_writable(target, "fill_into", "target")
        cdef double number = checked_float(value, "fill_into: value")
        return self.record(ggml_fill_inplace(self.recording(), x.t, number), x.ndim, True)

    def opt_step_adamw(self, weight, gradient, m, v, hp):
        """One AdamW update of a persistent f32 weight in place, with its persistent moments m and v.

        hp: seven numbers [lr, beta1, beta2, eps, weight_decay, s5, s6], shape (7,) or (1, 7):
        m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2;
        w = w (1 - lr weight_decay) - lr (m s5) / (sqrt(v s6) + eps).
        """
        cdef Tensor w = self.arg_writable(weight, "opt_step_adamw", "weight")
        cdef Tensor g = self.arg_contiguous(gradient, "opt_step_adamw", "gradient")
        cdef Tensor first = self.arg_writable(m, "opt_step_adamw", "m")
        cdef Tensor second = self.arg_writable(v, "opt_step_adamw", "v")
        cdef Tensor row = self.arg_contiguous(hp, "opt_step_adamw", "hp")
        if not (w.is_persistent and first.is_persistent and second.is_persistent):
            raise ValueError(f"opt_step_adamw: weight = {w!r}, m = {first!r}, v = {second!r} must be persistent")
        if not (same_shape(w.t, g.t) and same_shape(w.t, first.t) and same_shape(w.t, second.t)):
            raise ValueError(f"opt_step_adamw: shapes differ: weight {w!r}, gradient {g!r}, m {first!r}, v {second!r}")
        if ggml_nelements(row.t) != 7:
            raise ValueError(f"opt_step_adamw: hp must have seven numbers, not {row!r}")
        if len({<uintptr_t>root_of(t.t) for t in [w, first, second, g, row]}) != 5:
            raise ValueError("opt_step_adamw: weight, gradient, m, v and hp must be five different tensors")
        ggml_set_param(w.t)
        return self.record(
            ggml_opt_step_adamw(self.recording(), w.t, g.t, first.t, second.t, row.t), w.ndim, True
        )

    # --- the project's own kernels (CPU only)

    def custom(self, kernel, inputs, shape, dtype="f32", params=b"", writes=(), name=None, n_tasks=None, scratch=()):
        """A node computed by a C function. See kernel.pxd for how to write one; it runs on CPU devices only.

        kernel: a capsule from `kernel_capsule`. inputs: up to 9 tensors, which become dst.src[0], dst.src[1], ...
        params: bytes handed to the kernel. writes: those of the inputs that the kernel writes into (persistent or
        computed, f32, contiguous); a node that writes is never dropped. scratch: likewise, where nothing else reads what is
        written: that alone keeps no node. n_tasks: how many threads call the kernel at most; None = all.
        The kernel's own demands on shapes, contiguity and the range of indices (see `limit`) are the caller's to check.
        """
        cdef void *function = self.kernel_function(kernel, "custom")
        cdef ggml_type kind = <ggml_type>type_number(dtype)
        shape = checked_shape(shape, kind)
        cdef ggml_tensor *arguments[10]
        cdef int n = self.custom_arguments(inputs, 9, arguments, "custom")
        for target in (*writes, *scratch):
            self.arg_writable(target, "custom", "writes")
            if not any(target is tensor for tensor in inputs):
                raise ValueError(f"custom: {target!r} is written but is none of the inputs")
        cdef Parameters parameters = Parameters(bytes(params), kernel)
        cdef void *userdata = self.spread(parameters, &function, n_tasks)
        cdef ggml_context *ctx = self.recording()
        cdef int64_t ne[4]
        to_ne(shape, ne)
        cdef ggml_tensor *t = ggml_custom_4d(
            ctx, kind, ne[0], ne[1], ne[2], ne[3], arguments, n, <ggml_custom_op_t>function, GGML_N_TASKS_MAX, userdata
        )
        set_name(t, name)
        self.custom_parameters.append(parameters)
        return self.record(t, len(shape), len(writes) > 0)

    def custom_into(self, kernel, target, inputs, params=b"", name=None, n_tasks=None):
        """Like `custom`, with target (persistent or computed) as the output: dst is a view of it, and dst.src[0] is
        target; inputs: up to 8 tensors, which become dst.src[1], ... Returns target as it is afterwards."""
        cdef void *function = self.kernel_function(kernel, "custom_into")
        cdef Tensor x = self.arg_writable(target, "custom_into", "target")
        cdef ggml_tensor *arguments[10]
        cdef int n = self.custom_arguments(inputs, 8, arguments, "custom_into")
        cdef Parameters parameters = Parameters(bytes(params), kernel)
        cdef void *userdata = self.spread(parameters, &function, n_tasks)
        cdef ggml_tensor *t = ggml_custom_inplace(
            self.recording(), x.t, arguments, n, <ggml_custom_op_t>function, GGML_N_TASKS_MAX, userdata
        )
        set_name(t, name)
        self.custom_parameters.append(parameters)
        return self.record(t, x.ndim, True)

    cdef void *kernel_function(self, kernel, str op) except NULL:
        if self.backend.kind != "cpu":
            raise ValueError(f"{op}: kernels run on the CPU only, not on {self.backend.device_name}")
        if not PyCapsule_IsValid(kernel, "ggml_bridge.kernel"):
            raise TypeError(f"{op}: kernel must be a capsule made by kernel_capsule, not {type(kernel).__name__}")
        return PyCapsule_GetPointer(kernel, "ggml_bridge.kernel")

    cdef void *spread(self, Parameters parameters, void **function, n_tasks) except NULL:
        """Who calls the kernel how often: changes `function` to what ggml is to call, and returns its userdata."""
        cdef int tasks = self.backend.threads if n_tasks is None else min(self.tasks(n_tasks), self.backend.threads)
        parameters.task.function = <ggml_custom_op_t>function[0]
        parameters.task.n_tasks = tasks
        parameters.task.params = parameters.aligned
        parameters.task.runner = self.backend.runner
        if self.backend.runner != NULL:
            function[0] = <void *>call_on_runner
        elif n_tasks is not None:
            function[0] = <void *>call_few
        else:
            return parameters.aligned
        return &parameters.task

    cdef int custom_arguments(self, inputs, int most, ggml_tensor **arguments, str op) except -1:
        cdef int n = 0
        if len(inputs) > most:
            raise ValueError(f"{op}: at most {most} inputs, not {len(inputs)}")
        for tensor in inputs:
            arguments[n] = self.arg(tensor, op, f"inputs[{n}]").t
            n += 1
        return n

    cdef int tasks(self, n_tasks) except 0:
        cdef int64_t number = checked_int(n_tasks, "n_tasks")
        if not 1 <= number <= GGML_MAX_N_THREADS:
            raise ValueError(f"n_tasks must be from 1 to {GGML_MAX_N_THREADS}, not {number}")
        return number

    # --- memory

    def allocate(self):
        """Drop what leads nowhere, give every node its memory, and freeze the graph.

        Raises RuntimeError when the device cannot run a node (naming the nodes), MemoryError when memory is short.
        """
        self.check_idle()
        if self.is_allocated:
            raise RuntimeError("the graph is allocated already")
        if self.n_nodes == 0:
            raise RuntimeError("the graph has no nodes yet")
        self.backend.busy = True
        try:
            self.backend.place_pending()
            self.find_live()
            self.check_supported()
            self.build()
            self.plan()
            self.is_allocated = True
        finally:
            self.backend.busy = False

    cdef int find_live(self) except -1:
        """Collect the nodes that lead to an output or write into a tensor, in the order of recording."""
        cdef set needed = set()
        cdef size_t i
        cdef int j
        cdef ggml_tensor *node
        cdef size_t count = 0
        cdef unsigned char *alive = <unsigned char *>malloc(self.n_nodes)
        if alive == NULL:
            raise MemoryError()
        try:
            for i in range(self.n_nodes, 0, -1):
                node = self.nodes[i - 1]
                alive[i - 1] = (
                    self.keep[i - 1]
                    or (node.flags & GGML_TENSOR_FLAG_OUTPUT) != 0
                    or <uintptr_t>node in needed
                    # a node that fills a tensor the graph made (full, set_rows) lives when any reader of it does
                    or (node.op not in VIEWS and node.view_src != NULL and <uintptr_t>node.view_src in needed)
                )
                if alive[i - 1]:
                    count += 1
                    needed.add(<uintptr_t>root_of(node))
                    for j in range(GGML_MAX_SRC):
                        if node.src[j] != NULL:
                            needed.add(<uintptr_t>node.src[j])
                            if node.src[j].view_src != NULL:
                                needed.add(<uintptr_t>node.src[j].view_src)
            free(self.live)
            self.live = <ggml_tensor **>malloc(max(count, 1) * sizeof(ggml_tensor *))
            if self.live == NULL:
                raise MemoryError()
            self.n_live = 0
            for i in range(self.n_nodes):
                if alive[i]:
                    self.live[self.n_live] = self.nodes[i]
                    self.n_live += 1
        finally:
            free(alive)
        if self.n_live == 0:
            raise RuntimeError("nothing in the graph leads to an output: mark one with output() (Session: set_output)")
        cdef Leaf leaf
        self.used_inputs = [leaf for leaf in self.inputs if <uintptr_t>leaf.t in needed]
        return 0

    cdef int check_supported(self) except -1:
        refused = []
        cdef size_t i
        for i in range(self.n_live):
            if not ggml_backend_dev_supports_op(self.backend.device, self.live[i]):
                refused.append(f"{i}: {ggml_op_desc(self.live[i]).decode()} {shape_of(self.live[i], 4)}")
        if refused:
            more = f" and {len(refused) - 10} more" if len(refused) > 10 else ""
            raise RuntimeError(
                f"{self.backend.device_name} cannot run these nodes: {'; '.join(refused[:10])}{more}"
            )
        return 0

    cdef int build(self) except -1:
        """The ggml graph over the live nodes. Every source of a node is in the graph when the node is added, so ggml
        appends exactly the node itself and the order of recording is kept."""
        cdef set leaves = set()
        cdef size_t i
        cdef int j
        cdef Leaf leaf
        for i in range(self.n_live):
            for j in range(GGML_MAX_SRC):
                if self.live[i].src[j] != NULL and self.live[i].src[j].op == GGML_OP_NONE:
                    leaves.add(<uintptr_t>self.live[i].src[j])
        cdef size_t size = self.n_live + len(leaves) + len(self.inputs) + 16
        self.graph_block = Block(0, ggml_graph_overhead_custom(size, False) + 256)
        self.cgraph = ggml_new_graph_custom(self.graph_block.ctx, size, False)
        for leaf in self.inputs:
            ggml_build_forward_expand(self.cgraph, leaf.t)
        for i in range(self.n_live):
            ggml_build_forward_expand(self.cgraph, self.live[i])
        return 0

    cdef int plan(self) except -1:
        """Assign memory to every tensor of the graph.

        This stands in for ggml's graph allocator, which aborts the process when a graph leaves more than 256 gaps in
        its memory. The rule is the same: a result lives until its last reader, elementwise nodes write over an input
        that ends with them, and the best fitting gap is used first.
        """
        cdef size_t i
        cdef int j
        cdef ggml_tensor *node
        cdef ggml_tensor *source
        cdef ggml_tensor *root
        cdef Leaf leaf
        cdef ggml_backend_buffer_type *buft = self.backend.buft
        cdef size_t alignment = max(64, ggml_backend_buft_get_alignment(buft))
        cdef Planner planner = Planner(ggml_backend_buft_get_max_size(buft))
        cdef size_t delay = CPU_RELEASE_DELAY if self.backend.kind == "cpu" else GPU_RELEASE_DELAY
        cdef size_t forever = self.n_live + delay + 1
        cdef dict last = {}  # root -> the last node that touches it
        cdef dict storage = {}  # root -> Storage
        cdef list ending = [[] for _ in range(self.n_live)]
        cdef Storage taken
        for i in range(self.n_live):
            node = self.live[i]
            last[<uintptr_t>root_of(node)] = i
            for j in range(GGML_MAX_SRC):
                if node.src[j] != NULL:
                    last[<uintptr_t>root_of(node.src[j])] = i
        for key in last:  # also blank tensors that a kernel writes beside its own result: they are nobody's root
            if (<ggml_tensor *><uintptr_t>key).flags & GGML_TENSOR_FLAG_OUTPUT:
                last[key] = forever
        cdef list order = []  # roots in the order of placement
        for leaf in self.inputs:
            taken = planner.take(padded(ggml_backend_buft_get_alloc_size(buft, leaf.t), alignment))
            taken.last = forever
            storage[<uintptr_t>leaf.t] = taken
            order.append(<uintptr_t>leaf.t)
        for i in range(self.n_live):
            node = self.live[i]
            # blank tensors that a node fills (full) get memory where they are first used
            for j in range(GGML_MAX_SRC):
                source = node.src[j]
                if source == NULL:
                    continue
                root = root_of(source)
                if root.op == GGML_OP_NONE and root.buffer == NULL and <uintptr_t>root not in storage:
                    taken = planner.take(padded(ggml_backend_buft_get_alloc_size(buft, root), alignment))
                    taken.last = last[<uintptr_t>root]
                    storage[<uintptr_t>root] = taken
                    order.append(<uintptr_t>root)
                    if taken.last < self.n_live:
                        ending[taken.last].append(taken)
            if node.view_src == NULL:
                taken = self.in_place(node, i, storage)
                if taken is None:
                    taken = planner.take(padded(ggml_backend_buft_get_alloc_size(buft, node), alignment))
                taken.last = last[<uintptr_t>node]
                storage[<uintptr_t>node] = taken
                order.append(<uintptr_t>node)
                if taken.last < self.n_live:
                    ending[taken.last].append(taken)
            if i >= delay:
                for taken in ending[i - delay]:
                    if taken.last == i - delay:
                        planner.give_back(taken)
        self.buffers = self.backend.new_buffers(planner.sizes(), 2)
        try:
            for key in order:
                taken = storage[key]
                place(self.buffers[taken.chunk], <ggml_tensor *><uintptr_t>key, taken.offset)
        except MemoryError:
            self.release()  # half of the tensors have memory: of no use any more
            raise
        for leaf in self.inputs:
            ggml_backend_tensor_memset(leaf.t, 0, 0, ggml_nbytes(leaf.t))
        for i in range(self.n_live):
            node = self.live[i]
            if node.view_src != NULL and node.buffer == NULL:
                ggml_backend_view_init(node)
        return 0

    cdef Storage in_place(self, ggml_tensor *node, size_t i, dict storage):
        """The storage of an input that node i may overwrite with its output, or None."""
        cdef int candidates = 2 if node.op in IN_PLACE_BOTH else 1 if node.op in IN_PLACE_FIRST else 0
        cdef int j, k
        cdef ggml_tensor *source
        cdef Storage found
        for j in range(candidates):
            source = node.src[j]
            if source == NULL or not same_layout(node, source):
                continue
            if source.view_src != NULL and (
                source.view_offs != 0 or ggml_nbytes(source) != ggml_nbytes(source.view_src)
            ):
                continue
            found = storage.get(<uintptr_t>root_of(source))
            if found is None or found.last != i:
                continue
            for k in range(GGML_MAX_SRC):
                if k != j and node.src[k] != NULL and root_of(node.src[k]) == root_of(source):
                    if not same_layout(node.src[k], source):
                        break
            else:
                return found
        return None

    # --- running

    def compute(self):
        """Run all nodes once. Raises RuntimeError when an input was never uploaded or ggml reports a failure."""
        self.check_idle()
        if not self.is_allocated:
            raise RuntimeError("the graph has no memory yet: allocate() comes before compute()")
        self.backend.check_process()
        cdef Leaf leaf
        if not self.inputs_written:
            for leaf in self.used_inputs:
                if not leaf.written:
                    name = leaf.t.name.decode("utf-8", "replace")
                    raise RuntimeError(
                        f"input {name!r} {type_name(leaf.t.type)} {shape_of(leaf.t, 4)} was never uploaded"
                    )
            self.inputs_written = True
        cdef int status
        cdef Backend backend = self.backend
        backend.busy = True
        with nogil:
            status = ggml_backend_graph_compute(backend.backend, self.cgraph)
        backend.busy = False
        if status != GGML_STATUS_SUCCESS:
            raise RuntimeError(f"ggml could not compute the graph: {ggml_status_to_string(status).decode()}" + said())
        self.computed = True
        PyErr_CheckSignals()  # answer Ctrl-C between two runs

    # --- looking inside

    def describe(self):
        """The nodes that run (before `allocate()`: all that are recorded), as a list of `Node` records."""
        self.check_idle()
        cdef ggml_tensor **nodes = self.live if self.is_allocated else self.nodes
        cdef size_t count = self.n_live if self.is_allocated else self.n_nodes
        cdef size_t i
        cdef int j
        cdef ggml_tensor *t
        cdef ggml_tensor *s
        found = []
        for i in range(count):
            t = nodes[i]
            sources = []
            for j in range(GGML_MAX_SRC):
                s = t.src[j]
                if s != NULL and s != t:
                    sources.append(
                        Source(
                            s.name.decode("utf-8", "replace"), shape_of(s, 4), type_name(s.type),
                            bool(ggml_is_contiguous(s)), bool(rows_contiguous(s)),
                        )  # fmt: skip
                    )
            found.append(
                Node(
                    i, ggml_op_desc(t).decode(), t.name.decode("utf-8", "replace"), shape_of(t, 4), type_name(t.type),
                    self.backend.device_name, tuple(sources), t.view_src != NULL,
                )  # fmt: skip
            )
        return found

    @property
    def memory_bytes(self):
        """Bytes of the buffers for inputs, outputs and intermediate results."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def explain(self):
        """An `Explanation`: every node with its device, the number of splits, and bytes. `str()` of it is a table."""
        cdef Block block
        nodes = tuple(self.describe())
        metadata = self.backend.metadata_bytes
        for block in self.blocks:
            metadata += block.nbytes
        if self.graph_block is not None:
            metadata += self.graph_block.nbytes
        return Explanation(
            self.backend.device_name,
            self.backend.n_threads,
            nodes,
            1,  # allocate() refuses a graph that the device cannot run alone
            {"weights": self.backend.persistent_bytes, "graph": self.memory_bytes, "metadata": metadata},
        )
