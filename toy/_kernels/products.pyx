# cython: language_level=3, cdivision=True
"""Matrix products in float32 or with operands rounded to bfloat16 (product_bf16.h), and which of these there is here.

A precision is a number that Python code asks for once (`F32`, `bf16()`) and hands to every product of an engine.
"""

import os

import numpy as np

from toy._kernels cimport blas
from toy._kernels.arrays cimport ANY, Matrix, get_matrix
from toy._kernels.threads cimport slices_for

cdef extern from "product_bf16.h" nogil:
    enum:
        TOY_BF16_NONE
        TOY_BF16_AMX
        TOY_BF16_AVX512
        TOY_BF16_PORTABLE
    ctypedef struct toy_bf16_operand:
        const float* data
        Py_ssize_t line_stride, k_stride
    int toy_bf16_has(int way)
    int toy_bf16_avx512_pays()
    float toy_bf16_widened(unsigned short x)
    unsigned short toy_bf16_rounded(float x)
    void toy_bf16_product(int way, Py_ssize_t m, Py_ssize_t n, Py_ssize_t k, toy_bf16_operand a, toy_bf16_operand b,
                          int adds, float* c, Py_ssize_t ldc)

F32 = TOY_BF16_NONE
# by name: how products of bfloat16 can be computed
WAYS = {"AMX": TOY_BF16_AMX, "AVX512-BF16": TOY_BF16_AVX512, "portable": TOY_BF16_PORTABLE}
cdef double FLOPS_PER_NANOSECOND = 300.0    # of one core: rough

cdef int[4] there = [1, -1, -1, -1]    # by way: whether it is there, -1 where nobody has asked; the answer never changes


cdef void multiply_nt(int precision, Py_ssize_t m, Py_ssize_t n, Py_ssize_t k, const float* a, Py_ssize_t lda,
                      const float* b, Py_ssize_t ldb, float beta, float* c, Py_ssize_t ldc) noexcept nogil:
    if precision == TOY_BF16_NONE:
        blas.multiply_nt(m, n, k, a, lda, b, ldb, beta, c, ldc)
    else:
        toy_bf16_product(precision, m, n, k, along_k(a, lda), along_k(b, ldb), beta != 0, c, ldc)


cdef void multiply_nn(int precision, Py_ssize_t m, Py_ssize_t n, Py_ssize_t k, const float* a, Py_ssize_t lda,
                      const float* b, Py_ssize_t ldb, float beta, float* c, Py_ssize_t ldc) noexcept nogil:
    if precision == TOY_BF16_NONE:
        blas.multiply_nn(m, n, k, a, lda, b, ldb, beta, c, ldc)
    else:
        toy_bf16_product(precision, m, n, k, along_k(a, lda), across_k(b, ldb), beta != 0, c, ldc)


cdef void multiply_tn(int precision, Py_ssize_t m, Py_ssize_t n, Py_ssize_t k, const float* a, Py_ssize_t lda,
                      const float* b, Py_ssize_t ldb, float beta, float* c, Py_ssize_t ldc) noexcept nogil:
    if precision == TOY_BF16_NONE:
        blas.multiply_tn(m, n, k, a, lda, b, ldb, beta, c, ldc)
    else:
        toy_bf16_product(precision, m, n, k, across_k(a, lda), across_k(b, ldb), beta != 0, c, ldc)


cdef inline toy_bf16_operand along_k(const float* data, Py_ssize_t stride) noexcept nogil:
    cdef toy_bf16_operand operand
    operand.data, operand.line_stride, operand.k_stride = data, stride, 1
    return operand


cdef inline toy_bf16_operand across_k(const float* data, Py_ssize_t stride) noexcept nogil:
    cdef toy_bf16_operand operand
    operand.data, operand.line_stride, operand.k_stride = data, 1, stride
    return operand


cdef int product_slices(int precision, double flops):
    if precision == TOY_BF16_NONE:
        return blas.product_slices(flops, False)
    return slices_for(flops / FLOPS_PER_NANOSECOND, False)


cdef int checked(object precision) except -1:
    cdef int way = precision
    if not 0 <= way <= TOY_BF16_PORTABLE or not is_there(way):
        raise ValueError(f"precision: is {precision!r}, expected F32 or what bf16() gives")
    return way


cdef bint is_there(int way):
    if there[way] < 0:
        there[way] = toy_bf16_has(way)
    return there[way]


def has(name):
    """Whether products of bfloat16 can be computed here in that way of `WAYS`, fast or not."""
    return is_there(WAYS[name])


def bf16_name():
    """How this processor multiplies bfloat16 faster than float32: "AMX", "AVX512-BF16", or None where it does not.

    AVX512-BF16 counts on AMD's processors alone: on Intel's one such instruction takes the time of two float32 ones, so that
    nothing is left of its twice as many products after the rounding. The variable TOY_BF16, for tests, names a way of `WAYS`
    to take in place of that. Raises ValueError when it names none, or one that is not there.
    """
    name = os.environ.get("TOY_BF16", "")
    if name:
        if name not in WAYS or not has(name):
            there_are = ", ".join(way for way in WAYS if has(way))
            raise ValueError(f"the variable TOY_BF16 is {name!r}, and this machine has {there_are}: correct it or unset it")
        return name
    if has("AMX"):
        return "AMX"
    return "AVX512-BF16" if has("AVX512-BF16") and toy_bf16_avx512_pays() else None


def bf16():
    """The precision with which products of bfloat16 are computed here, None where the processor has none (`bf16_name`)."""
    name = bf16_name()
    return None if name is None else WAYS[name]


def rounded(x):
    """x, float32 (N, D), with every number rounded to the nearest bfloat16, ties to even: a new array."""
    cdef Matrix x_, y_
    cdef Py_ssize_t i, j
    get_matrix(&x_, x, "x", ANY, ANY, "rounded: x (N, D)")
    y = np.empty((x_.rows, x_.columns), np.float32)
    get_matrix(&y_, y, "y", x_.rows, x_.columns, "rounded: y (N, D)")
    for i in range(x_.rows):
        for j in range(x_.columns):
            y_.data[i * y_.stride + j] = toy_bf16_widened(toy_bf16_rounded(x_.data[i * x_.stride + j]))
    return y


def multiply(form, a, b, c, precision, bint add=False):
    """c (m, n), written, or with `add` added to: of "nt" a (m, k) b (n, k)^T, of "nn" a (m, k) b (k, n), of "tn"
    a (k, m)^T b (k, n). In this thread alone."""
    cdef Matrix a_, b_, c_
    cdef int way = checked(precision)
    cdef Py_ssize_t k
    if form not in ("nt", "nn", "tn"):
        raise ValueError(f"form: is {form!r}, expected 'nt', 'nn' or 'tn'")
    shapes = f"multiply, {form}"
    get_matrix(&c_, c, "c", ANY, ANY, shapes)
    if not c.flags.writeable:
        raise ValueError("c: is read-only, but the product is written into it")
    get_matrix(&a_, a, "a", ANY if form == "tn" else c_.rows, c_.rows if form == "tn" else ANY, shapes)
    k = a_.rows if form == "tn" else a_.columns
    get_matrix(&b_, b, "b", c_.columns if form == "nt" else k, k if form == "nt" else c_.columns, shapes)
    blas.enter()
    if form == "nt":
        multiply_nt(way, c_.rows, c_.columns, k, a_.data, a_.stride, b_.data, b_.stride, add, c_.data, c_.stride)
    elif form == "nn":
        multiply_nn(way, c_.rows, c_.columns, k, a_.data, a_.stride, b_.data, b_.stride, add, c_.data, c_.stride)
    else:
        multiply_tn(way, c_.rows, c_.columns, k, a_.data, a_.stride, b_.data, b_.stride, add, c_.data, c_.stride)
    blas.leave()
