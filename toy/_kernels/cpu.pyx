# cython: language_level=3
"""What the kernels were compiled for, and whether this CPU can run it.

setup.py compiles this one file for any CPU of the family, and the others for the instruction sets of TOY_MARCH
(`native` unless set). So this file can look at the CPU and say what is missing, where the others would die with an
illegal instruction.
"""

cdef extern from *:
    """
    #ifndef TOY_TARGET_FEATURES
    #define TOY_TARGET_FEATURES ""
    #endif
    #ifndef TOY_COMPILE_FLAGS
    #define TOY_COMPILE_FLAGS "unknown"
    #endif

    /* 1: this CPU has the feature, 0: it has not, -1: there is no way to ask here */
    static int toy_cpu_has(const char *feature) {
    #if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
        __builtin_cpu_init();
    #define ASK(name) if (!strcmp(feature, name)) return __builtin_cpu_supports(name) != 0;
        ASK("sse3") ASK("ssse3") ASK("sse4.1") ASK("sse4.2") ASK("popcnt")
        ASK("avx") ASK("avx2") ASK("fma") ASK("bmi") ASK("bmi2")
        ASK("avx512f") ASK("avx512dq") ASK("avx512bw") ASK("avx512vl") ASK("avx512cd")
        ASK("avx512vbmi") ASK("avx512ifma") ASK("avx512vnni")
    #endif
        return -1;
    }
    """
    const char* TOY_TARGET_FEATURES
    const char* TOY_COMPILE_FLAGS
    int toy_cpu_has(const char* feature)


def target_features():
    """Names of the instruction sets beyond the family's baseline that the kernels were compiled for."""
    return TOY_TARGET_FEATURES.decode().split()


def compile_flags():
    return TOY_COMPILE_FLAGS.decode()


def missing_features():
    """The target features that this CPU lacks."""
    return [feature for feature in target_features() if toy_cpu_has(feature.encode()) == 0]
