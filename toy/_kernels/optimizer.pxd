# What happens to flat arrays of parameters and gradients.

cdef struct AdamW:
    Py_ssize_t size
    float* weight              # (size,), like the three below; weight, m, v are updated
    const float* gradient
    float* m
    float* v
    float lr, beta1, beta2, eps, weight_decay, s5, s6
    float factor               # of the gradient

cdef struct Flat:
    Py_ssize_t size
    float* x                   # (size,)
    double* partials           # one number for each SQUARES_BLOCK elements

cdef enum:
    SQUARES_BLOCK = 8192

# slice: a range of elements (of blocks of SQUARES_BLOCK elements in sum_of_squares_flat)
cdef void adamw_update(void* args, int ith, int nth) noexcept nogil           # args: AdamW*
cdef void sum_of_squares_flat(void* args, int ith, int nth) noexcept nogil    # args: Flat*; then add the partials
