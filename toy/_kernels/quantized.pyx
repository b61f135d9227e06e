# cython: language_level=3, cdivision=True
"""y = x W^T + b, its backward and the embedding lookup for a frozen W in the block types of GGUF files (dequantize.h).

W is never dequantised as a whole: a thread dequantises a piece that stays in its own cache and multiplies it at once. For
many rows of x the piece is a band of W and the product an sgemm; for a few rows (generating token by token) it is a handful
of rows of W, read once, and dot products. The numbers are those of the same product with a float32 W, but for the order of
the sums.
"""

from libc.limits cimport INT_MAX
from libc.string cimport memcpy

import numpy as np

cimport numpy as cnp

from toy._kernels cimport blas, products
from toy._kernels.arrays cimport (
    ANY, Matrix, Span, check_apart, get_integers, get_matrix, get_vector, get_vector_gradient, integers_data, matrix_span,
    new_matrix, vector_span,
)
from toy._kernels.memory cimport empty_vector
from toy._kernels.threads cimport run, slice_start, slices_for

cnp.import_array()

cdef extern from "dequantize.h" nogil:
    const toy_block_type toy_block_types[]
    const int TOY_N_BLOCK_TYPES
    void toy_four_dots(const float* w, Py_ssize_t ldw, const float* x, Py_ssize_t n, float* sums)
    float toy_row_dot(const float* x, const float* y, Py_ssize_t n)
    void toy_sums_of_32(const float* x, float* sums, Py_ssize_t n)

cdef enum:
    MULTIPLE = 16             # slices of rows start at multiples of this
    FEW_ROWS = 2              # of x, up to which dot products are faster than sgemm
    ROWS_AT_ONCE = 4          # of W, for dot products
    COLUMNS_AT_ONCE = 1024    # of W, for dot products: with ROWS_AT_ONCE half of the smallest first-level cache
    BAND_FLOATS = 131072      # of W, for sgemm: half a megabyte of the second-level cache
    SMALL_BAND_FLOATS = 32768 # for n <= SMALL rows: OpenBLAS then multiplies without copying its operands (a third faster)
    SMALL = 24
    BAND_COLUMNS = 2048       # of W, at most, for sgemm: a band has at least 16 rows

cdef double READ_COST = 0.1             # rough nanoseconds to dequantise a number on one core
cdef double FLOPS_PER_NANOSECOND = 50.0


cdef const toy_block_type* block_type(int number) noexcept nogil:
    cdef int i
    for i in range(TOY_N_BLOCK_TYPES):
        if toy_block_types[i].number == number:
            return &toy_block_types[i]
    return NULL


cdef Py_ssize_t quantized_scratch_floats(Py_ssize_t n_in, Py_ssize_t n_out) noexcept nogil:
    cdef Py_ssize_t whole = (n_in * n_out + 15) // 16 * 16
    return whole if whole < BAND_FLOATS else BAND_FLOATS


cdef inline Py_ssize_t band_rows(Py_ssize_t n, Py_ssize_t columns, Py_ssize_t multiple) noexcept nogil:
    """Rows of a band of so many columns (BAND_COLUMNS at most), for a product with n rows of x."""
    return (SMALL_BAND_FLOATS if n <= SMALL else BAND_FLOATS) // columns // multiple * multiple


cdef inline void read_piece(
    const toy_block_type* type, const unsigned char* weight, Py_ssize_t n_in,
    Py_ssize_t row, Py_ssize_t rows, Py_ssize_t column, Py_ssize_t columns, float* piece,
) noexcept nogil:
    """rows x columns numbers of W from (row, column) on, column a multiple of the block -> piece, contiguous."""
    cdef Py_ssize_t row_bytes = n_in // type.block * type.bytes, i
    weight += row * row_bytes + column // type.block * type.bytes
    for i in range(rows):
        type.read(weight + i * row_bytes, piece + i * columns, columns)


cdef void quantized_linear_forward(void* args, int ith, int nth) noexcept nogil:
    cdef QuantizedLinear* a = <QuantizedLinear*> args
    cdef Py_ssize_t start = slice_start(a.n_out, MULTIPLE, ith, nth), end = slice_start(a.n_out, MULTIPLE, ith + 1, nth), i
    cdef float* scratch = a.scratch + ith * quantized_scratch_floats(a.n_in, a.n_out)
    if start >= end:
        return
    if a.precision != 0:
        forward_by_bands(a, start, end, scratch)    # bf16 has no dot products
    elif a.n <= FEW_ROWS and a.type.dot != NULL and a.n_in // 32 <= quantized_scratch_floats(a.n_in, a.n_out):
        forward_in_place(a, start, end, scratch)
    elif a.n <= FEW_ROWS:
        forward_by_dots(a, start, end, scratch)
    else:
        forward_by_bands(a, start, end, scratch)


cdef void forward_by_bands(QuantizedLinear* a, Py_ssize_t start, Py_ssize_t end, float* band) noexcept nogil:
    cdef Py_ssize_t columns = min(a.n_in, <Py_ssize_t> BAND_COLUMNS), column, row, rows, width, i
    cdef Py_ssize_t step = band_rows(a.n, columns, MULTIPLE)
    cdef float beta
    row = start
    while row < end:
        rows = min(step, end - row)
        if a.bias != NULL:
            for i in range(a.n):
                memcpy(a.y + i * a.y_stride + row, a.bias + row, rows * sizeof(float))
        beta = 0.0 if a.bias == NULL else 1.0
        column = 0
        while column < a.n_in:
            width = min(columns, a.n_in - column)
            read_piece(a.type, a.weight, a.n_in, row, rows, column, width, band)
            products.multiply_nt(
                a.precision, a.n, rows, width, a.x + column, a.x_stride, band, width, beta, a.y + row, a.y_stride
            )
            column, beta = column + width, 1.0
        row += rows


cdef void forward_in_place(QuantizedLinear* a, Py_ssize_t start, Py_ssize_t end, float* sums) noexcept nogil:
    """The numbers of a row of W go from its blocks into the sum, and are not written down."""
    cdef Py_ssize_t row_bytes = a.n_in // a.type.block * a.type.bytes, i, row
    cdef const float* x
    cdef float* y
    for i in range(a.n):
        x, y = a.x + i * a.x_stride, a.y + i * a.y_stride
        toy_sums_of_32(x, sums, a.n_in)
        for row in range(start, end):
            y[row] = a.type.dot(a.weight + row * row_bytes, x, sums, a.n_in)
            if a.bias != NULL:
                y[row] += a.bias[row]


cdef void forward_by_dots(QuantizedLinear* a, Py_ssize_t start, Py_ssize_t end, float* piece) noexcept nogil:
    cdef Py_ssize_t column, row = start, rows, width, i, k
    cdef float[ROWS_AT_ONCE] sums
    cdef float* y
    cdef const float* x
    while row < end:
        rows = min(<Py_ssize_t> ROWS_AT_ONCE, end - row)
        column = 0
        while column < a.n_in:
            width = min(<Py_ssize_t> COLUMNS_AT_ONCE, a.n_in - column)
            read_piece(a.type, a.weight, a.n_in, row, rows, column, width, piece)
            for i in range(a.n):
                x, y = a.x + i * a.x_stride + column, a.y + i * a.y_stride + row
                if rows == ROWS_AT_ONCE:
                    toy_four_dots(piece, width, x, width, sums)
                else:
                    for k in range(rows):
                        sums[k] = toy_row_dot(piece + k * width, x, width)
                for k in range(rows):
                    if column > 0:
                        y[k] += sums[k]
                    else:
                        y[k] = sums[k] if a.bias == NULL else a.bias[row + k] + sums[k]
            column += width
        row += rows


cdef void quantized_linear_backward_input(void* args, int ith, int nth) noexcept nogil:
    cdef QuantizedLinearBackward* a = <QuantizedLinearBackward*> args
    cdef Py_ssize_t block = max(a.type.block, <int> MULTIPLE), first = 0, last = a.n, start = 0, end = a.n_in
    cdef float* band = a.scratch + ith * quantized_scratch_floats(a.n_in, a.n_out)
    cdef Py_ssize_t columns, column, row, rows, step
    cdef float beta
    if a.n_in // block >= 4 * nth or a.n < MULTIPLE * nth:
        start, end = slice_start(a.n_in, block, ith, nth), slice_start(a.n_in, block, ith + 1, nth)
    else:  # the columns cannot be shared out evenly
        first, last = slice_start(a.n, MULTIPLE, ith, nth), slice_start(a.n, MULTIPLE, ith + 1, nth)
    if first >= last:
        return
    column = start
    while column < end:
        columns = min(<Py_ssize_t> BAND_COLUMNS, end - column)
        step = band_rows(last - first, columns, 1 if a.precision == 0 else 2)    # bf16 adds pairs
        row, beta = 0, 0.0
        while row < a.n_out:
            rows = min(step, a.n_out - row)
            read_piece(a.type, a.weight, a.n_in, row, rows, column, columns, band)
            products.multiply_nn(
                a.precision, last - first, columns, rows, a.d_y + first * a.d_y_stride + row, a.d_y_stride, band, columns,
                beta, a.d_x + first * a.d_x_stride + column, a.d_x_stride,
            )
            row, beta = row + rows, 1.0
        column += columns


cdef void quantized_embedding_forward(void* args, int ith, int nth) noexcept nogil:
    cdef QuantizedEmbedding* a = <QuantizedEmbedding*> args
    cdef Py_ssize_t row_bytes = a.columns // a.type.block * a.type.bytes, i
    for i in range(slice_start(a.n, 1, ith, nth), slice_start(a.n, 1, ith + 1, nth)):
        a.type.read(a.table + a.ids[i] * row_bytes, a.rows + i * a.rows_stride, a.columns)


# ----------------------------------------------------------------------------------------------------------------------
# for numpy arrays; `raw` is uint8 (out, bytes of a row), as in toy.quantized.QuantizedMatrix
# ----------------------------------------------------------------------------------------------------------------------

# dict of the names of the types that are read here to their numbers
TYPES = {toy_block_types[i].name.decode(): toy_block_types[i].number for i in range(TOY_N_BLOCK_TYPES)}

FORM = "x (N, in), weight a QuantizedMatrix (out, in), bias (out,) or None"
FORM_BACKWARD = "linear_backward: d_y (N, out), d_bias (out,) or None, as in the forward"
FORM_EMBEDDING = "embedding: token_ids int (N,), table a QuantizedMatrix (V, D)"


cdef struct Weight:
    const unsigned char* data
    const toy_block_type* type
    Py_ssize_t n_out, n_in


cdef int get_quantized(Weight* out, object raw, object type) except -1:
    """Whole rows of bytes; their length says how many numbers a row has."""
    out.type = block_type(TYPES.get(type, -1) if isinstance(type, str) else -1)
    if out.type == NULL:
        raise ValueError(f"there is no compiled kernel for the type {type!r}, only for {', '.join(TYPES)}")
    if not cnp.PyArray_Check(raw) or cnp.PyArray_TYPE(raw) != cnp.NPY_UINT8 or cnp.PyArray_NDIM(raw) != 2:
        raise ValueError("raw must be an array of uint8 (rows, bytes of a row)")
    if isinstance(raw, np.ma.MaskedArray):
        raise ValueError("raw is a masked array, whose mask would be lost: pass numpy.ma.filled(raw, value)")
    if not cnp.PyArray_IS_C_CONTIGUOUS(raw):
        raise ValueError("raw must be C-contiguous: pass numpy.ascontiguousarray(raw)")
    cdef Py_ssize_t row_bytes = cnp.PyArray_DIM(raw, 1)
    if row_bytes % out.type.bytes:
        raise ValueError(f"raw has rows of {row_bytes} bytes, expected a multiple of {out.type.bytes}, a block of {type}")
    if cnp.PyArray_SIZE(raw) == 0:
        raise ValueError(f"raw is empty, shape {raw.shape}: expected at least one row of at least one block of {type}")
    out.data = <const unsigned char*> cnp.PyArray_DATA(raw)
    out.n_out, out.n_in = cnp.PyArray_DIM(raw, 0), row_bytes // out.type.bytes * out.type.block
    if out.n_out > INT_MAX or out.n_in > INT_MAX:
        raise ValueError("raw has an axis longer than 2**31 - 1, which BLAS cannot count")
    return 0


cdef int slices(Py_ssize_t n, Weight* weight, bint by_dots) noexcept:
    cdef double size = <double> weight.n_out * weight.n_in
    if by_dots:
        return slices_for(READ_COST * size, False)
    return min(slices_for((READ_COST + 2.0 * n / FLOPS_PER_NANOSECOND) * size, False), blas.product_slices(1e9, False))


def dequantize(raw, type, out):
    """Write the float32 numbers of raw, uint8 (rows, bytes of a row), into out, float32 (rows, numbers of a row)."""
    cdef Weight weight
    cdef Matrix out_
    cdef QuantizedEmbedding args
    get_quantized(&weight, raw, type)
    get_matrix(&out_, out, "out", weight.n_out, weight.n_in, "dequantize: raw (rows, bytes), out (rows, numbers)")
    if not cnp.PyArray_ISWRITEABLE(out):
        raise ValueError("out is read-only, but the result is written into it: pass a writable array")
    cdef Span of_raw = vector_span(weight.data, cnp.PyArray_SIZE(raw))
    check_apart(matrix_span(&out_), out, "out", of_raw, raw, "raw", "dequantize: raw (rows, bytes), out (rows, numbers)")
    args.n, args.columns, args.ids, args.table, args.type = weight.n_out, weight.n_in, NULL, weight.data, weight.type
    args.rows, args.rows_stride = out_.data, out_.stride
    with nogil:
        run(dequantize_rows, &args, slices_for(READ_COST * args.n * args.columns, False))


cdef void dequantize_rows(void* args, int ith, int nth) noexcept nogil:
    cdef QuantizedEmbedding* a = <QuantizedEmbedding*> args
    cdef Py_ssize_t row_bytes = a.columns // a.type.block * a.type.bytes, i
    for i in range(slice_start(a.n, 1, ith, nth), slice_start(a.n, 1, ith + 1, nth)):
        a.type.read(a.table + i * row_bytes, a.rows + i * a.rows_stride, a.columns)


def embedding(token_ids, raw, type):
    """One row per id. token_ids: int (N,), raw and type: the table (V, D) -> (N, D)."""
    cdef Weight table
    cdef Matrix rows_
    cdef QuantizedEmbedding args
    get_quantized(&table, raw, type)
    ids = get_integers(token_ids, "token_ids", ANY, 0, table.n_out, FORM_EMBEDDING)
    args.n, args.columns, args.table, args.type = cnp.PyArray_DIM(ids, 0), table.n_in, table.data, table.type
    args.ids = integers_data(ids)
    rows = new_matrix(&rows_, args.n, args.columns)
    args.rows, args.rows_stride = rows_.data, rows_.stride
    with nogil:
        run(quantized_embedding_forward, &args, slices_for(READ_COST * args.n * args.columns, False))
    return rows


def linear(x, raw, type, bias, precision=0):
    """x: (N, in), raw and type: the weight (out, in), bias: (out,) or None -> (N, out). precision: of `products`."""
    cdef Weight weight
    cdef Matrix x_, y_
    cdef QuantizedLinear args
    get_quantized(&weight, raw, type)
    get_matrix(&x_, x, "x", ANY, weight.n_in, f"linear: {FORM}")
    args.n, args.n_in, args.n_out, args.weight, args.type = x_.rows, weight.n_in, weight.n_out, weight.data, weight.type
    args.x, args.x_stride, args.precision = x_.data, x_.stride, products.checked(precision)
    args.bias = NULL if bias is None else get_vector(bias, "bias", args.n_out, f"linear: {FORM}")
    y = new_matrix(&y_, args.n, args.n_out)
    args.y, args.y_stride = y_.data, y_.stride
    cdef int nth = slices(args.n, &weight, args.precision == 0 and args.n <= FEW_ROWS)
    scratch = empty_vector(nth * quantized_scratch_floats(args.n_in, args.n_out))
    args.scratch = <float*> cnp.PyArray_DATA(scratch)
    blas.enter()
    with nogil:
        run(quantized_linear_forward, &args, nth)
    blas.leave()
    return y


def linear_backward(d_y, raw, type, d_bias, precision=0):
    """d_y: (N, out) -> d_x (N, in). Adds into d_bias (out,) unless it is None. precision: of `products`."""
    cdef Weight weight
    cdef Matrix d_y_, d_x_
    cdef QuantizedLinearBackward args
    cdef float* sums
    cdef Span to_bias
    cdef Py_ssize_t i, j
    get_quantized(&weight, raw, type)
    get_matrix(&d_y_, d_y, "d_y", ANY, weight.n_out, FORM_BACKWARD)
    args.n, args.n_in, args.n_out, args.weight, args.type = d_y_.rows, weight.n_in, weight.n_out, weight.data, weight.type
    args.d_y, args.d_y_stride, args.precision = d_y_.data, d_y_.stride, products.checked(precision)
    if d_bias is not None:
        sums = get_vector_gradient(d_bias, "d_bias", args.n_out, FORM_BACKWARD)
        to_bias = vector_span(sums, args.n_out * sizeof(float))
        check_apart(to_bias, d_bias, "d_bias", matrix_span(&d_y_), d_y, "d_y", FORM_BACKWARD)
        check_apart(to_bias, d_bias, "d_bias", vector_span(weight.data, cnp.PyArray_SIZE(raw)), raw, "raw", FORM_BACKWARD)
        for i in range(args.n):
            for j in range(args.n_out):
                sums[j] += args.d_y[i * args.d_y_stride + j]
    d_x = new_matrix(&d_x_, args.n, args.n_in)
    args.d_x, args.d_x_stride = d_x_.data, d_x_.stride
    cdef int nth = slices(args.n, &weight, False)
    scratch = empty_vector(nth * quantized_scratch_floats(args.n_in, args.n_out))
    args.scratch = <float*> cnp.PyArray_DATA(scratch)
    blas.enter()
    with nogil:
        run(quantized_linear_backward_input, &args, nth)
    blas.leave()
    return d_x
