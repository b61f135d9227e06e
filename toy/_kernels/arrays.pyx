# cython: language_level=3, cdivision=True
"""Checks of the arrays that come in from Python: the kernels get bare pointers, so whatever is wrong is caught here."""

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


cdef inline bint is_plain_float32(object array):
    """The same question without the reasons: the usual case, a few nanoseconds."""
    return (
        cnp.PyArray_Check(array)
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
    if cnp.PyArray_NDIM(array) != 1 or (size != ANY and cnp.PyArray_DIM(array, 0) != size):
        raise ValueError(f"{name}: given shape {array.shape}, expected {describe((size,))} integers. {form}")
    cdef object integers = np.array(array, dtype=np.int64)
    cdef long long* data = integers_data(integers)
    cdef Py_ssize_t i
    for i in range(cnp.PyArray_DIM(integers, 0)):
        if data[i] < low or data[i] >= high:
            raise ValueError(f"{name}: element {i} is {data[i]}, expected {low} to {high - 1}. {form}")
    return integers


cdef long long* integers_data(object array) noexcept:
    return <long long*> cnp.PyArray_DATA(array)


cdef int check_cache(object cache, type expected, object op) except -1:
    if type(cache) is not expected:
        raise ValueError(f"cache: expected the cache that {op} returned, given a {type(cache).__name__}")
    return 0


cdef object new_matrix(Matrix* out, Py_ssize_t rows, Py_ssize_t columns):
    array = empty_matrix(rows, columns)
    out.data = <float*> cnp.PyArray_DATA(array)
    out.rows, out.columns, out.stride = rows, columns, max(1, columns)
    return array
