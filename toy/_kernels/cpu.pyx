# cython: language_level=3
"""What the kernels were compiled for, and whether this CPU can run it.

setup.py compiles this one file for any CPU of the family, and the others for the instruction sets of TOY_MARCH
(`native` unless set). So this file can look at the CPU and say what is missing, where the others would die with an
illegal instruction.
"""

cdef extern from "cpu.h":
    int toy_cpu_has(const char* name)

cdef extern from *:
    """
    #ifndef TOY_TARGET_FEATURES
    #define TOY_TARGET_FEATURES ""
    #endif
    #ifndef TOY_COMPILE_FLAGS
    #define TOY_COMPILE_FLAGS "unknown"
    #endif
    """
    const char* TOY_TARGET_FEATURES
    const char* TOY_COMPILE_FLAGS


def target_features():
    """Names of the instruction sets beyond the family's baseline that the kernels were compiled for."""
    return TOY_TARGET_FEATURES.decode().split()


def compile_flags():
    return TOY_COMPILE_FLAGS.decode()


def has(feature):
    """Whether this CPU has an instruction set, by its name in cpu.h: True, False, or None where there is no way to ask."""
    cdef int answer = toy_cpu_has(feature.encode())
    return None if answer < 0 else answer == 1


def missing_features():
    """The target features that this CPU lacks. What there is no way to ask for is not among them."""
    return [feature for feature in target_features() if has(feature) is False]
