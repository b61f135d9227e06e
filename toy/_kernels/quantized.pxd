# Products and lookups with weights of a GGUF block type. Strides are in elements, from one row to the next.
# Call the products between blas.enter() and blas.leave().

cdef extern from "dequantize.h" nogil:
    ctypedef void (*toy_reader)(const unsigned char* source, float* target, Py_ssize_t n)
    ctypedef float (*toy_dotter)(const unsigned char* source, const float* x, const float* sums, Py_ssize_t n)
    ctypedef struct toy_block_type:
        const char* name
        int number             # of ggml's types, and in GGUF files
        int block, bytes       # numbers in a block, and the bytes that it takes
        toy_reader read        # n numbers, whole blocks
        toy_dotter dot         # a row times x; sums: of x over every 32; NULL where there is none

cdef struct QuantizedLinear:       # y = x W^T + b
    Py_ssize_t n, n_in, n_out
    int precision                  # of the product, see products.pxd
    const float* x                 # (n, n_in)
    Py_ssize_t x_stride
    const unsigned char* weight    # (n_out, n_in), rows back to back
    const toy_block_type* type
    const float* bias              # (n_out,) or NULL
    float* y                       # (n, n_out)
    Py_ssize_t y_stride
    float* scratch                 # quantized_scratch_floats() for each slice

cdef struct QuantizedLinearBackward:
    Py_ssize_t n, n_in, n_out
    int precision                  # of the product, see products.pxd
    const float* d_y               # (n, n_out)
    Py_ssize_t d_y_stride
    const unsigned char* weight    # (n_out, n_in), rows back to back
    const toy_block_type* type
    float* d_x                     # (n, n_in), written
    Py_ssize_t d_x_stride
    float* scratch                 # quantized_scratch_floats() for each slice

cdef struct QuantizedEmbedding:
    Py_ssize_t n, columns
    const long long* ids           # (n,), each a row of the table (checked by the caller)
    const unsigned char* table     # (rows, columns), rows back to back
    const toy_block_type* type
    float* rows                    # (n, columns), written
    Py_ssize_t rows_stride

# The type of that number, NULL for one without a reader here.
cdef const toy_block_type* block_type(int number) noexcept nogil
# Floats of scratch for one slice of a product with an (n_out, n_in) matrix.
cdef Py_ssize_t quantized_scratch_floats(Py_ssize_t n_in, Py_ssize_t n_out) noexcept nogil

# slice: rows of the weight, which are columns of y
cdef void quantized_linear_forward(void* args, int ith, int nth) noexcept nogil            # args: QuantizedLinear*
# slice: columns of the weight and of d_x, whole blocks; rows of d_x where a row has few blocks
cdef void quantized_linear_backward_input(void* args, int ith, int nth) noexcept nogil     # args: QuantizedLinearBackward*
cdef void quantized_embedding_forward(void* args, int ith, int nth) noexcept nogil         # args: QuantizedEmbedding*; rows
