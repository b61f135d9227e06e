# cython: language_level=3, cdivision=True
"""Products of row-major matrices, and the BLAS thread count.

A product is the project's own (product.h) where that is the faster one: on processors with AVX-512 or AVX2, whatever
the rest was compiled for, from FEWEST_ROWS rows and FEWEST_COLUMNS columns of the result on; else it is one of sgemm.

The kernels cut a product into slices themselves, one call a slice. A BLAS that starts its own threads in each
call would then run threads times threads, so it is held to one thread while a kernel with products runs, and set back
right after: a program that also uses scipy.linalg keeps the number it chose. Only scipy's library is touched; numpy
has one of its own.

OpenBLAS (in every scipy wheel but the Accelerate ones of macOS) can be held that way. Where it is another BLAS (as Debian
and conda let one choose), or its number of threads does not follow, each product is one slice, always of sgemm, and that
BLAS uses its own threads.
"""

import ctypes

import scipy.linalg.cython_blas
from libc.stdint cimport uintptr_t
from scipy.linalg.cython_blas cimport sgemm

from toy._kernels.threads cimport slices_for

cdef extern from "product.h" nogil:
    const int NO_PRODUCT "TOY_NO_PRODUCT"
    const int AVX2 "TOY_PRODUCT_AVX2"
    const int AVX512 "TOY_PRODUCT_AVX512"
    int toy_product_init()
    void toy_product(int which, bint a_is_transposed, bint b_is_transposed, Py_ssize_t m, Py_ssize_t n, Py_ssize_t k,
                     const float* a, Py_ssize_t a_row, const float* b, Py_ssize_t b_row, bint add,
                     float* c, Py_ssize_t c_row)

cdef enum:
    # of c: below them packing costs more than it brings, and sgemm has functions for a vector
    FEWEST_ROWS = 3
    FEWEST_COLUMNS = 4

ctypedef int (*GetThreads)() noexcept nogil
ctypedef void (*SetThreads)(int) noexcept nogil

cdef GetThreads get_blas_threads = NULL
cdef SetThreads set_blas_threads = NULL
cdef int product = NO_PRODUCT   # which of the project's own
cdef int inside = 0             # callers between enter() and leave(); guarded by the GIL
cdef int threads_outside = 1    # what the first of them found

FLOPS_PER_NANOSECOND = 80.0    # a rough figure is enough


cdef void multiply_nt(Py_ssize_t m, Py_ssize_t n, Py_ssize_t k, const float* a, Py_ssize_t lda,
                      const float* b, Py_ssize_t ldb, float beta, float* c, Py_ssize_t ldc) noexcept nogil:
    # BLAS counts columns first: its c is our c^T (n, m) = b a^T, and our row-major b (n, k) looks like a (k, n) to it
    gemm(b"T", b"N", n, m, k, b, ldb, a, lda, beta, c, ldc)


cdef void multiply_nn(Py_ssize_t m, Py_ssize_t n, Py_ssize_t k, const float* a, Py_ssize_t lda,
                      const float* b, Py_ssize_t ldb, float beta, float* c, Py_ssize_t ldc) noexcept nogil:
    gemm(b"N", b"N", n, m, k, b, ldb, a, lda, beta, c, ldc)


cdef void multiply_tn(Py_ssize_t m, Py_ssize_t n, Py_ssize_t k, const float* a, Py_ssize_t lda,
                      const float* b, Py_ssize_t ldb, float beta, float* c, Py_ssize_t ldc) noexcept nogil:
    gemm(b"N", b"T", n, m, k, b, ldb, a, lda, beta, c, ldc)


cdef void gemm(const char* transpose_a, const char* transpose_b, Py_ssize_t m, Py_ssize_t n, Py_ssize_t k,
               const float* a, Py_ssize_t lda, const float* b, Py_ssize_t ldb,
               float beta, float* c, Py_ssize_t ldc) noexcept nogil:
    cdef int m_, n_, k_, lda_, ldb_, ldc_
    cdef float one = 1.0
    if m <= 0 or n <= 0:
        return
    if product != NO_PRODUCT and n >= FEWEST_ROWS and m >= FEWEST_COLUMNS:    # in rows again: c (n, m) = b a
        toy_product(product, transpose_b[0] == c"T", transpose_a[0] == c"T", n, m, k, b, ldb, a, lda, beta != 0, c, ldc)
        return
    m_, n_, k_, lda_, ldb_, ldc_ = <int> m, <int> n, <int> k, <int> max(lda, 1), <int> max(ldb, 1), <int> max(ldc, 1)
    sgemm(<char*> transpose_a, <char*> transpose_b, &m_, &n_, &k_, &one, <float*> a, &lda_, <float*> b, &ldb_,
          &beta, c, &ldc_)


cdef void enter():
    global inside, threads_outside
    if inside == 0 and set_blas_threads != NULL:
        threads_outside = get_blas_threads()
        if threads_outside != 1:
            set_blas_threads(1)
    inside += 1


cdef void leave():
    global inside
    inside -= 1
    if inside == 0 and set_blas_threads != NULL and threads_outside != 1:
        set_blas_threads(threads_outside)


cdef int product_slices(double flops, bint fine):
    return slices_for(flops / FLOPS_PER_NANOSECOND, fine) if set_blas_threads != NULL else 1


def openblas_function(verb):
    """OpenBLAS's function of that name in the library that scipy's sgemm comes from, or None.

    A lookup in the extension module `cython_blas` also searches the libraries that it was linked with, and those only.
    """
    try:
        library = ctypes.CDLL(scipy.linalg.cython_blas.__file__)
    except OSError:
        return None
    for form in ("scipy_openblas_{}", "openblas_{}", "scipy_openblas_{}64_", "openblas_{}64_"):
        function = getattr(library, form.format(verb), None)
        if function is not None:
            return function
    return None


def blas_info():
    """The BLAS that the kernels call: name and version, its own thread count, whether it can be held to one thread;
    and the product that is used: "avx512" or "avx2" for the project's own, else "sgemm"."""
    get_config = openblas_function("get_config")
    if get_config is not None:
        get_config.restype = ctypes.c_char_p
        name = get_config().decode()
    else:
        blas = scipy.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})
        name = f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()
    return {
        "name": name,
        "threads_outside_kernels": get_blas_threads() if get_blas_threads != NULL else None,
        "held_to_one_thread": set_blas_threads != NULL,
        "product": next(name for name, which in PRODUCTS.items() if which == product),
    }


def set_product(name):
    """Use that product, a key of PRODUCTS, from now on: for comparisons. The widest is what an import chooses."""
    global product
    if name not in PRODUCTS:
        raise ValueError(f"set_product: name is {name!r}, expected one of {', '.join(PRODUCTS)}, which can be had here")
    product = PRODUCTS[name]


def can_be_held(getter, setter):
    """Whether the BLAS runs with one thread when it is told to, by its own word; its number of threads is what it was."""
    if getter is None or setter is None:
        return False
    before = getter()
    setter(1)
    held = getter() == 1
    setter(before)
    return held


cdef object getter = openblas_function("get_num_threads"), setter = openblas_function("set_num_threads")
if can_be_held(getter, setter):
    get_blas_threads = <GetThreads> <uintptr_t> ctypes.cast(getter, ctypes.c_void_p).value
    set_blas_threads = <SetThreads> <uintptr_t> ctypes.cast(setter, ctypes.c_void_p).value
# the products there are to choose from: dict of names to numbers
PRODUCTS = {"sgemm": NO_PRODUCT}
if set_blas_threads != NULL:
    product = toy_product_init()
    PRODUCTS |= {name: which for name, which in (("avx2", AVX2), ("avx512", AVX512)) if which <= product}
