# New arrays from recycled memory (memory.pyx says why).

cdef object empty_matrix(Py_ssize_t rows, Py_ssize_t columns)   # float32, C-contiguous, not initialised
cdef object empty_vector(Py_ssize_t size)                       # float32, not initialised
cdef object matrix_view(object base, float* data, Py_ssize_t rows, Py_ssize_t columns, Py_ssize_t stride)
