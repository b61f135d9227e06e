# cython: language_level=3, embedsignature=True
"""Devices, memory and graphs of ggml, checked: what ggml answers with abort() raises a Python exception here.

Shapes are numpy shapes throughout (the last axis is contiguous in memory); ggml's ne[0] is the last axis.
"""

import os
import weakref

cimport cython
import numpy as np

from cpython.exc cimport PyErr_CheckSignals
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid
from libc.math cimport isfinite
from libc.stdint cimport INT32_MAX, INT64_MAX, int64_t, uintptr_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memset

from ggml_bridge.functions cimport *

from ggml_bridge.cards import KEPT_FREE as _KEPT_FREE
from ggml_bridge.cards import check_architecture as _check_architecture
from ggml_bridge.loading import LoadError
from ggml_bridge.loading import why_missing as _why_missing
from ggml_bridge.machine import memory_limit as _memory_limit
from ggml_bridge.records import Device, Explanation, Node, Source

DEVICE_KINDS = ("cpu", "gpu", "igpu", "accel", "meta")
DEFAULT_CAPACITY = 65536

# Memory that a node no longer needs is handed out again only this many nodes later: backends fuse neighbouring nodes, and
# then read the first one's input while they write the last one's output. The CPU fuses two (RMS_NORM and MUL); GPUs more.
cdef int CPU_RELEASE_DELAY = 2
cdef int GPU_RELEASE_DELAY = 6

# Worker threads wait for work by spinning for a while before they sleep. ggml's default (50) spins about 100 ms, which
# takes a core from everything else between steps; 1 spins a few milliseconds, longer than the gap between two steps.
cdef unsigned POLL = 1

cdef bint is_bound = False
cdef bint has_backends = False
cdef str said_at_start = ""  # ggml's last complaint while it looked for devices


# ----------------------------------------------------------------------------------------------------------------------
# binding to the library
# ----------------------------------------------------------------------------------------------------------------------


def x86_features():
    """Bits of what this processor can run: 1 = AVX2, 2 = FMA, 4 = F16C; -1 when it is not an x86 processor."""
    return bridge_x86_features()


def headers_version():
    return bridge_headers_version.decode()


def function_names():
    """Names of the ggml functions whose addresses `_bind` needs."""
    names = []
    cdef int i = 0
    while bridge_function_names[i] != NULL:
        names.append(bridge_function_names[i].decode())
        i += 1
    return names


def _bind(addresses):
    """Take the addresses of ggml's functions, {name: int}."""
    global is_bound
    cdef int i
    for i, name in enumerate(function_names()):
        bridge_function_slots[i][0] = <void *><uintptr_t>addresses[name]
    if not os.environ.get("TOY_GGML_LOG"):
        ggml_log_set(bridge_log, NULL)
    is_bound = True


cdef int need_library() except -1:
    if not is_bound:
        raise RuntimeError("ggml is not loaded: call ggml_bridge.load() first")
    return 0


def library_version():
    need_library()
    return ggml_version().decode()


def check_layout():
    """Raise LoadError unless the library's structures and numbering are those of the headers."""
    need_library()
    wrong = []
    if ggml_tensor_overhead() != bridge_tensor_bytes + 32:
        wrong.append(f"a tensor takes {ggml_tensor_overhead()} bytes instead of {bridge_tensor_bytes + 32}")
    for op, name in ((GGML_OP_OPT_STEP_ADAMW, "OPT_STEP_ADAMW"), (GGML_OP_CUSTOM, "CUSTOM"), (GGML_OP_FILL, "FILL")):
        if ggml_op_name(op).decode() != name:
            wrong.append(f"operation {<int>op} is {ggml_op_name(op).decode()} instead of {name}")
    if ggml_type_name(GGML_TYPE_BF16).decode() != "bf16":
        wrong.append(f"type {<int>GGML_TYPE_BF16} is {ggml_type_name(GGML_TYPE_BF16).decode()} instead of bf16")
    if wrong:
        raise LoadError("; ".join(wrong))


def load_backends(directory):
    """Register the backends: those linked into libggml and those that lie as modules in its directory."""
    global has_backends, said_at_start
    need_library()
    if has_backends:
        return
    cdef bytes path = os.fsencode(directory)
    cdef size_t i
    bridge_message[0] = 0
    ggml_backend_load_all_from_path(path)
    ggml_backend_dev_count()
    said_at_start = bridge_message.decode("utf-8", "replace")
    cdef ggml_backend_reg *cpu = NULL
    for i in range(ggml_backend_reg_count()):
        if ggml_backend_reg_name(ggml_backend_reg_get(i)) == b"CPU":
            cpu = ggml_backend_reg_get(i)
    if cpu == NULL:
        raise LoadError(f"the ggml in {directory} has no CPU backend")
    global bridge_threadpool_new, bridge_threadpool_free, bridge_set_threadpool, bridge_set_n_threads, bridge_extra_bufts
    (<void **>&bridge_threadpool_new)[0] = ggml_backend_reg_get_proc_address(cpu, b"ggml_threadpool_new")
    (<void **>&bridge_threadpool_free)[0] = ggml_backend_reg_get_proc_address(cpu, b"ggml_threadpool_free")
    (<void **>&bridge_set_threadpool)[0] = ggml_backend_reg_get_proc_address(cpu, b"ggml_backend_cpu_set_threadpool")
    (<void **>&bridge_set_n_threads)[0] = ggml_backend_reg_get_proc_address(cpu, b"ggml_backend_set_n_threads")
    # may be missing: then no weight is repacked
    (<void **>&bridge_extra_bufts)[0] = ggml_backend_reg_get_proc_address(cpu, b"ggml_backend_dev_get_extra_bufts")
    if bridge_threadpool_new == NULL or bridge_threadpool_free == NULL or bridge_set_threadpool == NULL or (
        bridge_set_n_threads == NULL
    ):
        raise LoadError("the CPU backend of this ggml offers no thread pool; ggml 0.20 is expected")
    has_backends = True


cdef device_record(ggml_backend_device *device):
    cdef ggml_backend_dev_props properties
    memset(&properties, 0, sizeof(properties))
    ggml_backend_dev_get_props(device, &properties)
    capabilities = []
    if properties.caps.asynchronous:
        capabilities.append("async")
    if properties.caps.host_buffer:
        capabilities.append("host_buffer")
    if properties.caps.buffer_from_host_ptr:
        capabilities.append("buffer_from_host_ptr")
    if properties.caps.events:
        capabilities.append("events")
    return Device(
        properties.name.decode("utf-8", "replace"),
        DEVICE_KINDS[properties.type] if properties.type < len(DEVICE_KINDS) else "unknown",
        properties.description.decode("utf-8", "replace"),
        properties.memory_total,
        properties.memory_free,
        ggml_backend_reg_name(ggml_backend_dev_backend_reg(device)).decode("utf-8", "replace"),
        tuple(capabilities),
    )


def devices():
    """The devices of all registered backends, as `Device` records."""
    need_library()
    return [device_record(ggml_backend_dev_get(i)) for i in range(ggml_backend_dev_count())]


def backends():
    """{name of a registered backend: what it says of itself, {"ARCHS": "750,900", ...}}."""
    need_library()
    cdef size_t i
    cdef ggml_backend_reg *reg
    cdef ggml_backend_get_features_t get_features
    cdef ggml_backend_feature *feature
    found = {}
    for i in range(ggml_backend_reg_count()):
        reg = ggml_backend_reg_get(i)
        features = found[ggml_backend_reg_name(reg).decode("utf-8", "replace")] = {}
        get_features = <ggml_backend_get_features_t>ggml_backend_reg_get_proc_address(reg, b"ggml_backend_get_features")
        feature = get_features(reg) if get_features != NULL else NULL
        while feature != NULL and feature.name != NULL:
            features[feature.name.decode("utf-8", "replace")] = feature.value.decode("utf-8", "replace")
            feature += 1
    return found


def said_when_started():
    """ggml's last complaint while it looked for devices, "" when it had none."""
    return said_at_start


cdef ggml_backend_device *find_device(name) except NULL:
    """A device by its name, its backend's name ("metal" is ggml's MTL) or its kind; upper and lower case are the same, and
    "cuda:1" is CUDA1."""
    if not isinstance(name, str):
        raise TypeError(f"device must be a string, not {type(name).__name__}")
    wanted = {"metal": "mtl"}.get(name.lower(), name.lower().replace(":", ""))
    found = devices()
    for key in ("name", "backend", "kind"):
        for i, device in enumerate(found):
            if getattr(device, key).lower() == wanted:
                return ggml_backend_dev_get(i)
    listing = ", ".join(f"{device.name!r} ({device.backend}, {device.description})" for device in found)
    why = _why_missing(wanted, backends(), found, said_at_start)
    raise ValueError(f"device {name!r} was not found; the devices of this ggml: {listing}" + (f"; {why}" if why else ""))


def device(name):
    """The `Device` record of a name, as `Backend(device=name)` finds it. Raises ValueError, listing the devices."""
    return device_record(find_device(name))


def default_threads():
    """TOY_NUM_THREADS, or the number of processors this process may use."""
    setting = os.environ.get("TOY_NUM_THREADS", "").strip()
    if setting:
        try:
            return check_threads(setting)
        except ValueError as error:
            raise ValueError(f"TOY_NUM_THREADS: {error}") from None
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def check_threads(n_threads):
    """n_threads as an int between 1 and four times the processors (more only wait for each other, spinning)."""
    most = min(GGML_MAX_N_THREADS, 4 * (os.cpu_count() or 1))
    try:
        number = int(n_threads)
    except (TypeError, ValueError):
        number = 0
    if isinstance(n_threads, (bool, float)) or not 1 <= number <= most:
        raise ValueError(f"the number of threads must be an integer from 1 to {most}, not {n_threads!r}")
    return number


# ----------------------------------------------------------------------------------------------------------------------
# types and shapes
# ----------------------------------------------------------------------------------------------------------------------

cdef dict TYPES = {"f32": GGML_TYPE_F32, "f16": GGML_TYPE_F16, "bf16": GGML_TYPE_BF16, "i32": GGML_TYPE_I32}
cdef int64_t MOST_ELEMENTS = INT32_MAX  # some of ggml's kernels count elements or rows with 32 bits


cdef str type_name(ggml_type kind):
    return ggml_type_name(kind).decode()


cdef int type_number(dtype) except -1:
    if not isinstance(dtype, str):
        raise TypeError(f"dtype must be a string such as 'f32', not {type(dtype).__name__}")
    if dtype in TYPES:
        return TYPES[dtype]
    cdef int kind
    for kind in range(GGML_TYPE_COUNT):
        # removed types have a block size of 0
        if ggml_blck_size(<ggml_type>kind) > 0 and ggml_is_quantized(<ggml_type>kind):
            if type_name(<ggml_type>kind).lower() == dtype.lower():
                return kind
    raise ValueError(f"dtype {dtype!r} is unknown; f32, f16, bf16, i32 and ggml's quantized types are known")


# what ggml can make of numbers alone: the other types need a table of which numbers matter, or only serve its products
cdef tuple QUANTIZABLE = (
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs",
)


def quantize(array, dtype):
    """float32 (rows, n) -> uint8 (rows, bytes of a row) in one of ggml's types, by ggml's own quantiser."""
    need_library()
    if not isinstance(dtype, str) or dtype.lower() not in QUANTIZABLE:
        raise ValueError(f"dtype must be one of {', '.join(QUANTIZABLE)}, got {dtype!r}")
    cdef ggml_type kind = <ggml_type>type_number(dtype)
    if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.ndim != 2 or array.size == 0:
        raise ValueError("quantize takes a float32 array (rows, n) that is not empty")
    if array.shape[1] % ggml_blck_size(kind):
        raise ValueError(f"rows of {dtype} are a multiple of {ggml_blck_size(kind)} numbers, not {array.shape[1]}")
    if not np.isfinite(array).all():  # ggml would assert
        raise ValueError("quantize takes finite numbers")
    cdef const float[:, ::1] numbers = np.ascontiguousarray(array)
    cdef int64_t rows = numbers.shape[0], n = numbers.shape[1]
    cdef size_t row_bytes = ggml_type_size(kind) * (n // ggml_blck_size(kind))
    cdef uint8_t[:, ::1] out = np.empty((rows, row_bytes), np.uint8)
    with nogil:
        ggml_quantize_chunk(kind, &numbers[0, 0], &out[0, 0], 0, rows, n, NULL)
    if not ggml_validate_row_data(kind, &out[0, 0], rows * row_bytes):
        raise ValueError(f"{dtype} cannot hold these numbers: they are too large")
    return np.asarray(out)


cdef tuple checked_shape(shape, ggml_type kind):
    """A shape of 1 to 4 axes, every one at least 1, as a tuple of ints."""
    if isinstance(shape, (int, np.integer)):
        shape = (shape,)
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"a shape must be a tuple of integers, not {type(shape).__name__}")
    if not 1 <= len(shape) <= 4:
        raise ValueError(f"a shape has 1 to 4 axes, not {len(shape)}: {tuple(shape)}")
    axes = []
    total = 1
    for axis in shape:
        if isinstance(axis, bool) or not isinstance(axis, (int, np.integer)):
            raise TypeError(f"a shape is made of integers, not {type(axis).__name__}: {tuple(shape)}")
        if not 1 <= axis <= INT32_MAX:
            raise ValueError(f"every axis of a shape must be from 1 to {INT32_MAX}: {tuple(shape)}")
        axes.append(int(axis))
        total *= int(axis)
    if axes[-1] % ggml_blck_size(kind) != 0:
        raise ValueError(
            f"the last axis of a {type_name(kind)} tensor must be a multiple of {ggml_blck_size(kind)}: {tuple(axes)}"
        )
    if total > MOST_ELEMENTS:
        raise ValueError(f"a tensor has at most {MOST_ELEMENTS} elements, and shape {tuple(axes)} has {total}")
    return tuple(axes)


cdef void to_ne(tuple shape, int64_t *ne) except *:
    cdef int n = len(shape)
    cdef int i
    for i in range(4):
        ne[i] = shape[n - 1 - i] if i < n else 1


cdef tuple shape_of(const ggml_tensor *t, int ndim):
    return tuple([t.ne[ndim - 1 - i] for i in range(ndim)])


cdef bint same_shape(const ggml_tensor *a, const ggml_tensor *b) noexcept:
    return a.ne[0] == b.ne[0] and a.ne[1] == b.ne[1] and a.ne[2] == b.ne[2] and a.ne[3] == b.ne[3]


cdef bint same_layout(const ggml_tensor *a, const ggml_tensor *b) noexcept:
    return a.type == b.type and same_shape(a, b) and (
        a.nb[0] == b.nb[0] and a.nb[1] == b.nb[1] and a.nb[2] == b.nb[2] and a.nb[3] == b.nb[3]
    )


cdef bint rows_contiguous(const ggml_tensor *t) noexcept:
    return t.nb[0] == ggml_type_size(t.type)


cdef void canonical_strides(ggml_tensor *t) noexcept:
    """The strides of a contiguous tensor, as they are when it is not a view."""
    cdef int i
    t.nb[0] = ggml_type_size(t.type)
    t.nb[1] = t.nb[0] * (t.ne[0] // ggml_blck_size(t.type))
    for i in range(2, 4):
        t.nb[i] = t.nb[i - 1] * t.ne[i - 1]


cdef ggml_tensor *root_of(ggml_tensor *t) noexcept:
    """The tensor that owns the memory of t (ggml keeps view_src resolved to the owner)."""
    return t.view_src if t.view_src != NULL else t


cdef double checked_float(value, str what) except? -1.0:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{what} must be a number, not {type(value).__name__}")
    cdef double number = value
    if not isfinite(number) or not isfinite(<float>number):
        raise ValueError(f"{what} must be a finite float32, not {value!r}")
    return number


cdef int64_t checked_int(value, str what) except? -1:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{what} must be an integer, not {type(value).__name__}")
    if not -(1 << 62) < value < (1 << 62):
        raise ValueError(f"{what} = {value} is out of range")
    return value


cdef str said():
    """ggml's last message on this thread, to end an exception with."""
    cdef str message = bridge_message.decode("utf-8", "replace")
    bridge_message[0] = 0
    return f" (ggml: {message})" if message else ""


# ----------------------------------------------------------------------------------------------------------------------
# ownership of C memory
# ----------------------------------------------------------------------------------------------------------------------


@cython.final
@cython.no_gc_clear
cdef class Block:
    """A ggml context with room for a number of tensors (metadata only)."""

    cdef ggml_context *ctx
    cdef size_t room
    cdef size_t nbytes

    def __cinit__(self, size_t n_tensors, size_t extra=0):
        cdef ggml_init_params parameters
        self.nbytes = n_tensors * ggml_tensor_overhead() + extra
        parameters.mem_size = self.nbytes
        parameters.mem_buffer = NULL
        parameters.no_alloc = True
        self.room = n_tensors
        self.ctx = ggml_init(parameters)

    def __dealloc__(self):
        if self.ctx != NULL:
            ggml_free(self.ctx)


@cython.final
@cython.no_gc_clear
cdef class Buffer:
    """A buffer on a device."""

    cdef ggml_backend_buffer *buffer
    cdef readonly size_t nbytes
    cdef size_t n_tensors  # persistent tensors in it
    cdef object keep_alive  # whatever owns the memory, when the buffer is a mapping

    def __dealloc__(self):
        self.release()

    cdef void release(self) noexcept:
        if self.buffer != NULL:
            ggml_backend_buffer_free(self.buffer)
            self.buffer = NULL


ctypedef void (*slice_t)(void *args, int ith, int nth) noexcept nogil
ctypedef void (*runner_t)(slice_t slice, void *args, int nth) noexcept nogil


cdef struct Task:
    ggml_custom_op_t function
    int n_tasks
    void *params
    runner_t runner
    ggml_tensor *dst


cdef void call_few(ggml_tensor *dst, int ith, int nth, void *userdata) noexcept nogil:
    """Call a kernel on the first n_tasks threads (ggml calls custom operations on all of them)."""
    cdef Task *task = <Task *>userdata
    if ith < task.n_tasks:
        task.function(dst, ith, min(nth, task.n_tasks), task.params)


cdef void call_slice(void *args, int ith, int nth) noexcept nogil:
    cdef Task *task = <Task *>args
    task.function(task.dst, ith, nth, task.params)


cdef void call_on_runner(ggml_tensor *dst, int ith, int nth, void *userdata) noexcept nogil:
    """Let the backend's runner call a kernel n_tasks times; ggml itself has one thread then."""
    cdef Task *task = <Task *>userdata
    if ith == 0:
        task.dst = dst
        task.runner(call_slice, task, task.n_tasks)


@cython.final
cdef class Parameters:
    """The `params` bytes of a custom node, 64-byte aligned."""

    cdef Task task
    cdef void *memory
    cdef void *aligned
    cdef object kernel

    def __cinit__(self, bytes data, kernel):
        cdef size_t size = len(data)
        self.kernel = kernel
        self.memory = malloc(size + 64)
        if self.memory == NULL:
            raise MemoryError()
        self.aligned = <void *>((<uintptr_t>self.memory + 63) & ~<uintptr_t>63)
        memcpy(self.aligned, <const char *>data, size)

    def __dealloc__(self):
        free(self.memory)


@cython.final
cdef class Leaf:
    """State of a tensor that Python writes: what it was filled with, and for indices what it may be filled with."""

    cdef ggml_tensor *t
    cdef bint written
    cdef bint released  # its memory was given back
    cdef int64_t low, high  # every element must be in low..high-1 (integer tensors)
    cdef str reason
    cdef int64_t seen_low, seen_high
    cdef list listeners  # called with the array after every upload


# ----------------------------------------------------------------------------------------------------------------------
# tensors
# ----------------------------------------------------------------------------------------------------------------------


@cython.final
@cython.no_gc_clear
cdef class Tensor:
    """A handle of a tensor: `shape` (numpy order), `dtype`, `name`. It belongs to a Graph or, when persistent, a Backend."""

    cdef ggml_tensor *t
    cdef readonly object owner
    cdef readonly int ndim
    cdef Leaf leaf
    cdef bint repacked  # only mul_mat can read it
    cdef int64_t bound  # values of an index tensor that the graph computes are in 0..bound-1; 0 = not known

    def __init__(self):
        raise TypeError("tensors are made by a Session, Graph or Backend")

    @property
    def shape(self):
        self.check_open()
        return shape_of(self.t, self.ndim)

    @property
    def dtype(self):
        self.check_open()
        return type_name(self.t.type)

    @property
    def name(self):
        self.check_open()
        return self.t.name.decode("utf-8", "replace")

    @property
    def nbytes(self):
        self.check_open()
        return ggml_nbytes(self.t)

    @property
    def is_persistent(self):
        """True for tensors in a buffer of their own (weights); False for what lives in a graph's memory."""
        return isinstance(self.owner, Backend)

    @property
    def is_input(self):
        """True for what Python writes into a graph or a persistent tensor, False for what the graph computes."""
        return self.leaf is not None

    @property
    def is_contiguous(self):
        self.check_open()
        return ggml_is_contiguous(self.t)

    def __repr__(self):
        if self.owner.closed:
            return "<Tensor of a closed session>"
        return f"<Tensor {self.name or '(unnamed)'} {self.dtype} {self.shape}>"

    cdef int check_open(self) except -1:
        if self.owner.closed:
            raise RuntimeError("this tensor belongs to a session that is closed; tensors do not outlive their session")
        return 0

    cdef int check_memory(self) except -1:
        """Raise unless the tensor has memory that may be touched now."""
        self.check_open()
        self.owner.check_idle()
        if self.t.buffer == NULL or self.t.data == NULL:
            if isinstance(self.owner, Graph) and self.owner.is_allocated:
                raise RuntimeError(
                    f"{self!r} is not computed: nothing that leads to an output reads it; mark it with output() "
                    "(Session: set_output) before the graph is allocated"
                )
            raise RuntimeError(
                f"{self!r} has no memory yet: allocate() comes before upload, zero and download "
                "(in a Session: finalize_weights for persistent tensors, realize_backward for the others)"
            )
        return 0

    def upload(self, values):
        """Copy values into the tensor. values: an array of the same shape (leading axes of length 1 may differ).

        f32, f16 and bf16 take any real numbers; NaN and infinities are allowed (masks need them). i32 takes integers,
        which must be in the range that the graph's use of them allows: rows of a table, classes of a loss. Quantized
        types take their raw bytes. Raises TypeError, ValueError, or RuntimeError when there is no memory yet.
        """
        self.check_memory()
        if self.leaf is None:
            raise ValueError(f"{self!r} is computed by the graph: only inputs and persistent tensors can be uploaded to")
        if not ggml_is_contiguous(self.t):
            raise ValueError(f"{self!r} is a view with gaps; upload to the tensor it is a view of")
        cdef ggml_type kind = self.t.type
        if ggml_is_quantized(kind):
            self.upload_raw(values)
            return
        if isinstance(values, np.ma.MaskedArray):
            raise ValueError(f"{self!r} cannot take a masked array, whose mask would be lost: pass numpy.ma.filled(a, value)")
        try:
            array = np.asarray(values)
        except ValueError as error:
            raise ValueError(f"{self!r} takes an array, and this is none: {error}") from None
        if kind == GGML_TYPE_I32:
            if array.dtype.kind not in "iu":
                raise TypeError(f"{self!r} takes integers, not {array.dtype}")
        elif array.dtype.kind not in "fiu":
            raise TypeError(f"{self!r} takes real numbers, not {array.dtype}")
        self.check_array_shape(array)
        cdef float[::1] floats
        if kind == GGML_TYPE_F32:
            stored = np.ascontiguousarray(array, dtype=np.float32)
        elif kind == GGML_TYPE_I32:
            self.check_range(array)
            stored = np.ascontiguousarray(array, dtype=np.int32)
        elif kind == GGML_TYPE_F16:
            with np.errstate(over="ignore"):
                stored = np.ascontiguousarray(array, dtype=np.float16)
        else:
            floats = np.ascontiguousarray(array, dtype=np.float32).reshape(-1)
            stored = np.empty(floats.shape[0], np.uint16)
            self.to_bf16(floats, stored)
        self.set_bytes(stored.reshape(-1).view(np.uint8))
        self.tell(array)

    cdef int to_bf16(self, float[::1] floats, unsigned short[::1] halves) except -1:
        ggml_fp32_to_bf16_row(&floats[0], <ggml_bf16_t *>&halves[0], floats.shape[0])
        return 0

    cdef int set_bytes(self, const unsigned char[::1] raw) except -1:
        # the conversions above run foreign code and may let other threads run: the memory is checked again
        self.check_memory()
        if <size_t>raw.shape[0] != ggml_nbytes(self.t):
            raise ValueError(f"{self!r} takes {ggml_nbytes(self.t)} bytes, not {raw.shape[0]}")
        ggml_backend_tensor_set(self.t, &raw[0], 0, raw.shape[0])
        self.leaf.written = True
        return 0

    cdef int tell(self, array) except -1:
        if self.leaf.listeners is not None:
            if ggml_nelements(self.t) != ggml_nelements(self.leaf.t):
                raise ValueError(f"{self!r} is a part of a tensor that other inputs are derived from; upload the whole")
            for listener in self.leaf.listeners:
                listener(array)
        return 0

    cdef int check_array_shape(self, array) except -1:
        expected = shape_of(self.t, 4)
        given = tuple(array.shape)
        if len(given) > 4 or (1,) * (4 - len(given)) + given != expected:
            raise ValueError(f"{self!r} takes an array of shape {self.shape}, not {given}")
        return 0

    cdef int check_range(self, array) except -1:
        cdef object lowest = int(array.min())
        cdef object highest = int(array.max())
        cdef Leaf leaf = self.leaf
        if lowest < leaf.low or highest >= leaf.high:
            wrong = lowest if lowest < leaf.low else highest
            raise ValueError(
                f"{self!r} takes integers from {leaf.low} to {leaf.high - 1} ({leaf.reason or 'int32'}), not {wrong}"
            )
        leaf.seen_low = min(leaf.seen_low, <int64_t>lowest)
        leaf.seen_high = max(leaf.seen_high, <int64_t>highest)
        return 0

    cdef int upload_raw(self, values) except -1:
        cdef const unsigned char[::1] raw
        if isinstance(values, np.ndarray):
            raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        else:
            raw = values
        if <size_t>raw.shape[0] != ggml_nbytes(self.t):
            raise ValueError(f"{self!r} takes {ggml_nbytes(self.t)} bytes of {self.dtype} blocks, not {raw.shape[0]}")
        if not ggml_validate_row_data(self.t.type, &raw[0], raw.shape[0]):
            raise ValueError(f"the bytes are no valid {self.dtype} data" + said())
        return self.set_bytes(raw)

    def zero(self):
        """Fill an input or a persistent tensor with zeros."""
        self.check_memory()
        if self.leaf is None:
            raise ValueError(f"{self!r} is computed by the graph: only inputs and persistent tensors can be zeroed")
        if not ggml_is_contiguous(self.t):
            raise ValueError(f"{self!r} is a view with gaps; zero the tensor it is a view of")
        if self.t.type == GGML_TYPE_I32:
            self.check_range(np.zeros(1, np.int32))
        ggml_backend_tensor_memset(self.t, 0, 0, ggml_nbytes(self.t))
        self.leaf.written = True
        if self.leaf.listeners is not None:
            self.tell(np.zeros(self.shape, np.int32 if self.t.type == GGML_TYPE_I32 else np.float32))

    def download(self):
        """The tensor as a new numpy array: float32 (f32, f16, bf16), int32, or raw bytes (quantized)."""
        self.check_memory()
        if self.repacked:
            raise ValueError(f"{self!r} is repacked for products: its numbers cannot be read back")
        if self.leaf is None and not isinstance(self.owner, Backend):
            (<Graph>self.owner).check_download(self)
        cdef ggml_type kind = self.t.type
        cdef unsigned char[::1] raw
        raw = np.empty(ggml_nbytes(self.t), np.uint8)  # of a view with gaps: from its first to its last element
        self.check_memory()  # allocating may have let another thread run
        ggml_backend_tensor_get(self.t, &raw[0], 0, raw.shape[0])
        stored_as = {GGML_TYPE_F32: np.float32, GGML_TYPE_I32: np.int32, GGML_TYPE_F16: np.float16, GGML_TYPE_BF16: np.uint16}
        if kind not in stored_as:
            return np.asarray(raw)
        strides = tuple([self.t.nb[self.ndim - 1 - i] for i in range(self.ndim)])
        array = np.ndarray(self.shape, stored_as[kind], np.asarray(raw), strides=strides)
        if kind == GGML_TYPE_BF16:  # the upper half of a float32
            return (array.astype(np.uint32) << 16).view(np.float32)
        return np.ascontiguousarray(array, np.int32 if kind == GGML_TYPE_I32 else np.float32)


cdef Tensor make_tensor(ggml_tensor *t, object owner, int ndim, Leaf leaf=None, int64_t bound=0):
    cdef Tensor tensor = Tensor.__new__(Tensor)
    tensor.t = t
    tensor.owner = owner
    tensor.ndim = ndim
    tensor.leaf = leaf
    tensor.bound = bound
    return tensor


cdef Leaf make_leaf(ggml_tensor *t):
    cdef Leaf leaf = Leaf.__new__(Leaf)
    leaf.t = t
    leaf.low = -(<int64_t>INT32_MAX) - 1
    leaf.high = <int64_t>INT32_MAX + 1
    leaf.seen_low = INT64_MAX
    leaf.seen_high = -INT64_MAX
    return leaf


cdef int set_name(ggml_tensor *t, name) except -1:
    if name is None:
        return 0
    if not isinstance(name, str):
        raise TypeError(f"a tensor's name must be a string, not {type(name).__name__}")
    cdef bytes encoded = name.encode("utf-8", "replace")[:63]
    ggml_set_name(t, encoded)
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# a device that is open: its threads and the tensors that outlive a graph
# ----------------------------------------------------------------------------------------------------------------------


@cython.final
@cython.no_gc_clear
cdef class Backend:
    """An open device: its threads, and the persistent tensors that its graphs share.

    device: a name from `devices()`, a backend's name ("cpu", "metal", "vulkan") or a kind ("gpu").
    n_threads: worker threads of the CPU device; None takes TOY_NUM_THREADS or the processors of this process.
    runner: a capsule of `kernel.runner_capsule`: kernels (`Graph.custom`) are then cut into n_threads slices that the runner's
    threads compute, and ggml itself runs the graph with one thread, because its threads spin while they wait for each other.

    Use it as a context manager or call `close()`: graphs are freed first, then the persistent tensors, the device and
    its threads. One graph computes at a time; a call from another thread meanwhile raises RuntimeError.
    """

    cdef ggml_backend *backend
    cdef ggml_backend_device *device
    cdef ggml_backend_buffer_type *buft
    cdef ggml_threadpool *pool
    cdef readonly str device_name
    cdef readonly str kind
    cdef bint ends_when_full  # whether the device's kernels take memory of their own, and end the process without it
    cdef int threads
    cdef runner_t runner
    cdef readonly bint closed
    cdef bint busy
    cdef object pid
    cdef list blocks
    cdef list buffers
    cdef list pending  # Leaf of persistent tensors without memory
    cdef size_t n_persistent
    cdef object graphs
    cdef object __weakref__

    def __cinit__(self, device="cpu", n_threads=None, runner=None):
        self.closed = True
        self.runner = NULL
        if runner is not None:
            if not PyCapsule_IsValid(runner, "ggml_bridge.runner"):
                raise TypeError(f"runner must be a capsule made by runner_capsule, not {type(runner).__name__}")
            self.runner = <runner_t>PyCapsule_GetPointer(runner, "ggml_bridge.runner")
        if not has_backends:
            raise RuntimeError("ggml is not loaded: use ggml_bridge.Backend, not ggml_bridge.core.Backend")
        self.device = find_device(device)
        record = device_record(self.device)
        self.device_name = record.name
        self.kind = record.kind
        self.ends_when_full = record.backend in ("CUDA", "ROCm")
        self.threads = default_threads() if n_threads is None else check_threads(n_threads)
        self.blocks = []
        self.buffers = []
        self.pending = []
        self.graphs = weakref.WeakSet()
        self.pid = os.getpid()
        if record.backend == "CUDA":
            _check_architecture(record, backends()["CUDA"].get("ARCHS", ""))  # its kernels would end the process
        self.backend = ggml_backend_dev_init(self.device, NULL)
        if self.backend == NULL:
            raise RuntimeError(f"device {record.name!r} could not be opened" + said())
        self.buft = ggml_backend_dev_buffer_type(self.device)
        self.closed = False
        self.start_threads()

    cdef int start_threads(self) except -1:
        cdef ggml_threadpool_params parameters
        if self.kind != "cpu":
            return 0
        self.check_process()
        cdef ggml_threadpool *former = self.pool
        cdef int threads = self.threads if self.runner == NULL else 1
        ggml_threadpool_params_init(&parameters, threads)
        parameters.poll = POLL
        self.pool = bridge_threadpool_new(&parameters)
        bridge_set_n_threads(self.backend, threads)
        bridge_set_threadpool(self.backend, self.pool)
        if former != NULL:
            bridge_threadpool_free(former)
        return 0

    def __dealloc__(self):
        if not self.closed:
            self.release()

    def __enter__(self):
        self.check_idle()
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        """Free everything; a second call does nothing."""
        if self.closed:
            return
        if self.busy:
            raise RuntimeError("the session is busy in another thread; close it when that is done")
        for graph in list(self.graphs):
            graph.close()
        self.release()

    cdef void release(self) noexcept:
        cdef Buffer buffer
        self.closed = True
        for buffer in self.buffers:
            buffer.release()
        self.buffers.clear()
        self.blocks.clear()
        self.pending.clear()
        if self.backend != NULL:
            ggml_backend_free(self.backend)
            self.backend = NULL
        # in a forked child the worker threads do not exist, and waiting for them would never end
        if self.pool != NULL and os.getpid() == self.pid:
            bridge_threadpool_free(self.pool)
        self.pool = NULL

    cpdef check_idle(self):
        """Raise RuntimeError when closed, or busy in another thread."""
        if self.closed:
            raise RuntimeError("the session is closed; open a new one")
        if self.busy:
            raise RuntimeError("the session is busy in another thread; use one session per thread")

    cdef int check_process(self) except -1:
        """A forked child has the session's memory but none of its threads."""
        if os.getpid() != self.pid:
            raise RuntimeError("this session was opened before a fork; open a new one in the child process")
        return 0

    @property
    def n_threads(self):
        return self.threads

    @n_threads.setter
    def n_threads(self, value):
        self.check_idle()
        number = check_threads(value)
        if number != self.threads:
            self.threads = number
            self.start_threads()

    @property
    def persistent_bytes(self):
        """Bytes of the buffers that hold the persistent tensors."""
        return sum(buffer.nbytes for buffer in self.buffers)

    @property
    def metadata_bytes(self):
        cdef Block block
        total = 0
        for block in self.blocks:
            total += block.nbytes
        return total

    cdef ggml_tensor *new_persistent(self, ggml_type kind, tuple shape) except NULL:
        cdef int64_t ne[4]
        cdef Block block
        if not self.blocks or (<Block>self.blocks[-1]).room == 0:
            self.blocks.append(Block(min(512, 64 << len(self.blocks))))
        block = self.blocks[-1]
        to_ne(shape, ne)
        block.room -= 1
        self.n_persistent += 1
        return ggml_new_tensor(block.ctx, kind, 4, ne)

    cdef ggml_tensor *new_of_bytes(
        self, ggml_type kind, tuple shape, const unsigned char[::1] raw, str dtype, name
    ) except NULL:
        """A persistent tensor for these bytes, which are looked at but not put into it."""
        cdef ggml_tensor *t = self.new_persistent(kind, shape)
        set_name(t, name)
        cdef size_t size = ggml_nbytes(t)
        if <size_t>raw.shape[0] != size:
            raise ValueError(f"a {dtype} tensor of shape {shape} takes {size} bytes, not {raw.shape[0]}")
        if not ggml_validate_row_data(kind, &raw[0], size):
            raise ValueError(f"the bytes are no valid {dtype} data" + said())
        return t

    def persistent(self, shape, dtype="f32", name=None):
        """A tensor in memory of its own, zero at first, that graphs read and write and that outlives them."""
        self.check_idle()
        cdef ggml_type kind = <ggml_type>type_number(dtype)
        shape = checked_shape(shape, kind)
        cdef ggml_tensor *t = self.new_persistent(kind, shape)
        set_name(t, name)
        cdef Leaf leaf = make_leaf(t)
        self.pending.append(leaf)
        return make_tensor(t, self, len(shape), leaf)

    def mapped(self, data, shape, dtype, name=None):
        """A read-only persistent tensor over memory that exists already, for example a memory-mapped file.

        data: a C-contiguous bytes-like object of exactly the tensor's size, aligned to 32 bytes; it is kept alive as
        long as the backend. Where the device can not read host memory the data is copied. Raises ValueError.
        """
        self.check_idle()
        cdef ggml_type kind = <ggml_type>type_number(dtype)
        if kind == GGML_TYPE_I32:
            raise ValueError("integers cannot be mapped: their range could not be checked; upload them")
        shape = checked_shape(shape, kind)
        cdef const unsigned char[::1] raw
        if isinstance(data, np.ndarray):
            if not data.flags.c_contiguous:
                raise ValueError("mapped() takes a C-contiguous array")
            raw = data.reshape(-1).view(np.uint8)
        else:
            raw = data
        cdef ggml_tensor *t = self.new_of_bytes(kind, shape, raw, dtype, name)
        cdef size_t size = ggml_nbytes(t)
        if self.kind != "cpu":
            leaf = make_leaf(t)
            self.pending.append(leaf)
            tensor = make_tensor(t, self, len(shape), leaf)
            self.allocate()
            if ggml_is_quantized(kind):
                tensor.upload(data)
            else:
                ggml_backend_tensor_set(t, &raw[0], 0, size)
            return make_tensor(t, self, len(shape))
        if <uintptr_t>&raw[0] % 32:
            raise ValueError("mapped() takes memory aligned to 32 bytes; copy it with np.frombuffer and upload() instead")
        cdef Buffer buffer = Buffer.__new__(Buffer)
        buffer.buffer = ggml_backend_dev_buffer_from_host_ptr(self.device, <void *>&raw[0], size, size)
        if buffer.buffer == NULL:
            raise MemoryError("the device does not take this memory" + said())
        buffer.keep_alive = raw
        buffer.nbytes = 0  # not this process's own memory
        self.buffers.append(buffer)
        ggml_backend_tensor_alloc(buffer.buffer, t, ggml_backend_buffer_get_base(buffer.buffer))
        return make_tensor(t, self, len(shape))

    def repacked(self, data, shape, dtype, name=None):
        """A copy of a weight matrix in an order of its blocks that this device multiplies faster, or None where it has none for
        this type and shape. `mul_mat` alone takes it, as its first argument.

        data: as for `mapped`. The products round as those of the plain matrix do.
        """
        self.check_idle()
        cdef ggml_type kind = <ggml_type>type_number(dtype)
        shape = checked_shape(shape, kind)
        if self.kind != "cpu" or bridge_extra_bufts == NULL or len(shape) != 2 or not ggml_is_quantized(kind):
            return None
        cdef const unsigned char[::1] raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        cdef ggml_tensor *t = self.new_of_bytes(kind, shape, raw, dtype, name)
        cdef size_t size = ggml_nbytes(t)
        cdef ggml_backend_buffer_type **kinds = bridge_extra_bufts(self.device)
        cdef Buffer buffer
        while kinds != NULL and kinds[0] != NULL:
            if self.multiplies_in(kinds[0], t):
                buffer = Buffer.__new__(Buffer)
                buffer.nbytes = ggml_backend_buft_get_alloc_size(kinds[0], t)
                buffer.buffer = ggml_backend_buft_alloc_buffer(kinds[0], buffer.nbytes)
                if buffer.buffer == NULL:
                    raise MemoryError(f"{buffer.nbytes:,} bytes could not be allocated on {self.device_name}" + said())
                ggml_backend_buffer_set_usage(buffer.buffer, 1)
                place(buffer, t, 0)
                ggml_backend_tensor_set(t, &raw[0], 0, size)
                self.buffers.append(buffer)
                tensor = make_tensor(t, self, len(shape))
                (<Tensor>tensor).repacked = True
                return tensor
            kinds += 1
        return None

    cdef bint multiplies_in(self, ggml_backend_buffer_type *buft, ggml_tensor *t) except -1:
        """Whether the device multiplies a weight like t when its memory is of this type."""
        cdef Block block = Block(3)
        cdef int64_t row[4]
        cdef ggml_backend_buffer *empty = ggml_backend_buft_alloc_buffer(buft, 0)
        if empty == NULL:
            return False
        row[0], row[1], row[2], row[3] = t.ne[0], 1, 1, 1
        cdef ggml_tensor *product = ggml_mul_mat(block.ctx, t, ggml_new_tensor(block.ctx, GGML_TYPE_F32, 4, row))
        t.buffer = empty
        cdef bint answer = ggml_backend_dev_supports_op(self.device, product)
        t.buffer = NULL
        ggml_backend_buffer_free(empty)
        return answer

    def allocate(self):
        """Give memory (zeros) to the persistent tensors made since the last call. Raises MemoryError."""
        self.check_idle()
        self.busy = True
        try:
            self.place_pending()
        finally:
            self.busy = False

    cdef int place_pending(self) except -1:
        if not self.pending:
            return 0
        cdef Leaf leaf
        cdef size_t alignment = max(64, ggml_backend_buft_get_alignment(self.buft))
        cdef size_t largest = ggml_backend_buft_get_max_size(self.buft)
        groups = []  # [bytes, [(leaf, offset), ...]]
        for leaf in self.pending:
            size = padded(ggml_backend_buft_get_alloc_size(self.buft, leaf.t), alignment)
            if not groups or groups[-1][0] + size > largest:
                groups.append([0, []])
            groups[-1][1].append((leaf, groups[-1][0]))
            groups[-1][0] += size
        cdef list made = self.new_buffers([group[0] for group in groups], 1)
        cdef Buffer buffer
        self.buffers.extend(made)  # from here on they live as long as the backend
        self.pending.clear()
        for buffer, (_, placed) in zip(made, groups):
            ggml_backend_buffer_clear(buffer.buffer, 0)
            buffer.n_tensors = len(placed)
            for leaf, offset in placed:
                place(buffer, leaf.t, offset)
        return 0

    def forget_pending(self):
        """Let go of the persistent tensors made since the last call of `allocate` that gave memory: they get none any more.
        After a MemoryError, when they are not needed or others, smaller ones, are to be tried."""
        self.check_idle()
        cdef Leaf leaf
        for leaf in self.pending:
            leaf.released = True
        self.pending.clear()

    def release_tensors(self, tensors):
        """Give back the memory of persistent tensors, which are of no more use then; every graph of this backend is closed
        first, because it may read them. A buffer goes when the last tensor in it does: those made between two calls of
        `allocate` share one.

        Raises ValueError for tensors that are not persistent, of this backend, and in memory; nothing is given back then.
        """
        self.check_idle()
        cdef Tensor tensor
        cdef Buffer buffer
        tensors = list(tensors)
        for tensor in tensors:
            if tensor.owner is not self or tensor.leaf is None or tensor.t.buffer == NULL:
                raise ValueError(f"release_tensors: {tensor!r} is no persistent tensor of this backend with memory")
        for graph in list(self.graphs):
            graph.close()
        for tensor in tensors:
            if tensor.leaf.released:
                continue  # named twice
            tensor.leaf.released = True
            for buffer in self.buffers:
                if buffer.buffer == tensor.t.buffer:
                    buffer.n_tensors -= 1
                    if buffer.n_tensors == 0:
                        buffer.release()
                        self.buffers.remove(buffer)
                    break
            tensor.t.buffer = NULL
            tensor.t.data = NULL

    cdef list new_buffers(self, list sizes, int usage):
        """Buffers of these sizes on the device; MemoryError when they do not fit."""
        cdef size_t free_bytes = 0
        cdef size_t total = 0
        ggml_backend_dev_memory(self.device, &free_bytes, &total)
        wanted = sum(sizes)
        limit = _memory_limit(total) if self.kind == "cpu" else total
        if total and wanted > limit:
            raise MemoryError(f"{wanted:,} bytes are needed on {self.device_name}, which has {limit:,}")
        if self.ends_when_full and wanted + _KEPT_FREE > free_bytes:
            raise MemoryError(
                f"{wanted:,} bytes are needed on {self.device_name}, which has {free_bytes:,} free of {total:,} and needs "
                f"{_KEPT_FREE:,} to compute: take a smaller batch or context, or end what else uses the card"
            )
        made = []
        cdef Buffer buffer
        for size in sizes:
            buffer = Buffer.__new__(Buffer)
            buffer.buffer = ggml_backend_buft_alloc_buffer(self.buft, size)
            if buffer.buffer == NULL:
                raise MemoryError(f"{size:,} bytes could not be allocated on {self.device_name}" + said())
            buffer.nbytes = size
            ggml_backend_buffer_set_usage(buffer.buffer, usage)
            made.append(buffer)
        return made

    def graph(self, capacity=DEFAULT_CAPACITY):
        """A new, empty Graph on this device; capacity: the most nodes it may get."""
        return Graph(self, capacity)


cdef size_t padded(size_t size, size_t alignment) noexcept:
    return (size + alignment - 1) // alignment * alignment


cdef int place(Buffer buffer, ggml_tensor *t, size_t offset) except -1:
    cdef int status = ggml_backend_tensor_alloc(
        buffer.buffer, t, <char *>ggml_backend_buffer_get_base(buffer.buffer) + offset
    )
    if status != GGML_STATUS_SUCCESS:
        raise MemoryError(f"a tensor could not be placed: {ggml_status_to_string(status).decode()}" + said())
    return 0


include "planner.pxi"
include "graph.pxi"

# the owners of C memory are no business of Python code
for internal in ("Block", "Buffer", "Parameters", "Leaf", "Storage", "Planner"):
    del globals()[internal]
del internal
