# cython: language_level=3, cdivision=True, auto_pickle=False
"""What depends on a token's id and place: the embedding lookup and the rotary position embedding (RoPE)."""

cimport cython
from libc.limits cimport INT_MAX
from libc.math cimport INFINITY
from libc.string cimport memcpy

import numpy as np

cimport numpy as cnp

from toy._kernels.arrays cimport (
    ANY, Matrix, check_apart, check_cache, check_filled, get_count, get_integers, get_matrix, get_number, get_weight,
    get_weight_gradient, integers_data, matrix_span, new_matrix,
)
from toy._kernels.threads cimport run, slice_start, slices_for

cnp.import_array()

__all__ = ["rope", "rope_backward"]  # `embedding` meets quantised tables first (accelerated.py)

cdef double COPY_COST = 0.15    # rough nanoseconds an element on one core
cdef double ROPE_COST = 0.4


cdef void embedding_forward(void* args, int ith, int nth) noexcept nogil:
    cdef Embedding* a = <Embedding*> args
    cdef Py_ssize_t i
    for i in range(slice_start(a.n, 1, ith, nth), slice_start(a.n, 1, ith + 1, nth)):
        memcpy(a.rows + i * a.rows_stride, a.table + a.ids[i] * a.columns, a.columns * sizeof(float))


cdef void embedding_backward_(void* args, int ith, int nth) noexcept nogil:
    cdef Embedding* a = <Embedding*> args
    cdef Py_ssize_t start = slice_start(a.columns, 16, ith, nth), end = slice_start(a.columns, 16, ith + 1, nth), i, j
    cdef float* to
    cdef const float* source
    for i in range(a.n):
        to = a.d_table + a.ids[i] * a.columns
        source = a.d_rows + i * a.rows_stride
        for j in range(start, end):
            to[j] += source[j]


FORM = "embedding: token_ids int (N,), table (V, D)"
FORM_BACKWARD = "embedding_backward: d_out (N, D), d_table (V, D) or None, as in the forward"


@cython.final
@cython.freelist(16)
cdef class EmbeddingCache:
    """token_ids: a private int64 copy (N,); table_rows: V; columns: D."""

    cdef object token_ids
    cdef Py_ssize_t table_rows, columns


def embedding(token_ids, table):
    """Look up one row per id. token_ids: int (N,), table: (V, D) -> (N, D)."""
    cdef EmbeddingCache cache = EmbeddingCache.__new__(EmbeddingCache)
    cdef Embedding args
    cdef Matrix table_, rows_
    get_weight(&table_, table, "table", ANY, ANY, FORM)
    cache.table_rows, cache.columns = table_.rows, table_.columns
    cache.token_ids = get_integers(token_ids, "token_ids", ANY, 0, table_.rows, FORM)
    args.n, args.columns, args.table_rows = cnp.PyArray_DIM(cache.token_ids, 0), table_.columns, table_.rows
    args.ids, args.table = integers_data(cache.token_ids), table_.data
    rows = new_matrix(&rows_, args.n, args.columns)
    args.rows, args.rows_stride = rows_.data, rows_.stride
    with nogil:
        run(embedding_forward, &args, slices_for(COPY_COST * args.n * args.columns, True))
    return rows, cache


def embedding_backward(d_out, cache, d_table):
    """d_out: (N, D). Adds into d_table (V, D); an id that occurs k times collects k rows. None = frozen."""
    check_cache(cache, EmbeddingCache, "embedding")
    cdef EmbeddingCache saved = <EmbeddingCache> cache
    cdef Embedding args
    cdef Matrix d_table_, d_out_
    check_filled(saved.token_ids, "embedding")
    args.n, args.columns, args.table_rows = cnp.PyArray_DIM(saved.token_ids, 0), saved.columns, saved.table_rows
    get_matrix(&d_out_, d_out, "d_out", args.n, args.columns, FORM_BACKWARD)
    if d_table is None:
        return
    get_weight_gradient(&d_table_, d_table, "d_table", args.table_rows, args.columns, FORM_BACKWARD)
    check_apart(matrix_span(&d_table_), d_table, "d_table", matrix_span(&d_out_), d_out, "d_out", FORM_BACKWARD)
    args.ids, args.d_table = integers_data(saved.token_ids), d_table_.data
    args.d_rows, args.rows_stride = d_out_.data, d_out_.stride
    with nogil:
        run(embedding_backward_, &args, slices_for(COPY_COST * args.n * args.columns, True))


# ----------------------------------------------------------------------------------------------------------------------
# RoPE
# ----------------------------------------------------------------------------------------------------------------------


cdef void rope_rotate(void* args, int ith, int nth) noexcept nogil:
    cdef Rope* a = <Rope*> args
    cdef Py_ssize_t half = a.d_head // 2, i, head, j
    cdef const float* cosine
    cdef const float* sine
    cdef const float* x
    cdef float* y
    cdef float direction = a.direction
    for i in range(slice_start(a.n, 1, ith, nth), slice_start(a.n, 1, ith + 1, nth)):
        cosine, sine = a.cosines + a.positions[i] * half, a.sines + a.positions[i] * half
        for head in range(a.n_heads):
            x, y = a.x + i * a.x_stride + head * a.d_head, a.y + i * a.y_stride + head * a.d_head
            if a.halves:
                for j in range(half):
                    y[j] = x[j] * cosine[j] - x[half + j] * (direction * sine[j])
                    y[half + j] = x[j] * (direction * sine[j]) + x[half + j] * cosine[j]
                continue
            for j in range(half):
                y[2 * j] = x[2 * j] * cosine[j] - x[2 * j + 1] * (direction * sine[j])
                y[2 * j + 1] = x[2 * j] * (direction * sine[j]) + x[2 * j + 1] * cosine[j]


FORM_ROPE = "rope: x (N, n_heads*d_head) with an even d_head, positions int (N,)"
FORM_ROPE_BACKWARD = "rope_backward: d_y (N, n_heads*d_head), as x in the forward"

cdef Py_ssize_t LARGEST_POSITION = 1 << 24
cdef Py_ssize_t LARGEST_TABLE = 1 << 22    # numbers that a table for all positions up to the largest may have

# (base, d_head, factors, magnitude) -> (cosines, sines), each (positions so far, d_head/2) float32. A model uses one or two.
cdef dict tables = {}


cdef object tables_for(double base, Py_ssize_t d_head, object factors, double magnitude, Py_ssize_t n_positions):
    """cos and sin of position * base^(-2i/d_head) / factors[i], times the magnitude, computed in double precision once for
    all steps and layers. factors: a tuple, or None."""
    known = tables.get((base, d_head, factors, magnitude))
    if known is not None and known[0].shape[0] >= n_positions:
        return known
    n_positions = max(n_positions, 256 if known is None else min(2 * known[0].shape[0], LARGEST_TABLE // (d_head // 2)))
    known = cosines_and_sines(np.arange(n_positions), base, d_head, factors, magnitude)
    if len(tables) >= 8:
        tables.clear()
    tables[base, d_head, factors, magnitude] = known
    return known


cdef object cosines_and_sines(object positions, double base, Py_ssize_t d_head, object factors, double magnitude):
    frequencies = base ** (-np.arange(0, d_head, 2) / d_head)
    if factors is not None:
        frequencies = frequencies / np.array(factors)
    angles = positions[:, None] * frequencies
    return (magnitude * np.cos(angles)).astype(np.float32), (magnitude * np.sin(angles)).astype(np.float32)


cdef object checked_factors(object factors, Py_ssize_t d_head):
    """The factors as a tuple of floats, which a table can be found by. ValueError unless they are d_head/2 positive numbers."""
    if type(factors) is tuple and len(factors) == d_head // 2 and all(type(f) is float and 0 < f < INFINITY for f in factors):
        return factors  # the common case, a config's
    try:
        numbers = np.asarray(factors, np.float64)
    except (TypeError, ValueError):
        numbers = np.empty(0)
    if numbers.shape != (d_head // 2,) or not (np.isfinite(numbers) & (numbers > 0)).all():
        raise ValueError(
            f"rope: factors must be {d_head // 2} numbers above 0, one for each pair of a head, given {str(factors)[:60]}. "
            f"{FORM_ROPE}"
        )
    return tuple(numbers.tolist())


@cython.final
@cython.freelist(64)
cdef class RopeCache:
    """positions: a private int64 copy (N,); cosines and sines: tables (positions, d_head/2) that it points into.

    The tables are shared by all caches, so nothing of a cache can be reached from Python."""

    cdef object positions, cosines, sines
    cdef Py_ssize_t n_heads, d_head
    cdef bint halves


cdef object rotate(object x, object name, RopeCache cache, float direction, object form):
    cdef Rope args
    cdef Matrix x_, y_
    args.n, args.n_heads, args.d_head = cnp.PyArray_DIM(cache.positions, 0), cache.n_heads, cache.d_head
    get_matrix(&x_, x, name, args.n, args.n_heads * args.d_head, form)
    args.positions = integers_data(cache.positions)
    args.cosines = <float*> cnp.PyArray_DATA(cache.cosines)
    args.sines = <float*> cnp.PyArray_DATA(cache.sines)
    args.direction, args.halves = direction, cache.halves
    y = new_matrix(&y_, x_.rows, x_.columns)
    args.x, args.x_stride, args.y, args.y_stride = x_.data, x_.stride, y_.data, y_.stride
    with nogil:
        run(rope_rotate, &args, slices_for(ROPE_COST * x_.rows * x_.columns, True))
    return y


def rope(x, positions, n_heads, base=10000.0, halves=False, factors=None, magnitude=1.0):
    """Turn the pair (x[2i], x[2i+1]) of every head, with halves (x[i], x[i + d_head/2]), by position * base^(-2i/d_head).

    x: (N, n_heads*d_head), positions: int (N,), 0 or more -> (N, n_heads*d_head). d_head must be even. factors: (d_head/2,)
    numbers above 0 that divide the frequencies, or None. magnitude: multiplies the result.
    """
    cdef RopeCache cache = RopeCache.__new__(RopeCache)
    cdef Matrix x_
    cdef Py_ssize_t n_positions
    cdef double base_ = get_number(base, "base", FORM_ROPE)
    cdef double magnitude_ = get_number(magnitude, "magnitude", FORM_ROPE)
    get_matrix(&x_, x, "x", ANY, ANY, FORM_ROPE)
    cache.n_heads = get_count(n_heads, "n_heads", 1, INT_MAX, FORM_ROPE)
    if x_.columns == 0 or x_.columns % (2 * cache.n_heads):
        raise ValueError(
            f"rope: x has shape {x.shape} and n_heads={n_heads}, expected columns that divide by 2*n_heads. {FORM_ROPE}"
        )
    if not base_ > 0:
        raise ValueError(f"rope: base is {base}, expected a positive number")
    cache.d_head = x_.columns // cache.n_heads
    cache.halves = bool(halves)
    if factors is not None:
        factors = checked_factors(factors, cache.d_head)
    cache.positions = get_integers(positions, "positions", x_.rows, 0, LARGEST_POSITION, FORM_ROPE)
    n_positions = 1 + cache.positions.max(initial=0)
    if n_positions * (cache.d_head // 2) <= LARGEST_TABLE:
        cache.cosines, cache.sines = tables_for(base_, cache.d_head, factors, magnitude_, n_positions)
    else:  # few tokens at far positions must not take the memory of all positions before them
        cache.cosines, cache.sines = cosines_and_sines(cache.positions, base_, cache.d_head, factors, magnitude_)
        cache.positions = np.arange(x_.rows)
    return rotate(x, "x", cache, 1.0, FORM_ROPE), cache


def rope_backward(d_y, cache):
    """d_y: (N, n_heads*d_head) -> d_x. A rotation is orthogonal: its transpose turns back by the same angle."""
    check_cache(cache, RopeCache, "rope")
    check_filled((<RopeCache> cache).sines, "rope")
    return rotate(d_y, "d_y", cache, -1.0, FORM_ROPE_BACKWARD)
