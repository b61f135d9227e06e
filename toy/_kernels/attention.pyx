# cython: language_level=3, cdivision=True, auto_pickle=False
"""Multi-head attention: softmax(q k^T / sqrt(d_head)) v per head, forward and backward.

The scores of one head are computed a block of query rows at a time in a scratch buffer that stays in cache, and only
for the keys that the block may see: with a causal mask that is about half the work. The (T, T) probabilities are
never stored; the forward keeps the largest score of every row, and the backward recomputes the probabilities (the
idea of FlashAttention, Dao et al. 2022).

Both kernels are here twice. `*_in_lanes` has the queries of a block side by side in vectors (attention_lanes.h) and does the
products itself: at these sizes, some tens of rows and columns, sgemm takes longer to pack its operands than to multiply
them. `*_by_sgemm` is for few queries, which would fill few lanes, and for CPUs whose vectors the compiler does not know.
"""

cimport cython
from libc.limits cimport INT_MAX
from libc.math cimport INFINITY, sqrt, tanhf
from libc.stdint cimport uintptr_t
from libc.string cimport memcpy, memset

import numpy as np

cimport numpy as cnp

from toy._kernels cimport blas
from toy._kernels.arrays cimport (
    ANY, Matrix, check_cache, check_filled, get_count, get_matrix, get_number, new_matrix,
)
from toy._kernels.memory cimport empty_matrix, empty_vector, matrix_view
from toy._kernels.threads cimport run, slice_start, slices_for

cnp.import_array()

__all__ = ["attention", "attention_backward"]

cdef extern from "simd_math.h" nogil:
    float toy_row_max(const float* x, Py_ssize_t n)
    float toy_row_dot(const float* x, const float* y, Py_ssize_t n)
    float toy_row_exp(const float* x, float scale, float shift, float* y, Py_ssize_t n)

cdef extern from "attention_lanes.h" nogil:
    const int LANES "TOY_LANES"          # of a vector; 0: there are none of the functions
    const int LANES_BLOCK "TOY_BLOCK"    # query rows of a block: two vectors
    const int TILE "TOY_TILE"            # rows of a product that are done together
    ctypedef struct FetchList "toy_fetch_list":
        const float* x
        Py_ssize_t x_row, rows
        int to_write
    ctypedef struct Fetch "toy_fetch":
        FetchList[7] lists
        int first, n
        Py_ssize_t columns, rows_a_tile
    void toy_multiply(int columns, Py_ssize_t rows, Py_ssize_t n, const float* a, Py_ssize_t a_row, Py_ssize_t a_step,
                      const float* b, Py_ssize_t b_step, float* c, Py_ssize_t c_row, int add, Fetch* fetch)
    void toy_into_lanes(Py_ssize_t rows, Py_ssize_t n, const float* x, Py_ssize_t x_row, float* lanes)
    void toy_out_of_lanes(Py_ssize_t rows, Py_ssize_t n, float* lanes, const float* factors,
                          float* x, Py_ssize_t x_row)
    void toy_copy_rows(Py_ssize_t rows, Py_ssize_t n, const float* x, Py_ssize_t x_row, float* copy)
    void toy_hide_keys(float* scores, Py_ssize_t n, Py_ssize_t key, Py_ssize_t first, Py_ssize_t last, float value)
    void toy_cap_scores(float* scores, Py_ssize_t n, float scale, float softcap, float* slopes)
    void toy_largest_scores(const float* scores, Py_ssize_t n, float* largest)
    void toy_exp_scores(float* scores, Py_ssize_t n, float scale, const float* largest, float* total)
    void toy_exp_scores_and_expect(float* scores, const float* d_p, Py_ssize_t n, float scale, const float* largest,
                                   float* total, float* expected)
    void toy_d_scores(float* p, float* d_p, Py_ssize_t n, float scale, const float* inverse, const float* expected,
                      const float* slopes)

cdef enum:
    BLOCK = 64          # query rows a block by sgemm: enough for it to be fast, few enough for the scores to stay in cache
    CHUNK = 96          # keys at a time in lanes: their scores, 12 KB at most, stay in the first cache
    FEWEST_QUERIES = 5  # that are worth a vector of lanes, if the keys are few too; else those that fill half of one


cdef inline Py_ssize_t visible_keys(const Attention* a, Py_ssize_t query) noexcept nogil:
    """How many keys the query row sees."""
    return a.t_k - a.t_q + query + 1 if a.causal else a.t_k


cdef inline Py_ssize_t first_key(const Attention* a, Py_ssize_t query) noexcept nogil:
    """The first key that the query row sees."""
    return max(0, a.t_k - a.t_q + query - a.window + 1) if a.window else 0


cdef inline void hide_before(float* row, Py_ssize_t first) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(first):
        row[j] = -INFINITY


cdef inline void cap_scores(float* row, Py_ssize_t n, float scale, float softcap) noexcept nogil:
    """q.k -> softcap * tanh(scale * q.k / softcap)."""
    cdef Py_ssize_t j
    cdef float inner = scale / softcap
    for j in range(n):
        row[j] = softcap * tanhf(inner * row[j])


cdef inline Py_ssize_t hide_rest(float* row, Py_ssize_t seen) noexcept nogil:
    """Give the scores after the visible ones no weight, up to the end of a vector; returns that end.

    Whole vectors only: a loop over 33 scores would do two vectors and then one score on its own.
    """
    cdef Py_ssize_t end = (seen + 15) // 16 * 16, j
    for j in range(seen, end):
        row[j] = -INFINITY
    return end


cdef inline bint is_in_lanes(const Attention* a) noexcept nogil:
    return LANES > 0 and (2 * a.t_q > LANES or (a.t_q >= FEWEST_QUERIES and a.t_k <= 2 * a.t_q))


cdef inline bint packs(const Attention* a) noexcept nogil:
    """Whether a head's keys and values are copied together: more than one block reads them.

    Rows of a fused product are far apart, each in a page of its own and many in the same places of the cache.
    """
    return a.t_q > LANES_BLOCK


cdef Py_ssize_t attention_scratch(const Attention* a) noexcept nogil:
    cdef Py_ssize_t of_scores = 3 if a.softcap > 0 else 2    # matrices
    if is_in_lanes(a):
        # scores; keys and values; queries, outputs and a gradient; what `add_queries` wants; up to a cache line
        return (
            of_scores * a.t_k * LANES_BLOCK + (2 * a.t_k * a.d_head if packs(a) else 0) + 3 * a.d_head * LANES_BLOCK
            + (2 * LANES_BLOCK + CHUNK) * LANES + 16
        )
    return of_scores * BLOCK * ((a.t_k + 15) // 16 * 16)


cdef void forward_by_sgemm(Attention* a, int ith, int nth) noexcept nogil:
    cdef Py_ssize_t blocks = (a.t_q + BLOCK - 1) // BLOCK
    cdef Py_ssize_t group = a.n_heads // a.n_kv_heads
    cdef Py_ssize_t units = a.batch * a.n_heads * blocks
    cdef Py_ssize_t unit, b, h, first, rows, start, keys, width, i, j, seen, end
    cdef float scale = <float> (1.0 / sqrt(<double> a.d_head))
    cdef float of_score = 1.0 if a.softcap > 0 else scale    # what is left to multiply a score with
    cdef float largest, total, inverse, one = 1.0
    cdef float* scores = a.scratch + ith * attention_scratch(a)
    cdef float* row
    cdef float* out
    cdef const float* q
    cdef const float* k
    cdef const float* v
    for unit in range(slice_start(units, 1, ith, nth), slice_start(units, 1, ith + 1, nth)):
        first = unit % blocks * BLOCK
        h = unit // blocks % a.n_heads
        b = unit // blocks // a.n_heads
        rows = min(a.t_q - first, BLOCK)
        start = first_key(a, first)    # keys before it no row of the block sees
        keys = visible_keys(a, first + rows - 1) - start
        width = (keys + 15) // 16 * 16
        q = a.q + (b * a.t_q + first) * a.q_stride + h * a.d_head
        k = a.k + (b * a.t_k + start) * a.k_stride + h // group * a.d_head
        v = a.v + (b * a.t_k + start) * a.v_stride + h // group * a.d_head
        out = a.out + (b * a.t_q + first) * a.out_stride + h * a.d_head
        blas.multiply_nt(rows, keys, a.d_head, q, a.q_stride, k, a.k_stride, 0.0, scores, width)
        for i in range(rows):
            row = scores + i * width
            seen = visible_keys(a, first + i) - start
            if a.softcap > 0:
                cap_scores(row, seen, scale, a.softcap)
            hide_before(row, first_key(a, first + i) - start)
            end = hide_rest(row, seen)
            largest = toy_row_max(row, end)
            total = toy_row_exp(row, of_score, largest, row, end)
            a.largest[(b * a.n_heads + h) * a.t_q + first + i] = largest
            inverse = one / total
            for j in range(end):
                row[j] *= inverse
            memset(row + end, 0, (width - end) * sizeof(float))
        blas.multiply_nn(rows, a.d_head, keys, scores, width, v, a.v_stride, 0.0, out, a.out_stride)


cdef void backward_by_sgemm(Attention* a, int ith, int nth) noexcept nogil:
    cdef Py_ssize_t group = a.n_heads // a.n_kv_heads
    cdef Py_ssize_t pairs = a.batch * a.n_kv_heads
    cdef Py_ssize_t blocks = (a.t_q + BLOCK - 1) // BLOCK
    cdef Py_ssize_t pair, b, kv_head, h, block, first, rows, start, keys, width, i, j, seen, end
    cdef float scale = <float> (1.0 / sqrt(<double> a.d_head))
    cdef float of_score = 1.0 if a.softcap > 0 else scale
    cdef float largest, expected, inverse, one = 1.0
    cdef float* p = a.scratch + ith * attention_scratch(a)     # (rows, keys) probabilities
    cdef float* d_p = p + BLOCK * ((a.t_k + 15) // 16 * 16)    # (rows, keys) their gradient, then that of the scores
    cdef float* slopes = d_p + BLOCK * ((a.t_k + 15) // 16 * 16)    # (rows, keys) of the cap, where there is one
    cdef float* p_row
    cdef float* d_p_row
    cdef float* slope
    cdef float* d_q
    cdef float* d_k
    cdef float* d_v
    cdef const float* q
    cdef const float* k
    cdef const float* v
    cdef const float* d_out
    for pair in range(slice_start(pairs, 1, ith, nth), slice_start(pairs, 1, ith + 1, nth)):
        b = pair // a.n_kv_heads
        kv_head = pair % a.n_kv_heads
        k = a.k + b * a.t_k * a.k_stride + kv_head * a.d_head
        v = a.v + b * a.t_k * a.v_stride + kv_head * a.d_head
        d_k = a.d_k + b * a.t_k * a.d_k_stride + kv_head * a.d_head
        d_v = a.d_v + b * a.t_k * a.d_v_stride + kv_head * a.d_head
        for i in range(a.t_k):
            memset(d_k + i * a.d_k_stride, 0, a.d_head * sizeof(float))
            memset(d_v + i * a.d_v_stride, 0, a.d_head * sizeof(float))
        for h in range(kv_head * group, (kv_head + 1) * group):
            for block in range(blocks):
                first = block * BLOCK
                rows = min(a.t_q - first, BLOCK)
                start = first_key(a, first)
                keys = visible_keys(a, first + rows - 1) - start
                width = (keys + 15) // 16 * 16
                q = a.q + (b * a.t_q + first) * a.q_stride + h * a.d_head
                d_out = a.d_out + (b * a.t_q + first) * a.d_out_stride + h * a.d_head
                d_q = a.d_q + (b * a.t_q + first) * a.d_q_stride + h * a.d_head
                blas.multiply_nt(
                    rows, keys, a.d_head, q, a.q_stride, k + start * a.k_stride, a.k_stride, 0.0, p, width
                )
                blas.multiply_nt(
                    rows, keys, a.d_head, d_out, a.d_out_stride, v + start * a.v_stride, a.v_stride, 0.0, d_p, width
                )
                for i in range(rows):
                    p_row, d_p_row, slope = p + i * width, d_p + i * width, slopes + i * width
                    seen = visible_keys(a, first + i) - start
                    if a.softcap > 0:
                        cap_scores(p_row, seen, scale, a.softcap)
                        for j in range(seen):
                            slope[j] = one - (p_row[j] / a.softcap) * (p_row[j] / a.softcap)
                    hide_before(p_row, first_key(a, first + i) - start)
                    end = hide_rest(p_row, seen)
                    largest = a.largest[(b * a.n_heads + h) * a.t_q + first + i]
                    inverse = one / toy_row_exp(p_row, of_score, largest, p_row, end)
                    for j in range(end):
                        p_row[j] *= inverse
                    memset(p_row + end, 0, (width - end) * sizeof(float))
                    memset(d_p_row + seen, 0, (width - seen) * sizeof(float))
                    # d_scores = p (d_p - sum(d_p p)). That sum is also d_out . out, but rounded otherwise: a query that
                    # looks at one key alone would then get a gradient from rounding instead of 0.
                    expected = toy_row_dot(p_row, d_p_row, end)
                    for j in range(end):
                        d_p_row[j] = p_row[j] * (d_p_row[j] - expected) * scale
                    if a.softcap > 0:
                        for j in range(seen):
                            d_p_row[j] *= slope[j]
                blas.multiply_nn(
                    rows, a.d_head, keys, d_p, width, k + start * a.k_stride, a.k_stride, 0.0, d_q, a.d_q_stride
                )
                blas.multiply_tn(
                    keys, a.d_head, rows, d_p, width, q, a.q_stride, 1.0, d_k + start * a.d_k_stride, a.d_k_stride
                )
                blas.multiply_tn(
                    keys, a.d_head, rows, p, width, d_out, a.d_out_stride, 1.0, d_v + start * a.d_v_stride, a.d_v_stride
                )


# ---- queries in lanes ----------------------------------------------------------------------------------------------------

cdef struct Block:
    Py_ssize_t first, rows, columns      # query rows first .. first+rows-1, in one or two columns of LANES
    Py_ssize_t[2] start, end             # keys that some query of the column sees
    Py_ssize_t[2] all_start, all_end     # keys that all of them see
    Py_ssize_t chunks                    # from start[0] on, CHUNK keys each

cdef struct Band:
    Py_ssize_t column, columns, start, end    # keys start .. end-1 for one column of queries or for both


cdef void find_block(const Attention* a, Py_ssize_t first, Block* block) noexcept nogil:
    cdef Py_ssize_t column, low, high
    block.first, block.rows = first, min(a.t_q - first, <Py_ssize_t> LANES_BLOCK)
    block.columns = 1 if block.rows <= LANES else 2
    for column in range(block.columns):
        low = first + column * LANES
        high = min(first + block.rows, low + LANES) - 1
        block.start[column], block.end[column] = first_key(a, low), visible_keys(a, high)
        block.all_start[column], block.all_end[column] = first_key(a, high), visible_keys(a, low)
    block.chunks = (block.end[block.columns - 1] - block.start[0] + CHUNK - 1) // CHUNK


cdef void find_bands(const Block* block, Py_ssize_t start, Py_ssize_t end, Band* bands) noexcept nogil:
    """Three bands, of which some may be empty: keys that only the left column sees, that both see, only the right one."""
    cdef Py_ssize_t left = max(start, block.start[0]), left_end = min(end, block.end[0]), right, right_end
    if block.columns == 1:
        bands[0], bands[1], bands[2] = Band(0, 1, left, left_end), Band(0, 2, 0, 0), Band(1, 1, 0, 0)
        return
    right, right_end = max(start, block.start[1]), min(end, block.end[1])
    bands[0] = Band(0, 1, left, min(right, left_end))
    bands[1] = Band(0, 2, right, left_end)
    bands[2] = Band(1, 1, max(right, left_end), right_end)


cdef void dot_keys(const Attention* a, const Band* bands, const float* lanes, const float* k, Py_ssize_t k_stride,
                   float* out, Py_ssize_t base, Fetch* fetch) noexcept nogil:
    """out (keys from base on, LANES_BLOCK): each key's product with each query. lanes: (d_head, LANES_BLOCK)."""
    cdef Py_ssize_t i
    cdef const Band* band
    for i in range(3):
        band = bands + i
        if band.start < band.end:
            toy_multiply(
                <int> band.columns, band.end - band.start, a.d_head, k + band.start * k_stride, k_stride, 1,
                lanes + band.column * LANES, LANES_BLOCK,
                out + (band.start - base) * LANES_BLOCK + band.column * LANES, LANES_BLOCK, 0, fetch,
            )


cdef void add_keys(const Attention* a, const Band* bands, const float* weights, Py_ssize_t base,
                   const float* k, Py_ssize_t k_stride, float* lanes, Fetch* fetch) noexcept nogil:
    """lanes (d_head, LANES_BLOCK) += the sum of the keys, each times its weight for the query."""
    cdef Py_ssize_t i
    cdef const Band* band
    for i in range(3):
        band = bands + i
        if band.start < band.end:
            toy_multiply(
                <int> band.columns, a.d_head, band.end - band.start, k + band.start * k_stride, 1, k_stride,
                weights + (band.start - base) * LANES_BLOCK + band.column * LANES, LANES_BLOCK,
                lanes + band.column * LANES, LANES_BLOCK, 1, fetch,
            )


cdef void add_queries(const Attention* a, const Block* block, const Band* bands, const float* weights, Py_ssize_t base,
                      const float* q, Py_ssize_t q_stride, const float* q_rest, float* sums,
                      float* d_k, Py_ssize_t d_k_stride, bint add, Fetch* fetch) noexcept nogil:
    """d_k (+)= for each key the sum of the queries, each times its weight for the key; without `add` it is written.

    q_rest: (LANES_BLOCK, LANES) what of the queries is after the last whole vector, then zeros. sums: (CHUNK, LANES) scratch.
    """
    cdef Py_ssize_t i, j, low, rows, column, whole = a.d_head // LANES * LANES, rest = a.d_head - whole
    cdef const Band* band
    cdef const float* of_band
    cdef float* row
    for i in range(3):
        band = bands + i
        if band.start >= band.end:
            continue
        low = band.column * LANES    # the first query of the band
        rows = min(block.rows, low + band.columns * LANES) - low
        of_band = weights + (band.start - base) * LANES_BLOCK + low
        column = 0
        while column < whole:
            toy_multiply(
                2 if column + LANES < whole else 1, band.end - band.start, rows, of_band, LANES_BLOCK, 1,
                q + low * q_stride + column, q_stride, d_k + band.start * d_k_stride + column, d_k_stride, add, fetch,
            )
            column += 2 * LANES
        if rest > 0:
            toy_multiply(
                1, band.end - band.start, rows, of_band, LANES_BLOCK, 1, q_rest + low * LANES, LANES, sums, LANES, 0,
                fetch,
            )
            for j in range(band.end - band.start):
                row = d_k + (band.start + j) * d_k_stride + whole
                for column in range(rest):
                    row[column] = row[column] + sums[j * LANES + column] if add else sums[j * LANES + column]


cdef void copy_rest(const Attention* a, const Block* block, const float* q, Py_ssize_t q_stride,
                    float* q_rest) noexcept nogil:
    """What of each row is after the last whole vector, as `add_queries` wants it."""
    cdef Py_ssize_t i, j, whole = a.d_head // LANES * LANES
    if whole < a.d_head:
        memset(q_rest, 0, LANES_BLOCK * LANES * sizeof(float))
        for i in range(block.rows):
            for j in range(a.d_head - whole):
                q_rest[i * LANES + j] = q[i * q_stride + whole + j]


cdef Band column_keys(const Block* block, Py_ssize_t column, Py_ssize_t start, Py_ssize_t end) noexcept nogil:
    """Of the keys start .. end-1 those that some query of the column sees."""
    cdef Py_ssize_t low = max(start, block.start[column])
    return Band(column, 1, low, max(low, min(end, block.end[column])))


cdef void hide_keys(const Attention* a, const Block* block, float* scores, Py_ssize_t base, Py_ssize_t start,
                    Py_ssize_t end, float value) noexcept nogil:
    """Put `value` for the keys start .. end-1 where a query does not see them, in what its column has of them."""
    cdef Py_ssize_t column, first, last, low, high
    cdef Band keys
    for column in range(block.columns):
        keys = column_keys(block, column, start, end)
        # of the first lane, as if there were keys before the first one: each lane after it sees one key further
        last = visible_keys(a, block.first + column * LANES) - 1
        first = last - a.window + 1 if a.window else -LANES
        low = min(keys.end, block.all_start[column])
        if keys.start < low:
            toy_hide_keys(
                scores + (keys.start - base) * LANES_BLOCK + column * LANES, low - keys.start, keys.start, first, last, value
            )
        high = max(keys.start, block.all_end[column])
        if high < keys.end:
            toy_hide_keys(
                scores + (high - base) * LANES_BLOCK + column * LANES, keys.end - high, high, first, last, value
            )


cdef void find_scores(const Attention* a, const Block* block, const Band* bands, const float* q, const float* k,
                      Py_ssize_t k_stride, Py_ssize_t start, Py_ssize_t end, float scale, float* scores, float* slopes,
                      Fetch* fetch) noexcept nogil:
    """The scores of the keys start .. end-1, and the slopes of their cap unless that is NULL or there is no cap."""
    cdef Py_ssize_t base = block.start[0], column, i
    cdef Band keys
    dot_keys(a, bands, q, k, k_stride, scores, base, fetch)
    if a.softcap > 0:
        for column in range(block.columns):
            keys = column_keys(block, column, start, end)
            i = (keys.start - base) * LANES_BLOCK + column * LANES
            toy_cap_scores(
                scores + i, keys.end - keys.start, scale, a.softcap, NULL if slopes == NULL else slopes + i
            )
    if a.causal:
        hide_keys(a, block, scores, base, start, end, -INFINITY)


cdef inline bint fetches(const Attention* a) noexcept nogil:
    """Whether rows are asked for before they are needed: not where the whole op is in the second cache, about 1 MB."""
    return a.batch * (a.t_q + a.t_k) * a.n_heads * a.d_head > 128 * 1024


cdef void pack(const Attention* a, const float** k, Py_ssize_t* stride, float* copy) noexcept nogil:
    """Copy a head's keys or values (t_k, d_head) together, where that pays; *k and *stride then are the copy's."""
    if packs(a):
        toy_copy_rows(a.t_k, a.d_head, k[0], stride[0], copy)
        k[0], stride[0] = copy, a.d_head


cdef inline float* align(float* x) noexcept nogil:
    return <float*> ((<uintptr_t> x + 63) // 64 * 64)


cdef void plan(Fetch* fetch, const float* x, Py_ssize_t x_row, Py_ssize_t rows, bint to_write) noexcept nogil:
    if rows > 0:
        fetch.lists[fetch.n] = FetchList(x, x_row, rows, to_write)
        fetch.n += 1


cdef void spread(Fetch* fetch, Py_ssize_t tiles) noexcept nogil:
    """Ask for the rows of the plan in the course of about so many tiles."""
    cdef Py_ssize_t i, rows = 0
    for i in range(fetch.n):
        rows += fetch.lists[i].rows
    fetch.rows_a_tile = (rows + tiles - 1) // tiles


cdef void plan_forward(const Attention* a, const Block* block, Py_ssize_t unit, Py_ssize_t blocks,
                       Fetch* fetch) noexcept nogil:
    """The outputs of the unit, the queries of the next one, and a share of the keys and values of the next head."""
    cdef Py_ssize_t h = unit // blocks % a.n_heads, b = unit // blocks // a.n_heads, first = unit % blocks * LANES_BLOCK
    cdef Py_ssize_t units = a.n_heads // a.n_kv_heads * blocks, pair = unit // units + 1    # units a pair; the next one
    cdef Py_ssize_t share = (a.t_k + units - 1) // units, start = unit % units * share
    plan(fetch, a.out + (b * a.t_q + first) * a.out_stride + h * a.d_head, a.out_stride, block.rows, True)
    h, b, first = (unit + 1) // blocks % a.n_heads, (unit + 1) // blocks // a.n_heads, (unit + 1) % blocks * LANES_BLOCK
    if b < a.batch:
        plan(
            fetch, a.q + (b * a.t_q + first) * a.q_stride + h * a.d_head, a.q_stride,
            min(a.t_q - first, <Py_ssize_t> LANES_BLOCK), False,
        )
    if pair < a.batch * a.n_kv_heads and packs(a):
        b, h = pair // a.n_kv_heads, pair % a.n_kv_heads
        share = min(share, a.t_k - start)
        plan(fetch, a.k + (b * a.t_k + start) * a.k_stride + h * a.d_head, a.k_stride, share, False)
        plan(fetch, a.v + (b * a.t_k + start) * a.v_stride + h * a.d_head, a.v_stride, share, False)
    spread(fetch, (block.end[block.columns - 1] - block.start[0]) // TILE + (a.d_head // TILE + 1) * block.chunks + 1)


cdef void forward_in_lanes(Attention* a, int ith, int nth) noexcept nogil:
    cdef Py_ssize_t blocks = (a.t_q + LANES_BLOCK - 1) // LANES_BLOCK
    cdef Py_ssize_t group = a.n_heads // a.n_kv_heads
    cdef Py_ssize_t units = a.batch * a.n_heads * blocks
    cdef Py_ssize_t unit, b, h, i, chunk, start, end, column
    cdef float scale = <float> (1.0 / sqrt(<double> a.d_head))
    cdef float of_score = 1.0 if a.softcap > 0 else scale
    cdef float one = 1.0
    cdef float* q_lanes = align(a.scratch + ith * attention_scratch(a))    # (d_head, LANES_BLOCK)
    cdef float* out_lanes = q_lanes + a.d_head * LANES_BLOCK               # (d_head, LANES_BLOCK)
    cdef float* k_copy = out_lanes + a.d_head * LANES_BLOCK
    cdef float* v_copy = k_copy + (a.t_k * a.d_head if packs(a) else 0)
    cdef float* scores = v_copy + (a.t_k * a.d_head if packs(a) else 0)    # (keys, LANES_BLOCK)
    cdef float* column_scores
    cdef float[32] largest    # of each lane
    cdef float[32] total
    cdef float* out
    cdef const float* q
    cdef const float* k = NULL
    cdef const float* v = NULL
    cdef Py_ssize_t k_stride = 0, v_stride = 0, pair = -1
    cdef Block block
    cdef Fetch fetch
    cdef Band[3] bands
    cdef Band keys
    for unit in range(slice_start(units, 1, ith, nth), slice_start(units, 1, ith + 1, nth)):
        h = unit // blocks % a.n_heads
        b = unit // blocks // a.n_heads
        find_block(a, unit % blocks * LANES_BLOCK, &block)
        if pair != b * a.n_kv_heads + h // group:
            pair, k_stride, v_stride = b * a.n_kv_heads + h // group, a.k_stride, a.v_stride
            k = a.k + b * a.t_k * k_stride + h // group * a.d_head
            v = a.v + b * a.t_k * v_stride + h // group * a.d_head
            pack(a, &k, &k_stride, k_copy)
            pack(a, &v, &v_stride, v_copy)
        q = a.q + (b * a.t_q + block.first) * a.q_stride + h * a.d_head
        out = a.out + (b * a.t_q + block.first) * a.out_stride + h * a.d_head
        toy_into_lanes(block.rows, a.d_head, q, a.q_stride, q_lanes)
        fetch.first = fetch.n = 0
        fetch.columns = a.d_head
        if fetches(a):
            plan_forward(a, &block, unit, blocks, &fetch)
        for i in range(LANES_BLOCK):
            largest[i], total[i] = -INFINITY, 0
        for chunk in range(block.chunks):
            start, end = block.start[0] + chunk * CHUNK, block.start[0] + (chunk + 1) * CHUNK
            find_bands(&block, start, end, bands)
            find_scores(a, &block, bands, q_lanes, k, k_stride, start, end, scale, scores, NULL, &fetch)
            for column in range(block.columns):
                keys = column_keys(&block, column, start, end)
                column_scores = scores + (keys.start - block.start[0]) * LANES_BLOCK + column * LANES
                toy_largest_scores(column_scores, keys.end - keys.start, largest + column * LANES)
        memcpy(a.largest + (b * a.n_heads + h) * a.t_q + block.first, largest, block.rows * sizeof(float))
        memset(out_lanes, 0, a.d_head * LANES_BLOCK * sizeof(float))
        for chunk in range(block.chunks):
            start, end = block.start[0] + chunk * CHUNK, block.start[0] + (chunk + 1) * CHUNK
            for column in range(block.columns):
                keys = column_keys(&block, column, start, end)
                column_scores = scores + (keys.start - block.start[0]) * LANES_BLOCK + column * LANES
                toy_exp_scores(
                    column_scores, keys.end - keys.start, of_score, largest + column * LANES, total + column * LANES
                )
            find_bands(&block, start, end, bands)
            add_keys(a, bands, scores, block.start[0], v, v_stride, out_lanes, &fetch)
        for i in range(LANES_BLOCK):
            total[i] = one / total[i]
        toy_out_of_lanes(block.rows, a.d_head, out_lanes, total, out, a.out_stride)


cdef void plan_backward(const Attention* a, const Block* block, Py_ssize_t pair, Py_ssize_t step, Py_ssize_t blocks,
                        Fetch* fetch) noexcept nogil:
    """What block `step` of the blocks of a key/value head writes, the next block's queries, a share of the next head."""
    cdef Py_ssize_t group = a.n_heads // a.n_kv_heads, steps = group * blocks
    cdef Py_ssize_t next_pair = pair + (step + 1) // steps, next_step = (step + 1) % steps
    cdef Py_ssize_t b = pair // a.n_kv_heads, h = pair % a.n_kv_heads * group + step // blocks
    cdef Py_ssize_t first, rows, share = (a.t_k + steps - 1) // steps, start = step * share
    plan(fetch, a.d_q + (b * a.t_q + block.first) * a.d_q_stride + h * a.d_head, a.d_q_stride, block.rows, True)
    b, h = next_pair // a.n_kv_heads, next_pair % a.n_kv_heads * group + next_step // blocks
    first = (blocks - 1 - next_step % blocks) * LANES_BLOCK
    rows = min(a.t_q - first, <Py_ssize_t> LANES_BLOCK)
    if b < a.batch:
        plan(fetch, a.q + (b * a.t_q + first) * a.q_stride + h * a.d_head, a.q_stride, rows, False)
        plan(fetch, a.d_out + (b * a.t_q + first) * a.d_out_stride + h * a.d_head, a.d_out_stride, rows, False)
    b, h, rows = (pair + 1) // a.n_kv_heads, (pair + 1) % a.n_kv_heads, min(share, a.t_k - start)
    if b < a.batch and packs(a):
        plan(fetch, a.k + (b * a.t_k + start) * a.k_stride + h * a.d_head, a.k_stride, rows, False)
        plan(fetch, a.v + (b * a.t_k + start) * a.v_stride + h * a.d_head, a.v_stride, rows, False)
        plan(fetch, a.d_k + (b * a.t_k + start) * a.d_k_stride + h * a.d_head, a.d_k_stride, rows, True)
        plan(fetch, a.d_v + (b * a.t_k + start) * a.d_v_stride + h * a.d_head, a.d_v_stride, rows, True)
    # tiles: two products give scores, two the sums over queries, one that over keys
    spread(
        fetch, (block.end[block.columns - 1] - block.start[0]) // TILE * (2 + (a.d_head + LANES_BLOCK - 1) // LANES_BLOCK * 2)
        + (a.d_head // TILE + 1) * block.chunks + 1,
    )


cdef void backward_in_lanes(Attention* a, int ith, int nth) noexcept nogil:
    cdef Py_ssize_t group = a.n_heads // a.n_kv_heads
    cdef Py_ssize_t pairs = a.batch * a.n_kv_heads
    cdef Py_ssize_t blocks = (a.t_q + LANES_BLOCK - 1) // LANES_BLOCK
    cdef Py_ssize_t pair, b, kv_head, h, unit, first, chunk, start, end, column, base, i
    cdef Py_ssize_t k_stride, v_stride, size = a.d_head * LANES_BLOCK
    cdef float scale = <float> (1.0 / sqrt(<double> a.d_head))
    cdef float of_score = 1.0 if a.softcap > 0 else scale
    cdef float one = 1.0
    cdef float* q_lanes = align(a.scratch + ith * attention_scratch(a))    # (d_head, LANES_BLOCK)
    cdef float* d_out_lanes = q_lanes + size                               # (d_head, LANES_BLOCK)
    cdef float* d_q_lanes = d_out_lanes + size                             # (d_head, LANES_BLOCK)
    cdef float* q_rest = d_q_lanes + size                                  # (LANES_BLOCK, LANES)
    cdef float* d_out_rest = q_rest + LANES_BLOCK * LANES                  # (LANES_BLOCK, LANES)
    cdef float* sums = d_out_rest + LANES_BLOCK * LANES                    # (CHUNK, LANES)
    cdef float* k_copy = sums + CHUNK * LANES
    cdef float* v_copy = k_copy + (a.t_k * a.d_head if packs(a) else 0)
    cdef float* p = v_copy + (a.t_k * a.d_head if packs(a) else 0)    # (keys, LANES_BLOCK) scores, exponentials, probabilities
    cdef float* d_p = p + a.t_k * LANES_BLOCK        # (keys, LANES_BLOCK) their gradient, then that of the scores
    cdef float* slopes = d_p + a.t_k * LANES_BLOCK   # (keys, LANES_BLOCK) of the cap, where there is one
    cdef float[32] largest    # of each lane
    cdef float[32] total
    cdef float[32] expected
    cdef const float* q
    cdef const float* k
    cdef const float* v
    cdef const float* d_out
    cdef float* d_q
    cdef float* d_k
    cdef float* d_v
    cdef Block block
    cdef Fetch fetch
    cdef bint add
    cdef Band[3] bands
    cdef Band keys
    for pair in range(slice_start(pairs, 1, ith, nth), slice_start(pairs, 1, ith + 1, nth)):
        b = pair // a.n_kv_heads
        kv_head = pair % a.n_kv_heads
        k_stride, v_stride = a.k_stride, a.v_stride
        k = a.k + b * a.t_k * k_stride + kv_head * a.d_head
        v = a.v + b * a.t_k * v_stride + kv_head * a.d_head
        pack(a, &k, &k_stride, k_copy)
        pack(a, &v, &v_stride, v_copy)
        d_k = a.d_k + b * a.t_k * a.d_k_stride + kv_head * a.d_head
        d_v = a.d_v + b * a.t_k * a.d_v_stride + kv_head * a.d_head
        # The last block sees all keys, if there is no window: it comes first and writes, so that nothing need be zeroed.
        add = a.window > 0
        if add:
            for i in range(a.t_k):
                memset(d_k + i * a.d_k_stride, 0, a.d_head * sizeof(float))
                memset(d_v + i * a.d_v_stride, 0, a.d_head * sizeof(float))
        for h in range(kv_head * group, (kv_head + 1) * group):
            for unit in range(blocks):
                first = (blocks - 1 - unit) * LANES_BLOCK
                find_block(a, first, &block)
                base = block.start[0]
                q = a.q + (b * a.t_q + first) * a.q_stride + h * a.d_head
                d_out = a.d_out + (b * a.t_q + first) * a.d_out_stride + h * a.d_head
                d_q = a.d_q + (b * a.t_q + first) * a.d_q_stride + h * a.d_head
                toy_into_lanes(block.rows, a.d_head, q, a.q_stride, q_lanes)
                toy_into_lanes(block.rows, a.d_head, d_out, a.d_out_stride, d_out_lanes)
                fetch.first = fetch.n = 0
                fetch.columns = a.d_head
                if fetches(a):
                    plan_backward(a, &block, pair, (h - kv_head * group) * blocks + unit, blocks, &fetch)
                copy_rest(a, &block, q, a.q_stride, q_rest)
                copy_rest(a, &block, d_out, a.d_out_stride, d_out_rest)
                memset(d_q_lanes, 0, size * sizeof(float))
                for i in range(LANES_BLOCK):
                    largest[i], total[i], expected[i] = 0, 0, 0
                memcpy(largest, a.largest + (b * a.n_heads + h) * a.t_q + first, block.rows * sizeof(float))
                for chunk in range(block.chunks):
                    start, end = base + chunk * CHUNK, base + (chunk + 1) * CHUNK
                    find_bands(&block, start, end, bands)
                    find_scores(a, &block, bands, q_lanes, k, k_stride, start, end, scale, p, slopes, &fetch)
                    dot_keys(a, bands, d_out_lanes, v, v_stride, d_p, base, &fetch)
                    if a.causal:
                        hide_keys(a, &block, d_p, base, start, end, 0)
                    for column in range(block.columns):
                        keys = column_keys(&block, column, start, end)
                        i = (keys.start - base) * LANES_BLOCK + column * LANES
                        toy_exp_scores_and_expect(
                            p + i, d_p + i, keys.end - keys.start, of_score, largest + column * LANES,
                            total + column * LANES, expected + column * LANES,
                        )
                # d_scores = p (d_p - sum(d_p p)). That sum is also d_out . out, but rounded otherwise: a query that looks
                # at one key alone would then get a gradient from rounding instead of 0.
                for i in range(LANES_BLOCK):
                    total[i] = one / total[i]
                    expected[i] *= total[i]
                for chunk in range(block.chunks):
                    start, end = base + chunk * CHUNK, base + (chunk + 1) * CHUNK
                    for column in range(block.columns):
                        keys = column_keys(&block, column, start, end)
                        i = (keys.start - base) * LANES_BLOCK + column * LANES
                        toy_d_scores(
                            p + i, d_p + i, keys.end - keys.start, scale, total + column * LANES,
                            expected + column * LANES, slopes + i if a.softcap > 0 else NULL,
                        )
                    find_bands(&block, start, end, bands)
                    add_keys(a, bands, d_p, base, k, k_stride, d_q_lanes, &fetch)
                    add_queries(a, &block, bands, d_p, base, q, a.q_stride, q_rest, sums, d_k, a.d_k_stride, add, &fetch)
                    add_queries(a, &block, bands, p, base, d_out, a.d_out_stride, d_out_rest, sums, d_v, a.d_v_stride, add, &fetch)
                add = True
                for i in range(LANES_BLOCK):
                    total[i] = 1
                toy_out_of_lanes(block.rows, a.d_head, d_q_lanes, total, d_q, a.d_q_stride)


cdef void attention_forward(void* args, int ith, int nth) noexcept nogil:
    cdef Attention* a = <Attention*> args
    if is_in_lanes(a):
        forward_in_lanes(a, ith, nth)
    else:
        forward_by_sgemm(a, ith, nth)


cdef void attention_backward_(void* args, int ith, int nth) noexcept nogil:
    cdef Attention* a = <Attention*> args
    if is_in_lanes(a):
        backward_in_lanes(a, ith, nth)
    else:
        backward_by_sgemm(a, ith, nth)


FORM = "attention: q (B*Tq, n_heads*d_head), k and v (B*Tk, n_kv_heads*d_head), n_heads a multiple of n_kv_heads"
FORM_BACKWARD = "attention_backward: d_out (B*Tq, n_heads*d_head), as q in the forward"


@cython.final
@cython.freelist(64)
cdef class AttentionCache:
    """q, k and v as the forward saw them, and the largest q.k of every query row, (B*n_heads, Tq)."""

    cdef object q, k, v, largest
    cdef Attention args

    @property
    def probabilities(self):
        """(B, n_kv_heads, group, Tq, Tk), computed anew at each access: for pictures; no kernel needs it."""
        cdef Attention* a = &self.args
        check_filled(self.largest, "attention")
        heads = (a.batch, a.t_q, a.n_kv_heads, a.n_heads // a.n_kv_heads, a.d_head)
        q = np.reshape(self.q, heads).transpose(0, 2, 3, 1, 4)
        k = np.reshape(self.k, (a.batch, a.t_k, a.n_kv_heads, 1, a.d_head)).transpose(0, 2, 3, 4, 1)
        scores = (q @ k) * np.float32(a.d_head**-0.5)
        if a.softcap > 0:
            scores = np.float32(a.softcap) * np.tanh(scores / np.float32(a.softcap))
        if a.causal:
            scores[..., np.triu(np.ones((a.t_q, a.t_k), bool), k=a.t_k - a.t_q + 1)] = -np.inf
        if a.window:
            scores[..., np.tril(np.ones((a.t_q, a.t_k), bool), k=a.t_k - a.t_q - a.window)] = -np.inf
        p = np.exp(scores - scores.max(axis=4, keepdims=True))
        return p / p.sum(axis=4, keepdims=True)


cdef int take_in(Attention* a, object q, object k, object v, Py_ssize_t d_head, tuple names) except -1:
    """Take in q, k and v, which must fit batch, heads and `causal`; d_head: ANY or what it must be."""
    cdef Matrix q_, k_, v_
    get_matrix(&q_, q, names[0], ANY, ANY if d_head == ANY else a.n_heads * d_head, FORM)
    if q_.columns % a.n_heads or q_.columns == 0 or q_.rows % a.batch:
        raise ValueError(
            f"{names[0]}: has shape {q.shape}, expected rows that divide by batch={a.batch} "
            f"and columns that divide by n_heads={a.n_heads}. {FORM}"
        )
    a.d_head = q_.columns // a.n_heads
    get_matrix(&k_, k, names[1], ANY, a.n_kv_heads * a.d_head, FORM)
    get_matrix(&v_, v, names[2], k_.rows, a.n_kv_heads * a.d_head, FORM)
    a.t_q, a.t_k = q_.rows // a.batch, k_.rows // a.batch
    if k_.rows % a.batch or (a.t_k < a.t_q and a.causal) or (a.t_k == 0 and a.t_q > 0):
        raise ValueError(
            f"{names[1]}: has shape {k.shape}, expected rows that divide by batch={a.batch}, "
            f"with Tk >= Tq={a.t_q} if causal, Tk >= 1 if not. {FORM}"
        )
    a.q, a.q_stride, a.k, a.k_stride, a.v, a.v_stride = q_.data, q_.stride, k_.data, k_.stride, v_.data, v_.stride
    return 0


def attention(q, k, v, batch, n_heads, n_kv_heads=None, causal=True, window=None, softcap=None):
    """Multi-head attention.

    q: (B*Tq, n_heads*d_head), k and v: (B*Tk, n_kv_heads*d_head) -> (B*Tq, n_heads*d_head), B = batch.
    Tk may exceed Tq (a key/value cache): the queries are then the *last* Tq of the Tk positions, and with `causal`
    query i sees keys 0 .. Tk-Tq+i, with a `window` the last so many of them. softcap: a bound of the scores' size, reached
    through a tanh. q, k, v may be columns of one matrix (`split`); nothing is copied.
    """
    cdef AttentionCache cache = AttentionCache.__new__(AttentionCache)
    cdef Attention* a = &cache.args
    cdef Matrix out_
    a.batch = get_count(batch, "batch", 1, INT_MAX, FORM)
    a.n_heads = get_count(n_heads, "n_heads", 1, INT_MAX, FORM)
    a.n_kv_heads = a.n_heads if n_kv_heads is None else get_count(n_kv_heads, "n_kv_heads", 1, INT_MAX, FORM)
    if a.n_heads % a.n_kv_heads:
        raise ValueError(f"n_heads={a.n_heads} is not a multiple of n_kv_heads={a.n_kv_heads}. {FORM}")
    a.causal = bool(causal)
    a.window = 0 if window is None else get_count(window, "window", 1, INT_MAX, FORM)
    a.softcap = 0 if softcap is None else <float> get_number(softcap, "softcap", FORM)
    if window is not None and not a.causal:
        raise ValueError(f"window={window} needs causal=True: it is the last keys that a query sees. {FORM}")
    if softcap is not None and not a.softcap > 0:
        raise ValueError(f"softcap is {softcap}, expected a number above 0, or None. {FORM}")
    take_in(a, q, k, v, ANY, ("q", "k", "v"))
    if a.t_k == 0:
        a.batch = 1    # nothing to do, however often
    out = new_matrix(&out_, a.batch * a.t_q, a.n_heads * a.d_head)
    cache.largest = empty_matrix(a.batch * a.n_heads, a.t_q)
    cache.q, cache.k, cache.v = q, k, v
    a.out, a.out_stride = out_.data, out_.stride
    a.largest = <float*> cnp.PyArray_DATA(cache.largest)
    cdef int slices = attention_slices(a, 4.0, a.batch * a.n_heads * ((a.t_q + BLOCK - 1) // BLOCK))
    scratch = empty_vector(slices * attention_scratch(a))
    a.scratch = <float*> cnp.PyArray_DATA(scratch)
    blas.enter()
    with nogil:
        run(attention_forward, a, slices)
    blas.leave()
    return out, cache


cdef int attention_slices(const Attention* a, double flops_per_score, Py_ssize_t units):
    """How many slices pay: no more than there are units, for each has scratch memory of its own."""
    cdef double scores = <double> a.batch * a.n_heads * a.t_q * a.t_k * (0.6 if a.causal else 1.0)
    # rough work, counting a score's exponential and its bookkeeping as some 60 flops
    cdef double flops = scores * (flops_per_score * a.d_head + 60.0)
    cdef int slices
    if is_in_lanes(a):    # without BLAS, whose threads might be in the way
        slices = slices_for(flops / blas.FLOPS_PER_NANOSECOND, True)
    else:
        slices = blas.product_slices(flops, True)
    return <int> max(1, min(<Py_ssize_t> slices, units))


def attention_backward(d_out, cache):
    """d_out: (B*Tq, n_heads*d_head) -> d_q, d_k, d_v in the shapes of q, k, v.

    When Tk equals Tq the three are columns of one matrix, so that `concat([d_q, d_k, d_v])` has nothing to copy.
    """
    check_cache(cache, AttentionCache, "attention")
    cdef AttentionCache saved = <AttentionCache> cache
    cdef Attention a = saved.args
    cdef Matrix d_out_, together, d_q_, d_k_, d_v_
    check_filled(saved.largest, "attention")
    # once more: an array can be given another shape or other memory between the two
    take_in(&a, saved.q, saved.k, saved.v, a.d_head, ("the cache's q", "the cache's k", "the cache's v"))
    if (a.t_q, a.t_k) != (saved.args.t_q, saved.args.t_k):
        raise ValueError(
            f"the cache's q, k or v: their numbers of rows are not those of the forward, but {a.t_q} and {a.t_k} a sequence, "
            f"expected {saved.args.t_q} and {saved.args.t_k}. {FORM}"
        )
    cdef Py_ssize_t width = a.n_heads * a.d_head, kv_width = a.n_kv_heads * a.d_head
    get_matrix(&d_out_, d_out, "d_out", a.batch * a.t_q, width, FORM_BACKWARD)
    a.d_out, a.d_out_stride = d_out_.data, d_out_.stride
    if a.t_q == a.t_k:
        all_three = new_matrix(&together, a.batch * a.t_q, width + 2 * kv_width)
        a.d_q, a.d_k, a.d_v = together.data, together.data + width, together.data + width + kv_width
        a.d_q_stride = a.d_k_stride = a.d_v_stride = together.stride
        d_q = matrix_view(all_three, a.d_q, together.rows, width, together.stride)
        d_k = matrix_view(all_three, a.d_k, together.rows, kv_width, together.stride)
        d_v = matrix_view(all_three, a.d_v, together.rows, kv_width, together.stride)
    else:
        d_q = new_matrix(&d_q_, a.batch * a.t_q, width)
        d_k = new_matrix(&d_k_, a.batch * a.t_k, kv_width)
        d_v = new_matrix(&d_v_, a.batch * a.t_k, kv_width)
        a.d_q, a.d_q_stride, a.d_k, a.d_k_stride = d_q_.data, d_q_.stride, d_k_.data, d_k_.stride
        a.d_v, a.d_v_stride = d_v_.data, d_v_.stride
    cdef int slices = attention_slices(&a, 10.0, a.batch * a.n_kv_heads)
    scratch = empty_vector(slices * attention_scratch(&a))
    a.scratch = <float*> cnp.PyArray_DATA(scratch)
    blas.enter()
    with nogil:
        run(attention_backward_, &a, slices)
    blas.leave()
    return d_q, d_k, d_v
