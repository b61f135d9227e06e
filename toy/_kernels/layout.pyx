# cython: language_level=3, cdivision=True
"""How numbers lie in matrices: columns cut out and put together, rows regrouped. Nothing is computed here."""

from libc.limits cimport INT_MAX
from libc.string cimport memset

import numpy as np

cimport numpy as cnp

from toy._kernels.arrays cimport ANY, Matrix, get_count, get_matrix, new_matrix
from toy._kernels.memory cimport matrix_view

cnp.import_array()

__all__ = ["concat", "reshape", "split", "zeros_like"]


def split(x, widths):
    """Cut the columns of x (N, sum(widths)) into matrices (N, w) for w in widths (views, nothing is copied)."""
    cdef Matrix m
    cdef Py_ssize_t start = 0, width
    get_matrix(&m, x, "x", ANY, ANY, "split: x (N, sum of widths)")
    if not isinstance(widths, (list, tuple)):
        raise ValueError(f"widths: expected a list of whole numbers, given a {type(widths).__name__}")
    parts = []
    for given in widths:
        width = get_count(given, f"one of the widths {widths}", -INT_MAX, INT_MAX, "split: x (N, sum of widths)")
        if width < 0 or start + width > m.columns:
            break
        parts.append(matrix_view(x, m.data + start, m.rows, width, m.stride))
        start += width
    if start != m.columns or len(parts) != len(widths):
        raise ValueError(f"split: widths {list(widths)} do not add up to the {m.columns} columns of x, shape {x.shape}")
    return tuple(parts)


def concat(parts):
    """Put matrices (N, w_i) side by side -> (N, sum w_i). The backward of `split`.

    Matrices that already lie side by side in one matrix of just that width (the results of `attention_backward`) are
    not copied: that matrix is returned.
    """
    cdef Matrix first, m, whole
    cdef Py_ssize_t width = 0
    cdef bint adjacent = True
    if not isinstance(parts, (list, tuple)) or not len(parts):
        given = "is empty" if isinstance(parts, (list, tuple)) else f"is a {type(parts).__name__}"
        raise ValueError(f"concat: parts {given}, expected a list of at least one matrix")
    get_matrix(&first, parts[0], "parts", ANY, ANY, "concat: matrices (N, w_i)")
    base = parts[0].base
    for part in parts:
        get_matrix(&m, part, "parts", first.rows, ANY, "concat: matrices (N, w_i)")
        adjacent = adjacent and part.base is base and m.stride == first.stride and m.data == first.data + width
        width += m.columns
    if adjacent and cnp.PyArray_Check(base) and base.dtype == np.float32 and base.shape == (first.rows, width):
        get_matrix(&whole, base, "parts", first.rows, width, "concat: matrices (N, w_i)")
        if whole.data == first.data and (whole.stride == first.stride or first.rows <= 1):
            return base
    return np.concatenate(parts, axis=1)


def reshape(x, rows):
    """The numbers of x (N, D) row after row as (rows, N*D/rows): a view if x is C-contiguous, else of a copy.

    Its backward is the same op, with the rows that x had.
    """
    cdef Matrix m
    get_matrix(&m, x, "x", ANY, ANY, "reshape: x (N, D), rows a divisor of N*D")
    cdef Py_ssize_t n = get_count(rows, "rows", -INT_MAX, INT_MAX, "reshape: x (N, D), rows a divisor of N*D")
    if n < 1 or m.rows * m.columns % n:
        raise ValueError(f"rows: is {rows}, expected a divisor of the {m.rows * m.columns} numbers of x, shape {x.shape}")
    return x.reshape(n, m.rows * m.columns // n)


def zeros_like(x):
    """Zeros in the shape of x (N, D)."""
    cdef Matrix m, zeros
    get_matrix(&m, x, "x", ANY, ANY, "zeros_like: x (N, D)")
    array = new_matrix(&zeros, m.rows, m.columns)
    memset(zeros.data, 0, m.rows * m.columns * sizeof(float))
    return array
