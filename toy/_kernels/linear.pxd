# The product kernels. Strides are in elements, from one row to the next.
# Call them between blas.enter() and blas.leave().

cdef struct Linear:            # y = x W^T + b
    Py_ssize_t n, n_in, n_out
    int precision              # of the product, see products.pxd
    const float* x             # (n, n_in)
    Py_ssize_t x_stride
    const float* weight        # (n_out, n_in), contiguous
    const float* bias          # (n_out,) or NULL
    float* y                   # (n, n_out)
    Py_ssize_t y_stride

cdef struct LinearBackward:
    Py_ssize_t n, n_in, n_out
    int precision              # of the products, see products.pxd
    const float* d_y           # (n, n_out)
    Py_ssize_t d_y_stride
    const float* x             # (n, n_in)
    Py_ssize_t x_stride
    const float* weight        # (n_out, n_in), contiguous
    float* d_x                 # (n, n_in), written
    Py_ssize_t d_x_stride
    float* d_weight            # (n_out, n_in), contiguous; or NULL
    float* d_bias              # (n_out,); or NULL
    float beta                 # 1 adds to d_weight and d_bias, 0 overwrites them

# slice: rows of y when 2 n >= n_out, else columns of y
cdef void linear_forward(void* args, int ith, int nth) noexcept nogil              # args: Linear*
# slice: rows of d_x when 2 n >= n_in, else columns of d_x
cdef void linear_backward_input(void* args, int ith, int nth) noexcept nogil       # args: LinearBackward*
# slice: rows of d_weight (and d_bias) when n_out >= n_in, else columns of d_weight; d_bias then belongs to slice 0
cdef void linear_backward_weight(void* args, int ith, int nth) noexcept nogil      # args: LinearBackward*
