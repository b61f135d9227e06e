# Multi-head attention. Strides are in elements, from one row to the next: q, k and v may be column bands of one matrix.
# Call the kernels between blas.enter() and blas.leave().

cdef struct Attention:
    Py_ssize_t batch, n_heads, n_kv_heads, t_q, t_k, d_head    # n_heads is a multiple of n_kv_heads
    bint causal              # query i sees keys 0 .. t_k - t_q + i (then t_k >= t_q)
    Py_ssize_t window        # of the keys up to its own place a query sees the last so many; 0: all of them
    float softcap            # scores s become softcap * tanh(s / softcap); 0: they stay
    const float* q           # (batch*t_q, n_heads*d_head)
    Py_ssize_t q_stride
    const float* k           # (batch*t_k, n_kv_heads*d_head)
    Py_ssize_t k_stride
    const float* v           # (batch*t_k, n_kv_heads*d_head)
    Py_ssize_t v_stride
    float* out               # (batch*t_q, n_heads*d_head); the forward only, written
    Py_ssize_t out_stride
    float* largest           # (batch*n_heads, t_q) the largest q.k (capped: score) of each query row; the backward reads it
    float* scratch           # nth * attention_scratch(args) floats, slice ith uses part ith
    # the backward only
    const float* d_out       # (batch*t_q, n_heads*d_head)
    Py_ssize_t d_out_stride
    float* d_q               # shaped like q, k, v; written
    Py_ssize_t d_q_stride
    float* d_k
    Py_ssize_t d_k_stride
    float* d_v
    Py_ssize_t d_v_stride

# slice: a range of (batch, query head, block of query rows)
cdef void attention_forward(void* args, int ith, int nth) noexcept nogil       # args: Attention*
# slice: a range of (batch, key/value head)
cdef void attention_backward_(void* args, int ith, int nth) noexcept nogil     # args: Attention*
cdef Py_ssize_t attention_scratch(const Attention* args) noexcept nogil        # floats a slice, for either kernel
