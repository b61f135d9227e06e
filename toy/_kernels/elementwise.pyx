# cython: language_level=3, cdivision=True, auto_pickle=False
"""Residual add, scaling, GELU, GEGLU, SiLU, SwiGLU and a cap: one pass over memory each, forward and backward."""

cimport cython
from libc.math cimport tanhf
from libc.stdint cimport uintptr_t

import numpy as np

from toy._kernels.arrays cimport ANY, Matrix, check_cache, check_filled, get_matrix, get_number, new_matrix
from toy._kernels.threads cimport run, slice_start, slices_for

# the ops of the table (`exp` is none)
__all__ = [
    "add",
    "geglu",
    "geglu_backward",
    "gelu",
    "gelu_backward",
    "scale",
    "silu",
    "silu_backward",
    "softcap",
    "softcap_backward",
    "swiglu",
    "swiglu_backward",
]

cdef extern from "simd_math.h" nogil:
    float toy_exp(float x)
    float toy_gelu(float x)
    float toy_gelu_derivative(float x)
    float toy_silu(float x)
    float toy_silu_derivative(float x)

# rough nanoseconds an element on one core, for the question whether threads pay
cdef double ADD_COST = 0.15
cdef double EXP_COST = 0.5

cdef struct Band:
    Py_ssize_t row, row_end, column, column_end


cdef Band band_of(const Elementwise* a, int ith, int nth) noexcept nogil:
    """The part of the matrix that slice ith works on."""
    if a.rows == 1:
        return Band(0, 1, slice_start(a.columns, 16, ith, nth), slice_start(a.columns, 16, ith + 1, nth))
    return Band(slice_start(a.rows, 1, ith, nth), slice_start(a.rows, 1, ith + 1, nth), 0, a.columns)


cdef void add_forward(void* args, int ith, int nth) noexcept nogil:
    cdef Elementwise* e = <Elementwise*> args
    cdef Band band = band_of(e, ith, nth)
    cdef Py_ssize_t i, j
    cdef const float* a
    cdef const float* b
    cdef float* out
    for i in range(band.row, band.row_end):
        a, b, out = e.a + i * e.a_stride, e.b + i * e.b_stride, e.out + i * e.out_stride
        for j in range(band.column, band.column_end):
            out[j] = a[j] + b[j]


cdef void scale_forward(void* args, int ith, int nth) noexcept nogil:
    cdef Elementwise* e = <Elementwise*> args
    cdef Band band = band_of(e, ith, nth)
    cdef Py_ssize_t i, j
    cdef const float* x
    cdef float* out
    cdef float factor = e.factor
    for i in range(band.row, band.row_end):
        x, out = e.a + i * e.a_stride, e.out + i * e.out_stride
        for j in range(band.column, band.column_end):
            out[j] = factor * x[j]


cdef void gelu_forward(void* args, int ith, int nth) noexcept nogil:
    cdef Elementwise* e = <Elementwise*> args
    cdef Band band = band_of(e, ith, nth)
    cdef Py_ssize_t i, j
    cdef const float* x
    cdef float* out
    for i in range(band.row, band.row_end):
        x, out = e.a + i * e.a_stride, e.out + i * e.out_stride
        for j in range(band.column, band.column_end):
            out[j] = toy_gelu(x[j])


cdef void gelu_backward_(void* args, int ith, int nth) noexcept nogil:
    cdef Elementwise* e = <Elementwise*> args
    cdef Band band = band_of(e, ith, nth)
    cdef Py_ssize_t i, j
    cdef const float* x
    cdef const float* d_y
    cdef float* d_x
    for i in range(band.row, band.row_end):
        x, d_y, d_x = e.a + i * e.a_stride, e.d_y + i * e.d_y_stride, e.out + i * e.out_stride
        for j in range(band.column, band.column_end):
            d_x[j] = d_y[j] * toy_gelu_derivative(x[j])


cdef void geglu_forward(void* args, int ith, int nth) noexcept nogil:
    cdef Elementwise* e = <Elementwise*> args
    cdef Band band = band_of(e, ith, nth)
    cdef Py_ssize_t i, j
    cdef const float* gate
    cdef const float* up
    cdef float* out
    for i in range(band.row, band.row_end):
        gate, up, out = e.a + i * e.a_stride, e.b + i * e.b_stride, e.out + i * e.out_stride
        for j in range(band.column, band.column_end):
            out[j] = toy_gelu(gate[j]) * up[j]


cdef void geglu_backward_(void* args, int ith, int nth) noexcept nogil:
    cdef Elementwise* e = <Elementwise*> args
    cdef Band band = band_of(e, ith, nth)
    cdef Py_ssize_t i, j
    cdef const float* gate
    cdef const float* up
    cdef const float* d_y
    cdef float* d_gate
    cdef float* d_up
    for i in range(band.row, band.row_end):
        gate, up, d_y = e.a + i * e.a_stride, e.b + i * e.b_stride, e.d_y + i * e.d_y_stride
        d_gate, d_up = e.out + i * e.out_stride, e.out2 + i * e.out2_stride
        for j in range(band.column, band.column_end):
            d_gate[j] = d_y[j] * up[j] * toy_gelu_derivative(gate[j])
            d_up[j] = d_y[j] * toy_gelu(gate[j])


cdef void softcap_forward(void* args, int ith, int nth) noexcept nogil:
    cdef Elementwise* e = <Elementwise*> args
    cdef Band band = band_of(e, ith, nth)
    cdef Py_ssize_t i, j
    cdef const float* x
    cdef float* out
    cdef float cap = e.factor
    for i in range(band.row, band.row_end):
        x, out = e.a + i * e.a_stride, e.out + i * e.out_stride
        for j in range(band.column, band.column_end):
            out[j] = cap * tanhf(x[j] / cap)


cdef void softcap_backward_(void* args, int ith, int nth) noexcept nogil:
    cdef Elementwise* e = <Elementwise*> args
    cdef Band band = band_of(e, ith, nth)
    cdef Py_ssize_t i, j
    cdef const float* x
    cdef const float* d_y
    cdef float* d_x
    cdef float cap = e.factor, t, one = 1.0
    for i in range(band.row, band.row_end):
        x, d_y, d_x = e.a + i * e.a_stride, e.d_y + i * e.d_y_stride, e.out + i * e.out_stride
        for j in range(band.column, band.column_end):
            t = tanhf(x[j] / cap)
            d_x[j] = d_y[j] * (one - t * t)


cdef void silu_forward(void* args, int ith, int nth) noexcept nogil:
    cdef Elementwise* e = <Elementwise*> args
    cdef Band band = band_of(e, ith, nth)
    cdef Py_ssize_t i, j
    cdef const float* x
    cdef float* out
    for i in range(band.row, band.row_end):
        x, out = e.a + i * e.a_stride, e.out + i * e.out_stride
        for j in range(band.column, band.column_end):
            out[j] = toy_silu(x[j])


cdef void silu_backward_(void* args, int ith, int nth) noexcept nogil:
    cdef Elementwise* e = <Elementwise*> args
    cdef Band band = band_of(e, ith, nth)
    cdef Py_ssize_t i, j
    cdef const float* x
    cdef const float* d_y
    cdef float* d_x
    for i in range(band.row, band.row_end):
        x, d_y, d_x = e.a + i * e.a_stride, e.d_y + i * e.d_y_stride, e.out + i * e.out_stride
        for j in range(band.column, band.column_end):
            d_x[j] = d_y[j] * toy_silu_derivative(x[j])


cdef void swiglu_forward(void* args, int ith, int nth) noexcept nogil:
    cdef Elementwise* e = <Elementwise*> args
    cdef Band band = band_of(e, ith, nth)
    cdef Py_ssize_t i, j
    cdef const float* gate
    cdef const float* up
    cdef float* out
    for i in range(band.row, band.row_end):
        gate, up, out = e.a + i * e.a_stride, e.b + i * e.b_stride, e.out + i * e.out_stride
        for j in range(band.column, band.column_end):
            out[j] = toy_silu(gate[j]) * up[j]


cdef void swiglu_backward_(void* args, int ith, int nth) noexcept nogil:
    cdef Elementwise* e = <Elementwise*> args
    cdef Band band = band_of(e, ith, nth)
    cdef Py_ssize_t i, j
    cdef const float* gate
    cdef const float* up
    cdef const float* d_y
    cdef float* d_gate
    cdef float* d_up
    for i in range(band.row, band.row_end):
        gate, up, d_y = e.a + i * e.a_stride, e.b + i * e.b_stride, e.d_y + i * e.d_y_stride
        d_gate, d_up = e.out + i * e.out_stride, e.out2 + i * e.out2_stride
        for j in range(band.column, band.column_end):
            d_gate[j] = d_y[j] * up[j] * toy_silu_derivative(gate[j])
            d_up[j] = d_y[j] * toy_silu(gate[j])


cdef void exp_forward(void* args, int ith, int nth) noexcept nogil:
    cdef Elementwise* e = <Elementwise*> args
    cdef Band band = band_of(e, ith, nth)
    cdef Py_ssize_t i, j
    for i in range(band.row, band.row_end):
        for j in range(band.column, band.column_end):
            e.out[i * e.out_stride + j] = toy_exp(e.a[i * e.a_stride + j])


# by name: what a graph of ggml may use as a node
cdef dict KERNELS = {
    "add": <uintptr_t> <void*> add_forward,
    "geglu": <uintptr_t> <void*> geglu_forward,
    "geglu_backward": <uintptr_t> <void*> geglu_backward_,
    "gelu": <uintptr_t> <void*> gelu_forward,
    "gelu_backward": <uintptr_t> <void*> gelu_backward_,
    "silu": <uintptr_t> <void*> silu_forward,
    "silu_backward": <uintptr_t> <void*> silu_backward_,
    "softcap": <uintptr_t> <void*> softcap_forward,
    "softcap_backward": <uintptr_t> <void*> softcap_backward_,
    "swiglu": <uintptr_t> <void*> swiglu_forward,
    "swiglu_backward": <uintptr_t> <void*> swiglu_backward_,
}


cdef Kernel elementwise_kernel(object name) except NULL:
    if name not in KERNELS:
        raise ValueError(f"there is no elementwise kernel {name!r}; there are {', '.join(KERNELS)}")
    return <Kernel> <void*> <uintptr_t> KERNELS[name]


@cython.final
@cython.freelist(64)
cdef class ElementwiseCache:
    """The inputs of gelu, swiglu, ...; the backward reads these arrays themselves, not copies."""

    cdef object a, b
    cdef float factor
    cdef Matrix a_matrix, b_matrix
    cdef Kernel backward


cdef void launch(Kernel kernel, Elementwise* args, Matrix* first, double cost):
    """Run a kernel on a matrix; one without gaps between its rows is treated as one long row, cut anywhere."""
    args.rows, args.columns = first.rows, first.columns
    cdef Py_ssize_t width = max(1, args.columns)
    if (
        args.a_stride == width
        and args.out_stride == width
        and (args.b == NULL or args.b_stride == width)
        and (args.d_y == NULL or args.d_y_stride == width)
    ):
        args.rows, args.columns = 1, args.rows * args.columns
    with nogil:
        run(kernel, args, slices_for(cost * first.rows * first.columns, True))


cdef inline Elementwise no_arguments() noexcept:
    return Elementwise(0, 0, NULL, 0, NULL, 0, NULL, 0, NULL, 0, NULL, 0, 0)


cdef object forward(
    Kernel kernel, Kernel backward, object a, object name_a, object b, object name_b, double cost, object form,
    float factor=0,
):
    cdef ElementwiseCache cache = ElementwiseCache.__new__(ElementwiseCache)
    cdef Elementwise args = no_arguments()
    cdef Matrix out_matrix
    args.factor = factor
    get_matrix(&cache.a_matrix, a, name_a, ANY, ANY, form)
    args.a, args.a_stride = cache.a_matrix.data, cache.a_matrix.stride
    if b is not None:
        get_matrix(&cache.b_matrix, b, name_b, cache.a_matrix.rows, cache.a_matrix.columns, form)
        args.b, args.b_stride = cache.b_matrix.data, cache.b_matrix.stride
    cache.a, cache.b, cache.backward, cache.factor = a, b, backward, factor
    out = new_matrix(&out_matrix, cache.a_matrix.rows, cache.a_matrix.columns)
    args.out, args.out_stride = out_matrix.data, out_matrix.stride
    launch(kernel, &args, &cache.a_matrix, cost)
    return out, cache


cdef object backward(Kernel kernel, object d_y, object cache, object op, object form):
    check_cache(cache, ElementwiseCache, op)
    cdef ElementwiseCache saved = <ElementwiseCache> cache
    check_filled(saved.a, op)
    if saved.backward != kernel:
        raise ValueError(f"cache: expected the cache that {op} returned, given that of another elementwise op")
    cdef Elementwise args = no_arguments()
    cdef Matrix d_y_matrix, d_a_matrix, d_b_matrix
    cdef Py_ssize_t rows = saved.a_matrix.rows, columns = saved.a_matrix.columns
    get_matrix(&d_y_matrix, d_y, "d_y", rows, columns, form)
    # once more: an array can be given another shape or other memory between the two
    get_matrix(&saved.a_matrix, saved.a, "the cache's first array", rows, columns, form)
    if saved.b is not None:
        get_matrix(&saved.b_matrix, saved.b, "the cache's second array", rows, columns, form)
    args.d_y, args.d_y_stride, args.factor = d_y_matrix.data, d_y_matrix.stride, saved.factor
    args.a, args.a_stride = saved.a_matrix.data, saved.a_matrix.stride
    d_a = new_matrix(&d_a_matrix, rows, columns)
    args.out, args.out_stride = d_a_matrix.data, d_a_matrix.stride
    d_b = None
    if saved.b is not None:
        args.b, args.b_stride = saved.b_matrix.data, saved.b_matrix.stride
        d_b = new_matrix(&d_b_matrix, rows, columns)
        args.out2, args.out2_stride = d_b_matrix.data, d_b_matrix.stride
    launch(kernel, &args, &saved.a_matrix, EXP_COST)
    return d_a if d_b is None else (d_a, d_b)


def add(a, b):
    """a + b, both (N, D). Its backward needs no op: the gradient goes unchanged to both summands."""
    if b is None:
        raise ValueError("b: is None, expected a float32 array. add: a and b (N, D)")
    return forward(add_forward, NULL, a, "a", b, "b", ADD_COST, "add: a and b (N, D)")[0]


def scale(x, factor):
    """factor * x for a plain number, x (N, D) in any strides. Its backward is the same op on the gradient."""
    cdef float number = <float> get_number(factor, "factor", "scale: x (N, D), factor a number")
    if type(x) is np.ndarray and x.strides[-1:] != (x.itemsize,):
        x = np.ascontiguousarray(x)
    return forward(scale_forward, NULL, x, "x", None, None, ADD_COST, "scale: x (N, D)", number)[0]


def gelu(x):
    """GELU, tanh form. x: (N, F) -> (N, F)."""
    return forward(gelu_forward, gelu_backward_, x, "x", None, None, EXP_COST, "gelu: x (N, F)")


def gelu_backward(d_y, cache):
    """d_y: (N, F) -> d_x (N, F)."""
    return backward(gelu_backward_, d_y, cache, "gelu", "gelu_backward: d_y (N, F), as x in the forward")


def geglu(gate, up):
    """gelu(gate) * up. gate, up: (N, F) -> (N, F)."""
    if up is None:
        raise ValueError("up: is None, expected a float32 array. geglu: gate and up (N, F)")
    return forward(geglu_forward, geglu_backward_, gate, "gate", up, "up", EXP_COST, "geglu: gate and up (N, F)")


def geglu_backward(d_y, cache):
    """d_y: (N, F) -> d_gate, d_up, both (N, F)."""
    return backward(geglu_backward_, d_y, cache, "geglu", "geglu_backward: d_y (N, F), as gate in the forward")


def softcap(x, cap=30.0):
    """cap * tanh(x / cap) for a number above 0. x: (N, F) -> (N, F)."""
    cdef float number = <float> get_number(cap, "cap", "softcap: x (N, F), cap a number above 0")
    if not number > 0:
        raise ValueError(f"cap: is {cap}, expected a number above 0. softcap: x (N, F), cap a number above 0")
    return forward(softcap_forward, softcap_backward_, x, "x", None, None, EXP_COST, "softcap: x (N, F)", number)


def softcap_backward(d_y, cache):
    """d_y: (N, F) -> d_x (N, F)."""
    return backward(softcap_backward_, d_y, cache, "softcap", "softcap_backward: d_y (N, F), as x in the forward")


def silu(x):
    """x sigmoid(x). x: (N, F) -> (N, F)."""
    return forward(silu_forward, silu_backward_, x, "x", None, None, EXP_COST, "silu: x (N, F)")


def silu_backward(d_y, cache):
    """d_y: (N, F) -> d_x (N, F)."""
    return backward(silu_backward_, d_y, cache, "silu", "silu_backward: d_y (N, F), as x in the forward")


def swiglu(gate, up):
    """silu(gate) * up. gate, up: (N, F) -> (N, F)."""
    if up is None:
        raise ValueError("up: is None, expected a float32 array. swiglu: gate and up (N, F)")
    return forward(swiglu_forward, swiglu_backward_, gate, "gate", up, "up", EXP_COST, "swiglu: gate and up (N, F)")


def swiglu_backward(d_y, cache):
    """d_y: (N, F) -> d_gate, d_up, both (N, F)."""
    return backward(swiglu_backward_, d_y, cache, "swiglu", "swiglu_backward: d_y (N, F), as gate in the forward")


def exp(x):
    """e^x, x: (N, F) -> (N, F). No op of the table: it lets a test check the exponential that the ops are made of."""
    return forward(exp_forward, NULL, x, "x", None, None, EXP_COST, "exp: x (N, F)")[0]
