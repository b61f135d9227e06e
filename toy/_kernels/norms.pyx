# cython: language_level=3, cdivision=True, auto_pickle=False
"""RMSNorm and LayerNorm, forward and backward: every row is read from memory once and stays in the nearest cache.

The gradients of gamma and beta are sums over all rows. Each slice sums its own rows into a row of its own; the rows are
then added in the order of the slices, so the sum does not depend on which thread was faster.
"""

cimport cython
from libc.math cimport sqrtf
from libc.string cimport memset

from toy._kernels.arrays cimport (
    ANY, Matrix, Span, check_apart, check_cache, check_filled, get_matrix, get_number, get_vector, get_vector_gradient,
    matrix_span, new_matrix, vector_span,
)
from toy._kernels.memory cimport empty_vector
from toy._kernels.threads cimport run, slice_start, slices_for

cimport numpy as cnp

cnp.import_array()

__all__ = ["layer_norm", "layer_norm_backward", "rms_norm", "rms_norm_backward"]

cdef extern from "simd_math.h" nogil:
    float toy_row_sum(const float* x, Py_ssize_t n)
    float toy_row_dot(const float* x, const float* y, Py_ssize_t n)
    float toy_row_squared_deviation(const float* x, float mean, Py_ssize_t n)
    float toy_row_scale_and_sums(
        const float* x, const float* gamma, const float* z, float mean, float* out, float* sum, Py_ssize_t n
    )

cdef double FORWARD_COST = 0.25     # rough nanoseconds an element on one core
cdef double BACKWARD_COST = 0.5


cdef void rms_norm_forward(void* args, int ith, int nth) noexcept nogil:
    cdef Norm* a = <Norm*> args
    cdef Py_ssize_t n = a.columns, i, j
    cdef const float* x
    cdef const float* gamma = a.gamma
    cdef float* y
    cdef float rstd
    for i in range(slice_start(a.rows, 1, ith, nth), slice_start(a.rows, 1, ith + 1, nth)):
        x, y = a.x + i * a.x_stride, a.y + i * a.y_stride
        rstd = 1.0 / sqrtf(toy_row_dot(x, x, n) / n + a.eps)
        for j in range(n):
            y[j] = x[j] * rstd * gamma[j]
        a.rstd[i] = rstd


cdef void layer_norm_forward(void* args, int ith, int nth) noexcept nogil:
    cdef Norm* a = <Norm*> args
    cdef Py_ssize_t n = a.columns, i, j
    cdef const float* x
    cdef const float* gamma = a.gamma
    cdef const float* beta = a.beta
    cdef float* y
    cdef float mean, rstd
    for i in range(slice_start(a.rows, 1, ith, nth), slice_start(a.rows, 1, ith + 1, nth)):
        x, y = a.x + i * a.x_stride, a.y + i * a.y_stride
        mean = toy_row_sum(x, n) / n
        rstd = 1.0 / sqrtf(toy_row_squared_deviation(x, mean, n) / n + a.eps)
        for j in range(n):
            y[j] = (x[j] - mean) * rstd * gamma[j] + beta[j]
        a.mean[i], a.rstd[i] = mean, rstd


cdef void rms_norm_backward_(void* args, int ith, int nth) noexcept nogil:
    cdef NormBackward* a = <NormBackward*> args
    cdef Py_ssize_t n = a.columns, i, j
    cdef const float* x
    cdef const float* d_y
    cdef const float* gamma = a.gamma
    cdef float* d_x
    cdef float* d_gamma = NULL
    cdef float rstd, total, projection
    if a.partial_gamma != NULL:
        d_gamma = a.partial_gamma + ith * n
        memset(d_gamma, 0, n * sizeof(float))
    for i in range(slice_start(a.rows, 1, ith, nth), slice_start(a.rows, 1, ith + 1, nth)):
        x, d_y, d_x = a.x + i * a.x_stride, a.d_y + i * a.d_y_stride, a.d_x + i * a.d_x_stride
        rstd = a.rstd[i]
        # d_x = rstd (d_y gamma - x_hat mean(d_y gamma x_hat)), x_hat = x rstd
        projection = rstd * rstd * (toy_row_scale_and_sums(d_y, gamma, x, 0, d_x, &total, n) / n)
        for j in range(n):
            d_x[j] = rstd * (d_x[j] - x[j] * projection)
        if d_gamma != NULL:
            for j in range(n):
                d_gamma[j] += d_y[j] * (x[j] * rstd)


cdef void layer_norm_backward_(void* args, int ith, int nth) noexcept nogil:
    cdef NormBackward* a = <NormBackward*> args
    cdef Py_ssize_t n = a.columns, i, j
    cdef const float* x
    cdef const float* d_y
    cdef const float* gamma = a.gamma
    cdef float* d_x
    cdef float* d_gamma = NULL
    cdef float* d_beta = NULL
    cdef float mean, rstd, total, average, projection
    if a.partial_gamma != NULL:
        d_gamma = a.partial_gamma + ith * n
        memset(d_gamma, 0, n * sizeof(float))
    if a.partial_beta != NULL:
        d_beta = a.partial_beta + ith * n
        memset(d_beta, 0, n * sizeof(float))
    for i in range(slice_start(a.rows, 1, ith, nth), slice_start(a.rows, 1, ith + 1, nth)):
        x, d_y, d_x = a.x + i * a.x_stride, a.d_y + i * a.d_y_stride, a.d_x + i * a.d_x_stride
        mean, rstd = a.mean[i], a.rstd[i]
        # d_x = rstd (d_y gamma - mean(d_y gamma) - x_hat mean(d_y gamma x_hat)), x_hat = (x - mean) rstd
        projection = rstd * rstd * (toy_row_scale_and_sums(d_y, gamma, x, mean, d_x, &total, n) / n)
        average = total / n
        for j in range(n):
            d_x[j] = rstd * (d_x[j] - average - (x[j] - mean) * projection)
        if d_gamma != NULL:
            for j in range(n):
                d_gamma[j] += d_y[j] * ((x[j] - mean) * rstd)
        if d_beta != NULL:
            for j in range(n):
                d_beta[j] += d_y[j]


cdef void add_partials(const float* partials, int nth, Py_ssize_t columns, float* total) noexcept nogil:
    cdef Py_ssize_t i, j
    for i in range(nth):
        for j in range(columns):
            total[j] += partials[i * columns + j]


@cython.final
@cython.freelist(64)
cdef class NormCache:
    """x (N, D), gamma (D,), and what the forward found out about each row: rstd (N,), for LayerNorm also mean (N,)."""

    cdef object x, gamma, mean, rstd
    cdef Matrix x_matrix


cdef object forward(object x, object gamma, object beta, object eps, bint is_layer_norm, object form):
    cdef NormCache cache = NormCache.__new__(NormCache)
    cdef Norm args
    cdef Matrix y_matrix
    get_matrix(&cache.x_matrix, x, "x", ANY, ANY, form)
    args.rows, args.columns = cache.x_matrix.rows, cache.x_matrix.columns
    args.eps = <float> get_number(eps, "eps", form)
    args.gamma = get_vector(gamma, "gamma", args.columns, form)
    args.beta = get_vector(beta, "beta", args.columns, form) if is_layer_norm else NULL
    cache.x, cache.gamma = x, gamma
    cache.rstd = empty_vector(args.rows)
    args.rstd = <float*> cnp.PyArray_DATA(cache.rstd)
    args.mean = NULL
    if is_layer_norm:
        cache.mean = empty_vector(args.rows)
        args.mean = <float*> cnp.PyArray_DATA(cache.mean)
    y = new_matrix(&y_matrix, args.rows, args.columns)
    args.x, args.x_stride = cache.x_matrix.data, cache.x_matrix.stride
    args.y, args.y_stride = y_matrix.data, y_matrix.stride
    cdef int slices = slices_for(FORWARD_COST * args.rows * args.columns, True)
    with nogil:
        run(layer_norm_forward if is_layer_norm else rms_norm_forward, &args, slices)
    return y, cache


cdef object backward(object d_y, NormCache cache, object d_gamma, object d_beta, bint is_layer_norm, object form):
    cdef NormBackward args
    cdef Matrix d_y_matrix, d_x_matrix, partials_matrix
    cdef float* gamma_total = NULL
    cdef float* beta_total = NULL
    check_filled(cache.rstd, "layer_norm" if is_layer_norm else "rms_norm")
    args.rows, args.columns = cache.x_matrix.rows, cache.x_matrix.columns
    get_matrix(&d_y_matrix, d_y, "d_y", args.rows, args.columns, form)
    # once more: an array can be given another shape or other memory between the two
    get_matrix(&cache.x_matrix, cache.x, "the cache's x", args.rows, args.columns, form)
    args.gamma = get_vector(cache.gamma, "the cache's gamma", args.columns, form)
    args.rstd = <float*> cnp.PyArray_DATA(cache.rstd)
    args.mean = <float*> cnp.PyArray_DATA(cache.mean) if is_layer_norm else NULL
    cdef int slices = slices_for(BACKWARD_COST * args.rows * args.columns, True)
    args.partial_gamma = args.partial_beta = NULL
    if d_gamma is not None or d_beta is not None:
        partials = new_matrix(&partials_matrix, 2 * slices, args.columns)
    if d_gamma is not None:
        gamma_total = get_vector_gradient(d_gamma, "d_gamma", args.columns, form)
        args.partial_gamma = partials_matrix.data
    if d_beta is not None:
        beta_total = get_vector_gradient(d_beta, "d_beta", args.columns, form)
        args.partial_beta = partials_matrix.data + slices * args.columns
    cdef Py_ssize_t width = args.columns * sizeof(float)
    cdef Span to_gamma = vector_span(gamma_total, width if d_gamma is not None else 0)
    cdef Span to_beta = vector_span(beta_total, width if d_beta is not None else 0)
    cdef Span of_d_y = matrix_span(&d_y_matrix), of_x = matrix_span(&cache.x_matrix)
    cdef Span of_gamma = vector_span(args.gamma, width)
    check_apart(to_gamma, d_gamma, "d_gamma", to_beta, d_beta, "d_beta", form)
    check_apart(to_gamma, d_gamma, "d_gamma", of_d_y, d_y, "d_y", form)
    check_apart(to_gamma, d_gamma, "d_gamma", of_x, cache.x, "the cache's x", form)
    check_apart(to_gamma, d_gamma, "d_gamma", of_gamma, cache.gamma, "the cache's gamma", form)
    check_apart(to_beta, d_beta, "d_beta", of_d_y, d_y, "d_y", form)
    check_apart(to_beta, d_beta, "d_beta", of_x, cache.x, "the cache's x", form)
    check_apart(to_beta, d_beta, "d_beta", of_gamma, cache.gamma, "the cache's gamma", form)
    d_x = new_matrix(&d_x_matrix, args.rows, args.columns)
    args.d_y, args.d_y_stride = d_y_matrix.data, d_y_matrix.stride
    args.x, args.x_stride = cache.x_matrix.data, cache.x_matrix.stride
    args.d_x, args.d_x_stride = d_x_matrix.data, d_x_matrix.stride
    with nogil:
        run(layer_norm_backward_ if is_layer_norm else rms_norm_backward_, &args, slices)
        if gamma_total != NULL:
            add_partials(args.partial_gamma, slices, args.columns, gamma_total)
        if beta_total != NULL:
            add_partials(args.partial_beta, slices, args.columns, beta_total)
    return d_x


def rms_norm(x, gamma, eps=1e-5):
    """x / sqrt(mean(x^2) + eps) * gamma, row by row. x: (N, D), gamma: (D,) -> (N, D)."""
    return forward(x, gamma, None, eps, False, "rms_norm: x (N, D), gamma (D,)")


def rms_norm_backward(d_y, cache, d_gamma):
    """d_y: (N, D) -> d_x (N, D). Adds into d_gamma (D,); None = frozen."""
    check_cache(cache, NormCache, "rms_norm")
    if (<NormCache> cache).mean is not None:
        raise ValueError("cache: expected the cache that rms_norm returned, given that of layer_norm")
    form = "rms_norm_backward: d_y (N, D), d_gamma (D,) or None"
    return backward(d_y, cache, d_gamma, None, False, form)


def layer_norm(x, gamma, beta, eps=1e-5):
    """(x - mean(x)) / sqrt(var(x) + eps) * gamma + beta, row by row. x: (N, D), gamma and beta: (D,) -> (N, D)."""
    return forward(x, gamma, beta, eps, True, "layer_norm: x (N, D), gamma (D,), beta (D,)")


def layer_norm_backward(d_y, cache, d_gamma, d_beta):
    """d_y: (N, D) -> d_x (N, D). Adds into d_gamma and d_beta (D,); None = frozen."""
    check_cache(cache, NormCache, "layer_norm")
    check_filled((<NormCache> cache).rstd, "layer_norm")
    if (<NormCache> cache).mean is None:
        raise ValueError("cache: expected the cache that layer_norm returned, given that of rms_norm")
    form = "layer_norm_backward: d_y (N, D), d_gamma and d_beta (D,) or None"
    return backward(d_y, cache, d_gamma, d_beta, True, form)
