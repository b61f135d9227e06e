# The C side of the thread pool, for every other kernel file.
#
# A kernel is `void kernel(void* args, int ith, int nth) noexcept nogil`: it does slice `ith` of `nth` of its op, where
# `args` points to the op's own struct (each .pxd documents its structs and what a slice is). Slices of one op may run
# in any order and at the same time. Whoever has threads of their own calls kernels directly, with their ith and nth.

ctypedef void (*Kernel)(void* args, int ith, int nth) noexcept nogil

# Run all slices 0 .. nth-1 on the pool; returns when they are done.
cdef void run(Kernel kernel, void* args, int nth) noexcept nogil
# How many slices pay for work that would take one thread so long; `fine`: more slices than threads if it is long.
cdef int slices_for(double nanoseconds, bint fine) noexcept nogil


cdef inline Py_ssize_t slice_start(Py_ssize_t n, Py_ssize_t multiple, int ith, int nth) noexcept nogil:
    """Where slice ith of 0 .. n-1 starts (a multiple of `multiple`); it ends where slice ith+1 starts."""
    cdef Py_ssize_t start = (n + multiple - 1) // multiple * ith // nth * multiple
    return start if start < n else n
