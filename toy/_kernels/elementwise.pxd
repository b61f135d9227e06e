# Elementwise kernels: GELU, SiLU, SwiGLU, the residual add and scaling.

from toy._kernels.threads cimport Kernel

# every matrix is (rows, columns), its rows `*_stride` elements apart; unused pointers are NULL
cdef struct Elementwise:
    Py_ssize_t rows, columns
    const float* a
    Py_ssize_t a_stride
    const float* b
    Py_ssize_t b_stride
    const float* d_y
    Py_ssize_t d_y_stride
    float* out
    Py_ssize_t out_stride
    float* out2
    Py_ssize_t out2_stride
    float factor

# The kernel of that name: an op of elementwise.pyx ("gelu": out = gelu(a)) or its backward ("gelu_backward": out = the
# gradient of a, out2 = that of b). ValueError for another name.
# args: Elementwise*; slice: a band of columns when rows == 1, else a band of rows
cdef Kernel elementwise_kernel(object name) except NULL
