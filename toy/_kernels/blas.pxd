# Matrix products of row-major float matrices, the project's own or by the sgemm of the BLAS that scipy was built with
# (blas.pyx says which).
#
# `ld*` is the row stride of a matrix in elements; beta is 0 (overwrite c) or 1 (add to c). Call these between enter()
# and leave(): then that BLAS starts no threads of its own inside our slices.

# c (m, n) = a (m, k) b (n, k)^T
cdef void multiply_nt(Py_ssize_t m, Py_ssize_t n, Py_ssize_t k, const float* a, Py_ssize_t lda,
                      const float* b, Py_ssize_t ldb, float beta, float* c, Py_ssize_t ldc) noexcept nogil
# c (m, n) = a (m, k) b (k, n)
cdef void multiply_nn(Py_ssize_t m, Py_ssize_t n, Py_ssize_t k, const float* a, Py_ssize_t lda,
                      const float* b, Py_ssize_t ldb, float beta, float* c, Py_ssize_t ldc) noexcept nogil
# c (m, n) = a (k, m)^T b (k, n)
cdef void multiply_tn(Py_ssize_t m, Py_ssize_t n, Py_ssize_t k, const float* a, Py_ssize_t lda,
                      const float* b, Py_ssize_t ldb, float beta, float* c, Py_ssize_t ldc) noexcept nogil

cdef double FLOPS_PER_NANOSECOND    # of one core, for the question whether threads pay

cdef void enter()    # with the GIL held; calls nest
cdef void leave()
# How many slices for that much work: 1 if this BLAS cannot be held to one thread. Not `fine` for one large product:
# each slice repacks the operand that is not cut (four slices a thread instead of one: 10 to 15 % more time by sgemm).
cdef int product_slices(double flops, bint fine)
