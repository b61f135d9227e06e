# cython: language_level=3, cdivision=True, auto_pickle=False
"""Multi-head attention: softmax(q k^T / sqrt(d_head)) v per head, forward and backward.

The scores of one head are computed a block of query rows at a time in a scratch buffer that stays in cache, and only
for the keys that the block may see: with a causal mask that is about half the work. The (T, T) probabilities are
never stored; the forward keeps the largest score of every row, and the backward recomputes the probabilities (the
idea of FlashAttention, Dao et al. 2022).
"""

cimport cython
from libc.limits cimport INT_MAX
from libc.math cimport INFINITY, sqrt, tanhf
from libc.string cimport memset

import numpy as np

cimport numpy as cnp

from toy._kernels cimport blas
from toy._kernels.arrays cimport (
    ANY, Matrix, check_cache, check_filled, get_count, get_matrix, get_number, new_matrix,
)
from toy._kernels.memory cimport empty_matrix, empty_vector, matrix_view
from toy._kernels.threads cimport run, slice_start

cnp.import_array()

__all__ = ["attention", "attention_backward"]

cdef extern from "simd_math.h" nogil:
    float toy_row_max(const float* x, Py_ssize_t n)
    float toy_row_dot(const float* x, const float* y, Py_ssize_t n)
    float toy_row_exp(const float* x, float scale, float shift, float* y, Py_ssize_t n)

cdef enum:
    BLOCK = 64    # query rows a block: enough for sgemm to be fast, few enough for the scores to stay in cache


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


cdef Py_ssize_t attention_scratch(const Attention* a) noexcept nogil:
    return (3 if a.softcap > 0 else 2) * BLOCK * ((a.t_k + 15) // 16 * 16)


cdef void attention_forward(void* args, int ith, int nth) noexcept nogil:
    cdef Attention* a = <Attention*> args
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


cdef void attention_backward_(void* args, int ith, int nth) noexcept nogil:
    cdef Attention* a = <Attention*> args
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
    cdef int slices = blas.product_slices(attention_flops(a, 4.0), True)
    scratch = empty_vector(slices * attention_scratch(a))
    a.scratch = <float*> cnp.PyArray_DATA(scratch)
    blas.enter()
    with nogil:
        run(attention_forward, a, slices)
    blas.leave()
    return out, cache


cdef double attention_flops(const Attention* a, double per_score):
    """Rough work, counting a score's exponential and its bookkeeping as some 60 flops."""
    return <double> a.batch * a.n_heads * a.t_q * a.t_k * (per_score * a.d_head + 60.0) * (0.6 if a.causal else 1.0)


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
    cdef int slices = blas.product_slices(attention_flops(&a, 10.0), True)
    scratch = empty_vector(slices * attention_scratch(&a))
    a.scratch = <float*> cnp.PyArray_DATA(scratch)
    blas.enter()
    with nogil:
        run(attention_backward_, &a, slices)
    blas.leave()
    return d_q, d_k, d_v
