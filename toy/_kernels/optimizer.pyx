# cython: language_level=3, cdivision=True
"""AdamW in one pass over memory, and the sum of squares that gradient clipping needs."""

cimport cython
from libc.math cimport sqrtf

import numpy as np

cimport numpy as cnp

from toy._kernels.arrays cimport Span, check_apart, get_flat, get_number, vector_span
from toy._kernels.threads cimport run, slice_start, slices_for

cnp.import_array()

__all__ = ["adamw_step", "sum_of_squares"]

cdef extern from "simd_math.h" nogil:
    double toy_sum_of_squares(const float* x, Py_ssize_t n)

cdef double ADAMW_COST = 0.6    # rough nanoseconds an element on one core
cdef double PASS_COST = 0.15


cdef void adamw_update(void* args, int ith, int nth) noexcept nogil:
    cdef AdamW* a = <AdamW*> args
    cdef float* weight = a.weight
    cdef const float* gradient = a.gradient
    cdef float* m = a.m
    cdef float* v = a.v
    cdef float one = 1.0
    cdef float lr = a.lr, beta1 = a.beta1, beta2 = a.beta2, eps = a.eps, s5 = a.s5, s6 = a.s6, factor = a.factor
    cdef float new1 = one - beta1, new2 = one - beta2, keep = one - lr * a.weight_decay
    cdef float g, m_i, v_i
    cdef Py_ssize_t i
    for i in range(slice_start(a.size, 16, ith, nth), slice_start(a.size, 16, ith + 1, nth)):
        g = factor * gradient[i]
        m_i = beta1 * m[i] + new1 * g
        v_i = beta2 * v[i] + new2 * g * g
        m[i] = m_i
        v[i] = v_i
        weight[i] = weight[i] * keep - lr * (m_i * s5) / (sqrtf(v_i * s6) + eps)


cdef void sum_of_squares_flat(void* args, int ith, int nth) noexcept nogil:
    cdef Flat* a = <Flat*> args
    cdef Py_ssize_t blocks = (a.size + SQUARES_BLOCK - 1) // SQUARES_BLOCK, i
    for i in range(slice_start(blocks, 1, ith, nth), slice_start(blocks, 1, ith + 1, nth)):
        a.partials[i] = toy_sum_of_squares(a.x + i * SQUARES_BLOCK, min(SQUARES_BLOCK, a.size - i * SQUARES_BLOCK))


FORM = "adamw_step: weight, gradient, m and v of one shape, hp of shape (1, 7) or (7,), factor a number"


def adamw_step(weight, gradient, m, v, hp, factor=None):
    """One AdamW update (Loshchilov & Hutter 2019, algorithm 2), in place on weight, m and v; all of one shape.

    hp: the seven numbers [lr, beta1, beta2, eps, weight_decay, s5, s6] of `toy.AdamW`, shape (1, 7) or (7,). factor: what
    clipping multiplies the gradient by, None = 1.
    """
    cdef AdamW a
    a.weight = get_flat(weight, "weight", None, True, &a.size, FORM)
    a.gradient = get_flat(gradient, "gradient", weight, False, &a.size, FORM)
    a.m = get_flat(m, "m", weight, True, &a.size, FORM)
    a.v = get_flat(v, "v", weight, True, &a.size, FORM)
    numbers = np.asanyarray(hp)
    if isinstance(numbers, np.ma.MaskedArray) or numbers.dtype.kind not in "fiu":
        raise ValueError(f"hp: is a {type(hp).__name__} of {numbers.dtype}, expected seven real numbers. {FORM}")
    if numbers.size != 7:
        raise ValueError(f"hp: has shape {numbers.shape}, expected (1, 7) or (7,). {FORM}")
    numbers = np.ascontiguousarray(numbers, dtype=np.float32)
    cdef Py_ssize_t n_bytes = a.size * sizeof(float)
    cdef Span of_weight = vector_span(a.weight, n_bytes), of_gradient = vector_span(a.gradient, n_bytes)
    cdef Span of_m = vector_span(a.m, n_bytes), of_v = vector_span(a.v, n_bytes)
    check_apart(of_weight, weight, "weight", of_gradient, gradient, "gradient", FORM)
    check_apart(of_weight, weight, "weight", of_m, m, "m", FORM)
    check_apart(of_weight, weight, "weight", of_v, v, "v", FORM)
    check_apart(of_m, m, "m", of_gradient, gradient, "gradient", FORM)
    check_apart(of_m, m, "m", of_v, v, "v", FORM)
    check_apart(of_v, v, "v", of_gradient, gradient, "gradient", FORM)
    cdef float* row = <float*> cnp.PyArray_DATA(numbers)
    a.lr, a.beta1, a.beta2, a.eps, a.weight_decay, a.s5, a.s6 = row[0], row[1], row[2], row[3], row[4], row[5], row[6]
    a.factor = 1.0 if factor is None else <float> get_number(factor, "factor", FORM)
    with nogil:
        run(adamw_update, &a, slices_for(ADAMW_COST * a.size, True))


def sum_of_squares(x):
    """Sum of x^2 over all elements, added up in double precision; x: C-contiguous, any shape -> float.

    The bits do not depend on the number of threads.
    """
    cdef Flat a
    cdef double total = 0.0
    cdef Py_ssize_t i, blocks
    cdef double[64] few
    a.x = get_flat(x, "x", None, False, &a.size, "sum_of_squares: x of any shape")
    blocks = (a.size + SQUARES_BLOCK - 1) // SQUARES_BLOCK
    a.partials = few
    if blocks > 64:
        partials = np.empty(blocks)
        a.partials = <double*> cnp.PyArray_DATA(partials)
    with nogil:
        run(sum_of_squares_flat, &a, slices_for(PASS_COST * a.size, True))
        for i in range(blocks):
            total += a.partials[i]
    return total
