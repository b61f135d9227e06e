# Rows of a table by id, and RoPE. Strides are in elements.

cdef struct Embedding:
    Py_ssize_t n, columns, table_rows
    const long long* ids      # (n,), each in 0 .. table_rows-1 (checked by the caller)
    const float* table        # (table_rows, columns), contiguous; the forward reads it
    float* d_table            # (table_rows, columns), contiguous; the backward adds to it
    float* rows               # (n, columns); the forward writes it
    const float* d_rows       # (n, columns); the backward reads it
    Py_ssize_t rows_stride    # of rows or d_rows

cdef struct Rope:
    Py_ssize_t n, n_heads, d_head
    const long long* positions    # (n,), rows of the two tables (checked by the caller)
    const float* cosines          # (positions, d_head/2), contiguous
    const float* sines
    float direction               # 1 turns forward, -1 back
    bint halves                   # pairs are (x[j], x[j + d_head/2]) of a head, not (x[2j], x[2j+1])
    const float* x                # (n, n_heads*d_head)
    Py_ssize_t x_stride
    float* y                      # likewise, written
    Py_ssize_t y_stride

cdef void embedding_forward(void* args, int ith, int nth) noexcept nogil      # args: Embedding*; slice: a band of rows
# args: Embedding*; slice: a band of columns, so that no two slices add to the same number
cdef void embedding_backward_(void* args, int ith, int nth) noexcept nogil
cdef void rope_rotate(void* args, int ith, int nth) noexcept nogil            # args: Rope*; slice: a band of rows
