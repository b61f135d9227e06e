# RMSNorm and LayerNorm. Strides are in elements.

cdef struct Norm:
    Py_ssize_t rows, columns
    float eps
    const float* x            # (rows, columns)
    Py_ssize_t x_stride
    const float* gamma        # (columns,)
    const float* beta         # (columns,); LayerNorm only
    float* y                  # (rows, columns)
    Py_ssize_t y_stride
    float* mean               # (rows,), written for the backward; LayerNorm only
    float* rstd               # (rows,), written for the backward

cdef struct NormBackward:
    Py_ssize_t rows, columns
    const float* d_y          # (rows, columns)
    Py_ssize_t d_y_stride
    const float* x            # (rows, columns)
    Py_ssize_t x_stride
    const float* gamma        # (columns,)
    const float* mean         # (rows,); LayerNorm only
    const float* rstd         # (rows,)
    float* d_x                # (rows, columns), written
    Py_ssize_t d_x_stride
    float* partial_gamma      # (nth, columns), row ith is written by slice ith; or NULL
    float* partial_beta       # (nth, columns), likewise; LayerNorm only; or NULL

# slice: a band of rows
cdef void rms_norm_forward(void* args, int ith, int nth) noexcept nogil      # args: Norm*
cdef void layer_norm_forward(void* args, int ith, int nth) noexcept nogil    # args: Norm*
# slice: a band of rows; when all slices are done, add_partials puts the gradients of the parameters together
cdef void rms_norm_backward_(void* args, int ith, int nth) noexcept nogil    # args: NormBackward*
cdef void layer_norm_backward_(void* args, int ith, int nth) noexcept nogil  # args: NormBackward*
# total (columns,) += sum of the nth rows
cdef void add_partials(const float* partials, int nth, Py_ssize_t columns, float* total) noexcept nogil
