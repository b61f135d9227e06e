# cython: language_level=3, cdivision=True, auto_pickle=False
"""Softmax cross-entropy. Nothing as wide as the vocabulary is stored: the backward starts from the logits again."""

cimport cython
from libc.math cimport log
from libc.string cimport memset

import numpy as np

cimport numpy as cnp

from toy._kernels.arrays cimport (
    ANY, Matrix, check_cache, check_filled, get_integers, get_matrix, integers_data, new_matrix,
)
from toy._kernels.memory cimport empty_matrix, empty_vector
from toy._kernels.threads cimport run, slice_start, slices_for

cnp.import_array()

__all__ = ["cross_entropy", "cross_entropy_backward"]    # cross_entropy_gradient is a part of an op

cdef extern from "simd_math.h" nogil:
    float toy_exp(float x)
    float toy_row_max(const float* x, Py_ssize_t n)
    double toy_row_sum_exp(const float* x, float shift, Py_ssize_t n)

cdef double COST = 0.6    # rough nanoseconds an element on one core


cdef void cross_entropy_forward(void* args, int ith, int nth) noexcept nogil:
    cdef CrossEntropy* a = <CrossEntropy*> args
    cdef Py_ssize_t i, j
    cdef const float* logits
    cdef const float* targets
    cdef float largest
    cdef double total, log_total, loss, weight
    for i in range(slice_start(a.rows, 1, ith, nth), slice_start(a.rows, 1, ith + 1, nth)):
        logits = a.logits + i * a.logits_stride
        a.losses[i] = 0.0
        a.largest[i] = a.share[i] = 0.0
        if a.labels != NULL and a.labels[i] < 0:
            continue
        largest = toy_row_max(logits, a.columns)
        total = toy_row_sum_exp(logits, largest, a.columns)
        log_total = log(total)
        # kept apart, not as one number: with large logits their sum would have no digits left for the logarithm
        a.largest[i] = largest
        if a.labels != NULL:
            a.losses[i] = log_total - (logits[a.labels[i]] - largest)
            a.share[i] = <float> (1.0 / total)
        else:
            targets = a.targets + i * a.targets_stride
            loss = weight = 0.0
            for j in range(a.columns):
                loss += targets[j] * (log_total - (logits[j] - largest))
                weight += targets[j]
            a.losses[i] = loss
            a.share[i] = <float> (weight / total)    # the targets of a row need not sum to 1


cdef void cross_entropy_backward_(void* args, int ith, int nth) noexcept nogil:
    cdef CrossEntropy* a = <CrossEntropy*> args
    cdef Py_ssize_t i, j
    cdef const float* logits
    cdef const float* targets
    cdef float* d_logits
    cdef float largest, factor, scale = a.scale
    for i in range(slice_start(a.rows, 1, ith, nth), slice_start(a.rows, 1, ith + 1, nth)):
        logits = a.logits + i * a.logits_stride
        d_logits = a.d_logits + i * a.d_logits_stride
        largest = a.largest[i]
        if a.labels != NULL and a.labels[i] < 0:
            memset(d_logits, 0, a.columns * sizeof(float))
            continue
        factor = scale * a.share[i]
        if a.labels == NULL:
            targets = a.targets + i * a.targets_stride
            for j in range(a.columns):
                d_logits[j] = factor * toy_exp(logits[j] - largest) - scale * targets[j]
        else:
            for j in range(a.columns):
                d_logits[j] = factor * toy_exp(logits[j] - largest)
            d_logits[a.labels[i]] -= scale


FORM = "cross_entropy: logits (N, V), labels int (N,) in -1 .. V-1, or float32 rows (N, V)"


@cython.final
@cython.freelist(16)
cdef class CrossEntropyCache:
    """The logits themselves (no copy: leave them as they are until the backward), a copy of the labels, two numbers a
    row."""

    cdef object logits, labels, largest, share
    cdef CrossEntropy args


cdef tuple prepared(logits, labels):
    """-> the cache of `cross_entropy` with everything but its results, and the array that its losses point to."""
    cdef CrossEntropyCache cache = CrossEntropyCache.__new__(CrossEntropyCache)
    cdef CrossEntropy* a = &cache.args
    cdef Matrix logits_, targets_
    get_matrix(&logits_, logits, "logits", ANY, ANY, FORM)
    a.rows, a.columns, a.logits, a.logits_stride = logits_.rows, logits_.columns, logits_.data, logits_.stride
    if a.columns == 0:
        raise ValueError(f"logits: have shape {logits.shape}, expected at least one column. {FORM}")
    if isinstance(labels, np.ndarray) and labels.ndim == 1:
        cache.labels = get_integers(labels, "labels", a.rows, -1, a.columns, FORM)
        a.labels, a.targets = integers_data(cache.labels), NULL
    else:
        get_matrix(&targets_, labels, "labels", a.rows, a.columns, FORM)
        cache.labels = empty_matrix(a.rows, a.columns)    # a copy, as of whole numbers: the caller may reuse the array
        cache.labels[...] = labels
        get_matrix(&targets_, cache.labels, "labels", a.rows, a.columns, FORM)
        a.labels, a.targets, a.targets_stride = NULL, targets_.data, targets_.stride
    cache.logits = logits
    cache.largest, cache.share = empty_vector(a.rows), empty_vector(a.rows)
    a.largest, a.share = <float*> cnp.PyArray_DATA(cache.largest), <float*> cnp.PyArray_DATA(cache.share)
    losses = np.empty(a.rows)
    a.losses = <double*> cnp.PyArray_DATA(losses)
    return cache, losses


def cross_entropy(logits, labels):
    """Mean of -log softmax(logits)[label].

    logits: (N, V). labels: int (N,) with -1 = this row is not counted, or float32 rows (N, V) (a distribution per row;
    a row of zeros is not counted). Returns (loss as a Python float, cache); the loss of no counted row is 0.
    The cache refers to `logits`: do not change them before the backward.
    """
    cdef CrossEntropyCache cache
    cdef CrossEntropy* a
    cdef Py_ssize_t i, n_counted = 0
    cdef double loss = 0.0
    cache, losses = prepared(logits, labels)
    a = &cache.args
    with nogil:
        run(cross_entropy_forward, a, slices_for(COST * a.rows * a.columns, True))
        for i in range(a.rows):
            loss += a.losses[i]
    if a.labels != NULL:
        for i in range(a.rows):
            n_counted += a.labels[i] >= 0
    else:
        n_counted = np.count_nonzero(np.any(labels != 0, axis=1))
    a.scale = <float> (1.0 / max(n_counted, 1))
    return loss / max(n_counted, 1), cache


def cross_entropy_backward(cache):
    """-> d_logits (N, V): softmax - one_hot(label), divided by the number of counted rows; 0 in rows not counted."""
    check_cache(cache, CrossEntropyCache, "cross_entropy")
    cdef CrossEntropyCache saved = <CrossEntropyCache> cache
    cdef CrossEntropy args = saved.args
    cdef Matrix d_logits_, logits_
    check_filled(saved.share, "cross_entropy")
    # once more: an array can be given another shape or other memory between the two
    get_matrix(&logits_, saved.logits, "the cache's logits", args.rows, args.columns, FORM)
    args.logits, args.logits_stride = logits_.data, logits_.stride
    d_logits = new_matrix(&d_logits_, args.rows, args.columns)
    args.d_logits, args.d_logits_stride = d_logits_.data, d_logits_.stride
    with nogil:
        run(cross_entropy_backward_, &args, slices_for(COST * args.rows * args.columns, True))
    return d_logits


def cross_entropy_gradient(logits, labels, double scale, bint backward=True):
    """The sum of -log softmax(logits)[label] over the rows that count, a float; the logits become scale times its gradient.

    logits: float32 (N, V), overwritten unless backward is False. labels: as for `cross_entropy`.
    """
    cdef CrossEntropyCache cache
    cdef CrossEntropy args
    cdef Py_ssize_t i
    cdef double loss = 0.0
    cache, losses = prepared(logits, labels)
    args = cache.args
    if backward and not logits.flags.writeable:
        raise ValueError(f"logits: are read-only, and their gradient is to take their place. {FORM}")
    with nogil:
        run(cross_entropy_forward, &args, slices_for(COST * args.rows * args.columns, True))
        for i in range(args.rows):
            loss += args.losses[i]
        if backward:
            args.scale = <float> scale
            args.d_logits, args.d_logits_stride = <float*> args.logits, args.logits_stride
            run(cross_entropy_backward_, &args, slices_for(COST * args.rows * args.columns, True))
    return loss
