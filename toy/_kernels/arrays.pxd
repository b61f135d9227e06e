# Checked access to numpy arrays: nothing takes a pointer without one of these.
#
# `form` is one line that says how the shapes of the op fit together, for the error message.

cdef enum:
    ANY = -1    # in place of a size: any size will do

cdef struct Matrix:
    float* data
    Py_ssize_t rows
    Py_ssize_t columns
    Py_ssize_t stride    # elements from the start of a row to the start of the next

# float32, 2-d, last axis contiguous, rows not overlapping (columns cut out of a wider matrix are fine), sizes < 2**31
cdef int get_matrix(Matrix* out, object array, object name, Py_ssize_t rows, Py_ssize_t columns, object form) except -1
# float32, C-contiguous: parameters
cdef int get_weight(Matrix* out, object array, object name, Py_ssize_t rows, Py_ssize_t columns, object form) except -1
cdef float* get_vector(object array, object name, Py_ssize_t size, object form) except? NULL
# the same, and writable: gradients, which are added to in place
cdef int get_weight_gradient(
    Matrix* out, object array, object name, Py_ssize_t rows, Py_ssize_t columns, object form
) except -1
cdef float* get_vector_gradient(object array, object name, Py_ssize_t size, object form) except? NULL
# What is written must not overlap what is read, or another result: in which order slices run is not fixed. A span is the
# memory from the first number of an array to after its last one; arrays of overlapping spans are looked at more closely.
cdef struct Span:
    const char* start
    const char* end

cdef inline Span no_span() noexcept nogil:    # of an array that is not given
    return Span(NULL, NULL)

cdef inline Span matrix_span(const Matrix* m) noexcept nogil:
    if m.rows == 0 or m.columns == 0:
        return no_span()
    return Span(<const char*> m.data, <const char*> (m.data + (m.rows - 1) * m.stride + m.columns))

cdef inline Span vector_span(const void* data, Py_ssize_t n_bytes) noexcept nogil:
    return Span(<const char*> data, <const char*> data + n_bytes)

cdef inline int check_apart(
    Span a, object written, object name, Span b, object other, object other_name, object form
) except -1:
    if b.start < a.end and a.start < b.end:
        refuse_shared(written, name, other, other_name, form)
    return 0

cdef int refuse_shared(object written, object name, object other, object other_name, object form) except -1
# float32, any number of axes, C-contiguous; `like` is an array whose shape it must have, or None; *size: its elements
cdef float* get_flat(object array, object name, object like, bint writable, Py_ssize_t* size, object form) except? NULL
# An int64 copy of a 1-d array of any integer dtype: a copy, because backwards index with it and the caller may reuse
# the original. Every element is in low .. high-1, or a ValueError names the first that is not.
cdef object get_integers(object array, object name, Py_ssize_t size, Py_ssize_t low, Py_ssize_t high, object form)
cdef long long* integers_data(object array) noexcept

# A whole number in low .. high, and a real number, as numpy or Python may spell them; otherwise a ValueError with the name.
cdef Py_ssize_t get_count(object value, object name, Py_ssize_t low, Py_ssize_t high, object form) except? -1
cdef double get_number(object value, object name, object form) except? -1.0

# A backward must get its own forward's cache. `kept`: an array that every forward puts into it, None in an empty one.
cdef int check_cache(object cache, type expected, object op) except -1
cdef int check_filled(object kept, object op) except -1
cdef object new_matrix(Matrix* out, Py_ssize_t rows, Py_ssize_t columns)    # a new array for a result, not initialised
