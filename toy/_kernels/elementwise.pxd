# Elementwise kernels: GELU, SiLU, SwiGLU and the residual add.

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

# args: Elementwise*; slice: a band of columns when rows == 1, else a band of rows
cdef void add_forward(void* args, int ith, int nth) noexcept nogil        # out = a + b
cdef void gelu_forward(void* args, int ith, int nth) noexcept nogil       # out = gelu(a)
cdef void gelu_backward_(void* args, int ith, int nth) noexcept nogil     # out = d_y gelu'(a)
cdef void silu_forward(void* args, int ith, int nth) noexcept nogil       # out = silu(a)
cdef void silu_backward_(void* args, int ith, int nth) noexcept nogil     # out = d_y silu'(a)
cdef void swiglu_forward(void* args, int ith, int nth) noexcept nogil     # out = silu(a) b
cdef void swiglu_backward_(void* args, int ith, int nth) noexcept nogil   # out = d_y b silu'(a), out2 = d_y silu(a)
