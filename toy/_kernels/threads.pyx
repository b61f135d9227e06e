# cython: language_level=3, cdivision=True
"""The thread pool of the kernels: how many threads, and how an op is spread over them."""

import os
import time

cdef extern from "pool.h" nogil:
    ctypedef void (*toy_kernel)(void* args, int ith, int nth)
    const int TOY_MAX_THREADS
    const int TOY_POOL_IS_THREADED
    int toy_pool_init()
    int toy_pool_resize(int n_threads)
    void toy_pool_run(toy_kernel kernel, void* args, int nth)

cdef extern from *:
    """
    #if defined(__AVX512F__)
    #define TOY_SIMD_BITS 512
    #elif defined(__AVX__)
    #define TOY_SIMD_BITS 256
    #else
    #define TOY_SIMD_BITS 128
    #endif
    #if defined(__clang__) || defined(__GNUC__)
    #define TOY_COMPILER __VERSION__
    #elif defined(_MSC_VER)
    #define TOY_COMPILER "MSVC"
    #else
    #define TOY_COMPILER "unknown"
    #endif
    """
    const int TOY_SIMD_BITS
    const char* TOY_COMPILER

# Handing a slice to a worker that spins costs about a microsecond, so smaller work stays in the calling thread.
cdef double NANOSECONDS_WORTH_A_THREAD = 4000.0
# Long ops are cut finer than one slice a thread: when another process takes a core for a while, the other threads do
# the slices that are left.
cdef double NANOSECONDS_WORTH_FINE_SLICES = 400000.0
cdef int FINE_SLICES = 4

cdef int n_threads = 1


cdef void run(Kernel kernel, void* args, int nth) noexcept nogil:
    toy_pool_run(<toy_kernel> kernel, args, nth)


cdef int slices_for(double nanoseconds, bint fine) noexcept nogil:
    cdef int worth
    if n_threads == 1 or nanoseconds < 2 * NANOSECONDS_WORTH_A_THREAD:
        return 1
    if fine and nanoseconds > NANOSECONDS_WORTH_FINE_SLICES * n_threads:
        return FINE_SLICES * n_threads
    worth = <int> (nanoseconds / NANOSECONDS_WORTH_A_THREAD)
    return worth if worth < n_threads else n_threads


def get_num_threads():
    """The number of threads the kernels use, the calling one included."""
    return n_threads


def set_num_threads(n):
    """Let the kernels use n threads (n >= 1, the calling one included).

    The same input gives the same bits every time for one number of threads; another number may round differently.
    Raises ValueError when n is not an integer from 1 to 1024.
    """
    global n_threads
    if isinstance(n, bool) or not hasattr(n, "__index__") or not 1 <= n.__index__() <= TOY_MAX_THREADS:
        raise ValueError(f"set_num_threads: n is {n!r}, expected an integer from 1 to {TOY_MAX_THREADS}")
    cdef int wanted = n if TOY_POOL_IS_THREADED else 1
    while toy_pool_resize(wanted):  # a job of another Python thread is running: wait for its end
        time.sleep(0.0001)
    n_threads = wanted


def _usable_cpus():
    """CPUs this process may use: its affinity mask, cut down to its cgroup's CPU quota where there is one."""
    try:
        cpus = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cpus = os.cpu_count() or 1
    # cgroup 2 has quota and period in one file ("max 100000" where there is no quota), cgroup 1 in two (-1 for none)
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        numbers = []
        try:
            for name in files:
                with open(f"/sys/fs/cgroup/{name}") as file:
                    numbers += file.read().split()
            quota, period = int(numbers[0]), int(numbers[1])
        except (OSError, ValueError, IndexError):
            continue
        if quota > 0 and period > 0:
            return min(cpus, max(1, quota // period))
    return cpus


def default_num_threads():
    """What TOY_NUM_THREADS says, else the CPUs this process may use. Raises ValueError for a bad TOY_NUM_THREADS."""
    text = os.environ.get("TOY_NUM_THREADS", "")
    if text == "":
        return min(_usable_cpus(), TOY_MAX_THREADS)
    try:
        n = int(text)
    except ValueError:
        n = 0
    if not 1 <= n <= TOY_MAX_THREADS:
        raise ValueError(
            f"the environment variable TOY_NUM_THREADS is {text!r}, expected an integer from 1 to {TOY_MAX_THREADS}; "
            "correct it or unset it"
        )
    return n


def simd_bits():
    return TOY_SIMD_BITS


def compiler():
    return TOY_COMPILER.decode()


if toy_pool_init():
    raise ImportError("toy: the thread pool could not register its fork handler (pthread_atfork failed)")
set_num_threads(default_num_threads())
