# cython: language_level=3, cdivision=True, auto_pickle=False
"""Arrays whose memory is recycled.

A training step makes the same big arrays again and again. The C library returns such blocks to the operating system
and gets fresh ones, and every first touch of a fresh page is a page fault: without the lists below a step of a small
model (4 layers, 128 wide) takes a third more CPU time. So a large array made here lives in a `Block`; when the last
array that uses the block is gone, the block goes to a list of idle blocks of its size and waits for the next array of
that size.

Everything here runs with the GIL held, which makes it safe to use from several Python threads.
"""

cimport cython
from libc.stddef cimport size_t
from libc.stdint cimport uintptr_t
from libc.stdlib cimport free, malloc
cimport numpy as cnp

cnp.import_array()

cdef extern from *:
    """
    #if defined(__linux__)
    #include <sys/mman.h>
    /* Fewer, larger pages: fewer page faults and fewer misses in the table of pages. Only ever advice. */
    #define toy_advise_huge_pages(data, size) ((void)madvise((data), (size), MADV_HUGEPAGE))
    #else
    #define toy_advise_huge_pages(data, size) ((void)0)
    #endif
    """
    void toy_advise_huge_pages(void* data, size_t size)

cdef enum:
    ALIGNMENT = 64                 # a cache line and the widest vector
    HUGE_PAGE = 2 * 1024 * 1024
    N_CLASSES = 512
    SMALLEST = 16 * 1024           # below this numpy's own allocation is as fast

# A size class is (power of two, eighth): at most an eighth of a block is unused.
cdef void* idle[N_CLASSES]         # head of each class's list; an idle block stores the next one's address in itself
cdef size_t idle_bytes = 0
cdef size_t idle_limit = 1 << 30


cdef int class_of(size_t size, size_t* class_size) noexcept:
    cdef int shift = 0
    size -= 1
    while (size >> shift) >= 16:
        shift += 1
    cdef size_t eighths = (size >> shift) + 1   # 9 .. 16
    class_size[0] = eighths << shift
    return shift * 8 + <int> (eighths - 9)


cdef void* allocate(size_t size) noexcept:
    """malloc with an aligned address; the address that free() needs is stored just before it."""
    cdef size_t alignment = HUGE_PAGE if size >= 2 * HUGE_PAGE else ALIGNMENT
    cdef void* raw = malloc(size + alignment + sizeof(void*))
    if raw == NULL:
        return NULL
    cdef uintptr_t address = (<uintptr_t> raw + sizeof(void*) + alignment - 1) // alignment * alignment
    (<void**> address)[-1] = raw
    if alignment == HUGE_PAGE:
        toy_advise_huge_pages(<void*> address, size // HUGE_PAGE * HUGE_PAGE)
    return <void*> address


cdef void release(void* data) noexcept:
    free((<void**> data)[-1])


@cython.final
@cython.freelist(256)
cdef class Block:
    """Owns one block of memory; the base object of the array that uses it."""

    cdef void* data
    cdef size_t size
    cdef int size_class

    def __dealloc__(self):
        global idle_bytes
        if self.data == NULL:
            return
        if idle_bytes + self.size > idle_limit:
            release(self.data)
        else:
            (<void**> self.data)[0] = idle[self.size_class]
            idle[self.size_class] = self.data
            idle_bytes += self.size


cdef Block take_block(size_t size):
    global idle_bytes
    cdef Block block = Block.__new__(Block)
    block.size_class = class_of(size, &block.size)
    block.data = idle[block.size_class]
    if block.data != NULL:
        idle[block.size_class] = (<void**> block.data)[0]
        idle_bytes -= block.size
        return block
    block.data = allocate(block.size)
    if block.data == NULL:
        clear()  # idle blocks of other sizes may be what is missing
        block.data = allocate(block.size)
    if block.data == NULL:
        raise MemoryError(f"could not allocate an array of {size} bytes")
    return block


cdef object new_array(int ndim, cnp.npy_intp* shape):
    cdef size_t size = 4
    cdef int axis
    for axis in range(ndim):
        if shape[axis] > 0 and size > (<size_t> 1 << 62) // <size_t> shape[axis]:
            raise MemoryError(f"an array of {shape[0]} x {shape[ndim - 1]} float32 numbers does not fit any memory")
        size *= shape[axis]
    if size < SMALLEST:
        return cnp.PyArray_EMPTY(ndim, shape, cnp.NPY_FLOAT32, 0)
    cdef Block block = take_block(size)
    cdef object array = cnp.PyArray_SimpleNewFromData(ndim, shape, cnp.NPY_FLOAT32, block.data)
    cnp.set_array_base(array, block)
    return array


cdef object empty_matrix(Py_ssize_t rows, Py_ssize_t columns):
    cdef cnp.npy_intp[2] shape
    shape[0] = rows
    shape[1] = columns
    return new_array(2, shape)


cdef object empty_vector(Py_ssize_t size):
    cdef cnp.npy_intp[1] shape
    shape[0] = size
    return new_array(1, shape)


cdef object matrix_view(object base, float* data, Py_ssize_t rows, Py_ssize_t columns, Py_ssize_t stride):
    """A matrix inside the memory of `base`, which it keeps alive: `stride` elements from one row to the next."""
    cdef cnp.npy_intp[2] shape
    cdef cnp.npy_intp[2] strides
    shape[0] = rows
    shape[1] = columns
    strides[0] = stride * 4
    strides[1] = 4
    cdef int writeable = cnp.PyArray_FLAGS(base) & cnp.NPY_ARRAY_WRITEABLE
    cdef object view = cnp.PyArray_New(
        cnp.ndarray, 2, shape, cnp.NPY_FLOAT32, strides, data, 0, writeable, None
    )
    cnp.set_array_base(view, base)
    return view


def idle_memory():
    """Bytes that wait for reuse."""
    return idle_bytes


def set_idle_limit(size):
    """Keep at most `size` bytes for reuse (1 GiB unless set); if more wait now, free them all.

    Raises ValueError unless size is a whole number of bytes, at least 0.
    """
    global idle_limit
    try:
        whole = -1 if isinstance(size, bool) else size.__index__()
    except (AttributeError, TypeError):
        whole = -1
    if not 0 <= whole < 1 << 62:
        raise ValueError(f"set_idle_limit: size is {size!r}, expected a whole number of bytes from 0 to 2**62")
    idle_limit = whole
    if idle_bytes > idle_limit:
        clear()


def clear():
    """Free every idle block."""
    global idle_bytes
    cdef int size_class
    cdef void* block
    for size_class in range(N_CLASSES):
        while idle[size_class] != NULL:
            block = idle[size_class]
            idle[size_class] = (<void**> block)[0]
            release(block)
    idle_bytes = 0
