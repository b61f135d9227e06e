# cython: language_level=3, cdivision=True
"""Checks of the arrays that come in from Python: the kernels get bare pointers, so whatever is wrong is caught here."""

from cpython.long cimport PyLong_AsLongAndOverflow
from libc.limits cimport INT_MAX
cimport numpy as cnp
import numpy as np

from toy._kernels.memory cimport empty_matrix

cnp.import_array()


cdef object describe(object shape):
    sizes = ["any" if size == ANY else str(size) for size in shape]
    return f"({sizes[0]},)" if len(sizes) == 1 else f"({', '.join(sizes)})"


cdef int fail(object array, object name, object expected_shape, object problem, object form) except -1:
    expected = describe(expected_shape) if expected_shape is not None else "any"
    given = getattr(array, "shape", None)
    raise ValueError(f"{name}: {problem}. Given shape {given}, expected {expected} float32. {form}")


cdef int check_kind(object array, object name, object expected_shape, object form) except -1:
    """An aligned float32 array in native byte order."""
    if not cnp.PyArray_Check(array):
        problem = f"is a {type(array).__name__}, not a numpy array (numpy.asarray makes one)"
        fail(array, name, expected_shape, problem, form)
    if is_masked(array):
        fail(array, name, expected_shape, MASKED, form)
    if cnp.PyArray_TYPE(array) != cnp.NPY_FLOAT32:
        problem = (
            f"has dtype {array.dtype}, but the compiled kernels compute in float32 only: "
            "convert it with .astype(numpy.float32), or use backend 'numpy' for float64"
        )
        fail(array, name, expected_shape, problem, form)
    if not cnp.PyArray_ISBEHAVED_RO(array):  # aligned and in native byte order
        problem = "is misaligned or in foreign byte order: pass a copy, numpy.array(a, numpy.float32)"
        fail(array, name, expected_shape, problem, form)
    return 0


MASKED = "is a masked array, whose mask would be lost: pass numpy.ma.filled(a, value)"


cdef bint is_masked(object array) except -1:
    return not cnp.PyArray_CheckExact(array) and isinstance(array, np.ma.MaskedArray)


cdef inline bint is_plain_float32(object array):
    """The same question without the reasons: the usual case, a few nanoseconds."""
    return (
        cnp.PyArray_CheckExact(array)
        and cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT32
        and cnp.PyArray_ISBEHAVED_RO(array)
    )


cdef int check_writable(object array, object name, object expected_shape, object form) except -1:
    if not cnp.PyArray_ISWRITEABLE(array):
        problem = "is read-only, but the result is written into it: pass a writable array"
        fail(array, name, expected_shape, problem, form)
    return 0


cdef int get_matrix(Matrix* out, object array, object name, Py_ssize_t rows, Py_ssize_t columns, object form) except -1:
    if not is_plain_float32(array):
        check_kind(array, name, (rows, columns), form)
    if cnp.PyArray_NDIM(array) != 2:
        fail(array, name, (rows, columns), f"has {cnp.PyArray_NDIM(array)} axes, not 2", form)
    cdef cnp.npy_intp* shape = cnp.PyArray_DIMS(array)
    cdef cnp.npy_intp* strides = cnp.PyArray_STRIDES(array)
    if (rows != ANY and shape[0] != rows) or (columns != ANY and shape[1] != columns):
        fail(array, name, (rows, columns), "has the wrong shape", form)
    if shape[0] > INT_MAX or shape[1] > INT_MAX:
        problem = "has an axis longer than 2**31 - 1, which BLAS cannot count: use smaller batches"
        fail(array, name, (rows, columns), problem, form)
    out.data = <float*> cnp.PyArray_DATA(array)
    out.rows = shape[0]
    out.columns = shape[1]
    # the stride of an axis of length 1 (or of an empty array) says nothing: numpy may put anything there
    if shape[0] <= 1 or shape[1] == 0:
        out.stride = max(1, shape[1])
    elif strides[0] % 4 == 0 and strides[0] >= shape[1] * 4 and strides[0] // 4 <= INT_MAX:
        out.stride = strides[0] // 4
    else:
        fail(array, name, (rows, columns), f"has strides {array.strides} bytes: {CONTIGUOUS_ROWS}", form)
    if shape[1] > 1 and shape[0] > 0 and strides[1] != 4:
        fail(array, name, (rows, columns), f"has strides {array.strides} bytes: {CONTIGUOUS_ROWS}", form)
    return 0


CONTIGUOUS_ROWS = "each row must be contiguous and rows must not overlap; pass numpy.ascontiguousarray(a)"


cdef int get_weight(Matrix* out, object array, object name, Py_ssize_t rows, Py_ssize_t columns, object form) except -1:
    get_matrix(out, array, name, rows, columns, form)
    if out.stride != max(1, out.columns):
        fail(array, name, (rows, columns), "is not C-contiguous: pass numpy.ascontiguousarray(a)", form)
    return 0


cdef int get_weight_gradient(
    Matrix* out, object array, object name, Py_ssize_t rows, Py_ssize_t columns, object form
) except -1:
    get_weight(out, array, name, rows, columns, form)
    check_writable(array, name, (rows, columns), form)
    return 0


cdef float* get_vector(object array, object name, Py_ssize_t size, object form) except? NULL:
    if not is_plain_float32(array):
        check_kind(array, name, (size,), form)
    if cnp.PyArray_NDIM(array) != 1 or (size != ANY and cnp.PyArray_DIM(array, 0) != size):
        fail(array, name, (size,), "has the wrong shape", form)
    if not cnp.PyArray_IS_C_CONTIGUOUS(array):
        fail(array, name, (size,), "is not contiguous: pass numpy.ascontiguousarray(a)", form)
    return <float*> cnp.PyArray_DATA(array)


cdef float* get_vector_gradient(object array, object name, Py_ssize_t size, object form) except? NULL:
    cdef float* data = get_vector(array, name, size, form)
    check_writable(array, name, (size,), form)
    return data


cdef float* get_flat(object array, object name, object like, bint writable, Py_ssize_t* size, object form) except? NULL:
    expected = None if like is None else like.shape
    check_kind(array, name, expected, form)
    if like is not None and not cnp.PyArray_SAMESHAPE(array, like):
        fail(array, name, expected, "has the wrong shape", form)
    if not cnp.PyArray_IS_C_CONTIGUOUS(array):
        fail(array, name, expected, "is not C-contiguous: pass numpy.ascontiguousarray(a)", form)
    if writable:
        check_writable(array, name, expected, form)
    size[0] = cnp.PyArray_SIZE(array)
    return <float*> cnp.PyArray_DATA(array)


cdef object get_integers(object array, object name, Py_ssize_t size, Py_ssize_t low, Py_ssize_t high, object form):
    if not cnp.PyArray_Check(array) or not cnp.PyArray_ISINTEGER(array):
        given = f"dtype {array.dtype}" if isinstance(array, np.ndarray) else f"a {type(array).__name__}"
        raise ValueError(f"{name}: given {given}, expected a numpy array of integers, {describe((size,))}. {form}")
    if is_masked(array):
        raise ValueError(f"{name}: {MASKED}. {form}")
    if cnp.PyArray_NDIM(array) != 1 or (size != ANY and cnp.PyArray_DIM(array, 0) != size):
        raise ValueError(f"{name}: given shape {array.shape}, expected {describe((size,))} integers. {form}")
    # as int64 the upper half of uint64 would turn negative, its largest number into the label -1
    if array.dtype.kind == "u" and array.dtype.itemsize == 8 and array.max(initial=0) >= high:
        raise ValueError(f"{name}: element {array.argmax()} is {array.max()}, expected {low} to {high - 1}. {form}")
    cdef object integers = np.array(array, dtype=np.int64)
    cdef long long* data = integers_data(integers)
    cdef Py_ssize_t i
    for i in range(cnp.PyArray_DIM(integers, 0)):
        if data[i] < low or data[i] >= high:
            raise ValueError(f"{name}: element {i} is {data[i]}, expected {low} to {high - 1}. {form}")
    return integers


cdef long long* integers_data(object array) noexcept:
    return <long long*> cnp.PyArray_DATA(array)


cdef int refuse_shared(object written, object name, object other, object other_name, object form) except -1:
    if np.shares_memory(written, other):
        raise ValueError(f"{name} and {other_name} are the same memory, or overlap: pass arrays of their own. {form}")
    return 0


cdef bint is_one_number(object value) except -1:
    """Whether it is no array, or one without axes (and without a mask)."""
    return not isinstance(value, np.ndarray) or (value.ndim == 0 and not is_masked(value))


cdef Py_ssize_t get_count(object value, object name, Py_ssize_t low, Py_ssize_t high, object form) except? -1:
    cdef int overflow
    cdef long quick
    if type(value) is int:  # the usual case
        quick = PyLong_AsLongAndOverflow(value, &overflow)
        if not overflow and low <= quick <= high:
            return quick
    elif not isinstance(value, bool) and is_one_number(value):
        try:
            whole = value.__index__()
        except (AttributeError, TypeError):  # no whole number
            whole = low - 1
        if low <= whole <= high:
            return whole
    raise ValueError(f"{name}={value!r}, expected a whole number from {low} to {high}. {form}")


cdef double get_number(object value, object name, object form) except? -1.0:
    if isinstance(value, float):  # numpy.float64 too
        return value
    if is_one_number(value) and not isinstance(value, (str, bytes, bytearray, np.complexfloating)):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    raise ValueError(f"{name}={value!r}, expected a real number. {form}")


cdef int check_cache(object cache, type expected, object op) except -1:
    if type(cache) is not expected:
        raise ValueError(f"cache: expected the cache that {op} returned, given a {type(cache).__name__}")
    return 0


cdef int check_filled(object kept, object op) except -1:
    if kept is None:
        raise ValueError(f"cache: expected the cache that {op} returned, given an empty one")
    return 0


def check_matrix(array, name, rows, columns, form):
    """Raise ValueError unless `array` is a float32 matrix (rows, columns) that the kernels take; None: any size."""
    cdef Matrix matrix
    get_matrix(&matrix, array, name, ANY if rows is None else rows, ANY if columns is None else columns, form)


cdef object new_matrix(Matrix* out, Py_ssize_t rows, Py_ssize_t columns):
    array = empty_matrix(rows, columns)
    out.data = <float*> cnp.PyArray_DATA(array)
    out.rows, out.columns, out.stride = rows, columns, max(1, columns)
    return array
