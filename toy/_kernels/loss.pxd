# Softmax cross-entropy. Strides are in elements.

cdef struct CrossEntropy:
    Py_ssize_t rows, columns       # columns: the vocabulary
    const float* logits            # (rows, columns)
    Py_ssize_t logits_stride
    const long long* labels        # (rows,), each -1 or 0 .. columns-1 (checked by the caller); or NULL
    const float* targets           # (rows, columns) a distribution a row, when labels is NULL
    Py_ssize_t targets_stride
    float* largest                 # (rows,) the largest logit: the forward writes it, the backward reads it
    float* share                   # (rows,) weight / sum of exp(logit - largest); likewise. The weight is 1,
                                   # or 0 in a row that does not count, or the sum of dense targets
    double* losses                 # (rows,), 0 in rows that do not count; written by the forward
    float scale                    # 1 / number of rows that count; the backward reads it
    float* d_logits                # (rows, columns), written by the backward; may be the memory of the logits
    Py_ssize_t d_logits_stride

# slice: a band of rows
cdef void cross_entropy_forward(void* args, int ith, int nth) noexcept nogil      # args: CrossEntropy*
cdef void cross_entropy_backward_(void* args, int ith, int nth) noexcept nogil    # args: CrossEntropy*
