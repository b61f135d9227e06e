# Matrix products of row-major float matrices in the precision that the caller says, as those of blas.pxd.
#
# precision: 0 for float32, by blas; else one of the ways of product_bf16.h: both operands rounded to bfloat16, sums in float32.
# It is an argument, of each call and of each kernel's struct, and no setting: jobs of both kinds may run at the same time.

cdef void multiply_nt(int precision, Py_ssize_t m, Py_ssize_t n, Py_ssize_t k, const float* a, Py_ssize_t lda,
                      const float* b, Py_ssize_t ldb, float beta, float* c, Py_ssize_t ldc) noexcept nogil
cdef void multiply_nn(int precision, Py_ssize_t m, Py_ssize_t n, Py_ssize_t k, const float* a, Py_ssize_t lda,
                      const float* b, Py_ssize_t ldb, float beta, float* c, Py_ssize_t ldc) noexcept nogil
cdef void multiply_tn(int precision, Py_ssize_t m, Py_ssize_t n, Py_ssize_t k, const float* a, Py_ssize_t lda,
                      const float* b, Py_ssize_t ldb, float beta, float* c, Py_ssize_t ldc) noexcept nogil

# How many slices for a large product of so many flops.
cdef int product_slices(int precision, double flops)
# The precision as a number again, from what `bf16()` or `F32` gave. Raises ValueError for one that does not run here.
cdef int checked(object precision) except -1
