# cython: language_level=3, cdivision=True, auto_pickle=False
"""y = x W^T + b and its backward: three matrix products, cut into slices.

A slice is a band of rows or of columns of the result. Each call repacks the operand that is not cut, so the cut
one should not be much the smaller; and rows are preferred, because then a thread works on the same tokens in every
op.

A slice has BAND rows (or columns) at least, or there is one slice that is not empty: so all of a product is done in one
way, whose bits do not depend on the slices where that way is the project's own (blas.pyx).
"""

cimport cython
from libc.string cimport memcpy, memset

from toy._kernels cimport blas, products
from toy._kernels.arrays cimport (
    ANY, Matrix, Span, check_apart, check_cache, check_filled, get_matrix, get_vector, get_vector_gradient, get_weight,
    get_weight_gradient, matrix_span, new_matrix, no_span, vector_span,
)
from toy._kernels.threads cimport run

cdef enum:
    BAND = 16    # bands start at multiples of this, the width of an AVX-512 register


cdef inline Py_ssize_t band_start(Py_ssize_t n, int ith, int nth) noexcept nogil:
    """Where slice ith of 0 .. n-1 starts; it ends where slice ith+1 starts. What is left of whole bands is the last one's."""
    return n if ith == nth else max(n // BAND, 1) * ith // nth * BAND


cdef void linear_forward(void* args, int ith, int nth) noexcept nogil:
    cdef Linear* a = <Linear*> args
    cdef Py_ssize_t row = 0, row_end = a.n, column = 0, column_end = a.n_out, i
    if 2 * a.n >= a.n_out:
        row, row_end = band_start(a.n, ith, nth), band_start(a.n, ith + 1, nth)
    else:
        column, column_end = band_start(a.n_out, ith, nth), band_start(a.n_out, ith + 1, nth)
    if row >= row_end or column >= column_end:
        return
    # sgemm would first fill y with zeros, then add the product; filling it with the bias instead costs nothing more
    if a.bias != NULL:
        for i in range(row, row_end):
            memcpy(a.y + i * a.y_stride + column, a.bias + column, (column_end - column) * sizeof(float))
    products.multiply_nt(
        a.precision, row_end - row, column_end - column, a.n_in,
        a.x + row * a.x_stride, a.x_stride,
        a.weight + column * a.n_in, a.n_in,
        0.0 if a.bias == NULL else 1.0, a.y + row * a.y_stride + column, a.y_stride,
    )


cdef void linear_backward_input(void* args, int ith, int nth) noexcept nogil:
    cdef LinearBackward* a = <LinearBackward*> args
    cdef Py_ssize_t row = 0, row_end = a.n, column = 0, column_end = a.n_in
    if 2 * a.n >= a.n_in:
        row, row_end = band_start(a.n, ith, nth), band_start(a.n, ith + 1, nth)
    else:
        column, column_end = band_start(a.n_in, ith, nth), band_start(a.n_in, ith + 1, nth)
    products.multiply_nn(
        a.precision, row_end - row, column_end - column, a.n_out,
        a.d_y + row * a.d_y_stride, a.d_y_stride,
        a.weight + column, a.n_in,
        0.0, a.d_x + row * a.d_x_stride + column, a.d_x_stride,
    )


cdef void linear_backward_weight(void* args, int ith, int nth) noexcept nogil:
    cdef LinearBackward* a = <LinearBackward*> args
    cdef Py_ssize_t row = 0, row_end = a.n_out, column = 0, column_end = a.n_in
    if a.n_out >= a.n_in:
        row, row_end = band_start(a.n_out, ith, nth), band_start(a.n_out, ith + 1, nth)
    else:
        column, column_end = band_start(a.n_in, ith, nth), band_start(a.n_in, ith + 1, nth)
    if a.d_weight != NULL:
        products.multiply_tn(
            a.precision, row_end - row, column_end - column, a.n,
            a.d_y + row, a.d_y_stride,
            a.x + column, a.x_stride,
            a.beta, a.d_weight + row * a.n_in + column, a.n_in,
        )
    if a.d_bias != NULL and (a.n_out >= a.n_in or ith == 0):
        if a.beta == 0:
            memset(a.d_bias + row, 0, (row_end - row) * sizeof(float))
        add_column_sums(a.d_y + row, a.d_y_stride, a.n, row_end - row, a.d_bias + row)


cdef void add_column_sums(
    const float* x, Py_ssize_t stride, Py_ssize_t rows, Py_ssize_t columns, float* sums
) noexcept nogil:
    cdef Py_ssize_t i, j
    for i in range(rows):
        for j in range(columns):
            sums[j] += x[i * stride + j]


cdef void linear_backward_all(void* args, int ith, int nth) noexcept nogil:
    """Both halves of the backward as one job: the first half of the slices is d_x, the second d_weight and d_bias."""
    if ith < nth // 2:
        linear_backward_input(args, ith, nth // 2)
    else:
        linear_backward_weight(args, ith - nth // 2, nth // 2)


FORM = "linear: x (N, in), weight (out, in), bias (out,) or None"
FORM_BACKWARD = "linear_backward: d_y (N, out), d_weight (out, in) or None, d_bias (out,) or None, as in the forward"


@cython.final
@cython.freelist(64)
cdef class LinearCache:
    """x (N, in) and weight (out, in); the backward reads both arrays themselves, not copies."""

    cdef object x, weight
    cdef Matrix x_matrix, weight_matrix
    cdef int precision


def linear(x, weight, bias=None, precision=0):
    """x: (N, in), weight: (out, in), bias: (out,) or None -> (N, out). precision: of `products`, of the backward too."""
    cdef LinearCache cache = LinearCache.__new__(LinearCache)
    cdef Linear args
    get_matrix(&cache.x_matrix, x, "x", ANY, ANY, FORM)
    get_weight(&cache.weight_matrix, weight, "weight", ANY, cache.x_matrix.columns, FORM)
    cache.x, cache.weight, cache.precision = x, weight, products.checked(precision)
    args.precision = cache.precision
    args.n, args.n_in, args.n_out = cache.x_matrix.rows, cache.x_matrix.columns, cache.weight_matrix.rows
    args.bias = NULL if bias is None else get_vector(bias, "bias", args.n_out, FORM)
    args.x, args.x_stride = cache.x_matrix.data, cache.x_matrix.stride
    args.weight = cache.weight_matrix.data
    cdef Matrix y_matrix
    y = new_matrix(&y_matrix, args.n, args.n_out)
    args.y, args.y_stride = y_matrix.data, y_matrix.stride
    cdef int slices = products.product_slices(args.precision, 2.0 * args.n * args.n_in * args.n_out)
    blas.enter()
    with nogil:
        run(linear_forward, &args, slices)
    blas.leave()
    return y, cache


def linear_backward(d_y, cache, d_weight, d_bias=None):
    """d_y: (N, out) -> d_x (N, in). Adds into d_weight (out, in) and d_bias (out,); None = frozen."""
    check_cache(cache, LinearCache, "linear")
    cdef LinearCache saved = <LinearCache> cache
    cdef LinearBackward args
    cdef Matrix d_y_matrix, d_weight_matrix, d_x_matrix
    check_filled(saved.weight, "linear")
    # once more: an array can be given another shape or other memory between the two
    get_matrix(&saved.x_matrix, saved.x, "the cache's x", saved.x_matrix.rows, saved.x_matrix.columns, FORM)
    get_weight(
        &saved.weight_matrix, saved.weight, "the cache's weight", saved.weight_matrix.rows, saved.x_matrix.columns, FORM
    )
    args.n, args.n_in, args.n_out = saved.x_matrix.rows, saved.x_matrix.columns, saved.weight_matrix.rows
    get_matrix(&d_y_matrix, d_y, "d_y", args.n, args.n_out, FORM_BACKWARD)
    args.d_weight = args.d_bias = NULL
    args.beta, args.precision = 1.0, saved.precision
    if d_weight is not None:
        get_weight_gradient(&d_weight_matrix, d_weight, "d_weight", args.n_out, args.n_in, FORM_BACKWARD)
        args.d_weight = d_weight_matrix.data
    if d_bias is not None:
        args.d_bias = get_vector_gradient(d_bias, "d_bias", args.n_out, FORM_BACKWARD)
    cdef Span to_weight = no_span() if d_weight is None else matrix_span(&d_weight_matrix)
    cdef Span to_bias = vector_span(args.d_bias, args.n_out * sizeof(float) if d_bias is not None else 0)
    cdef Span of_d_y = matrix_span(&d_y_matrix), of_x = matrix_span(&saved.x_matrix)
    cdef Span of_weight = matrix_span(&saved.weight_matrix)
    check_apart(to_weight, d_weight, "d_weight", to_bias, d_bias, "d_bias", FORM_BACKWARD)
    check_apart(to_weight, d_weight, "d_weight", of_d_y, d_y, "d_y", FORM_BACKWARD)
    check_apart(to_weight, d_weight, "d_weight", of_x, saved.x, "the cache's x", FORM_BACKWARD)
    check_apart(to_weight, d_weight, "d_weight", of_weight, saved.weight, "the cache's weight", FORM_BACKWARD)
    check_apart(to_bias, d_bias, "d_bias", of_d_y, d_y, "d_y", FORM_BACKWARD)
    check_apart(to_bias, d_bias, "d_bias", of_x, saved.x, "the cache's x", FORM_BACKWARD)
    check_apart(to_bias, d_bias, "d_bias", of_weight, saved.weight, "the cache's weight", FORM_BACKWARD)
    d_x = new_matrix(&d_x_matrix, args.n, args.n_in)
    args.d_y, args.d_y_stride = d_y_matrix.data, d_y_matrix.stride
    args.x, args.x_stride = saved.x_matrix.data, saved.x_matrix.stride
    args.weight = saved.weight_matrix.data
    args.d_x, args.d_x_stride = d_x_matrix.data, d_x_matrix.stride
    cdef int slices = products.product_slices(args.precision, 2.0 * args.n * args.n_in * args.n_out)
    blas.enter()
    with nogil:
        if args.d_weight == NULL and args.d_bias == NULL:
            run(linear_backward_input, &args, slices)
        else:
            run(linear_backward_all, &args, 2 * slices)
    blas.leave()
    return d_x
