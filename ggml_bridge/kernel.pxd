"""What other Cython code needs to supply a kernel for `Graph.custom`.

    from ggml_bridge.kernel cimport ggml_tensor, kernel_capsule

    cdef void double_rows(ggml_tensor *dst, int ith, int nth, void *params) noexcept nogil:
        cdef const ggml_tensor *x = dst.src[0]
        ...  # every one of the nth threads calls this; thread ith does its share of the work

    DOUBLE_ROWS = kernel_capsule(double_rows)

The kernel runs without the GIL, on ggml's threads, or, in a `Backend` with a runner (`runner_capsule`), in slices on the threads
of that runner. Shapes are in ggml's order: ne[0] is the last numpy axis; nb[] are the
strides in bytes; dst.src[i] are the inputs in the order given to `custom`. `params` points at a copy of the `params` bytes
given to `custom`, aligned to 64 bytes, owned by the graph. Compile with the include path of libggml
(`libggml/include`), nothing is linked.
"""

from cpython.pycapsule cimport PyCapsule_New
from libc.stdint cimport int32_t, int64_t

cdef extern from "ggml.h" nogil:
    struct ggml_tensor:
        int64_t ne[4]
        size_t nb[4]
        int32_t flags
        ggml_tensor *src[10]
        void *data

    ctypedef void (*ggml_custom_op_t)(ggml_tensor *dst, int ith, int nth, void *userdata) noexcept nogil

    # runs slice(args, ith, nth) for every ith in 0 .. nth-1, on threads of its own, and returns when all are done
ctypedef void (*slice_t)(void *args, int ith, int nth) noexcept nogil
ctypedef void (*runner_t)(slice_t slice, void *args, int nth) noexcept nogil

cdef inline object runner_capsule(runner_t runner):
    return PyCapsule_New(<void *>runner, "ggml_bridge.runner", NULL)

cdef inline object kernel_capsule(ggml_custom_op_t kernel):
    return PyCapsule_New(<void *>kernel, "ggml_bridge.kernel", NULL)
