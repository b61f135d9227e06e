/* Whether the CPU that runs this has an instruction set: toy_cpu_has(name) is 1 for yes, 0 for no, -1 where that is not known.
 *
 * A name is the macro that a compiler defines for the instruction set, in small letters and without its underscores and
 * __ARM_FEATURE_: __AVX512F__ is avx512f, __ARM_FEATURE_SVE is sve. In the tables is what a compiler may use unasked in
 * the code of the kernels; instructions that only an intrinsic or an operating system brings in (encryption, transactions,
 * random numbers, ...) are not: a machine without them runs the kernels well.
 */
#ifndef TOY_CPU_H
#define TOY_CPU_H

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) || defined(__i386__) || defined(_M_X64) || defined(_M_IX86)

/* CPUID, as in Intel's manual (volume 2A) and, from 0x80000001 on, AMD's (volume 3, appendix E) */
#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
static void toy_cpuid(uint32_t leaf, uint32_t subleaf, uint32_t registers[4]) {
    int found[4];
    __cpuidex(found, (int)leaf, (int)subleaf);
    for (int i = 0; i < 4; i++) registers[i] = (uint32_t)found[i];
}
static uint64_t toy_xcr0(void) { return _xgetbv(0); }
#else
#include <cpuid.h>
static void toy_cpuid(uint32_t leaf, uint32_t subleaf, uint32_t registers[4]) {
    __cpuid_count(leaf, subleaf, registers[0], registers[1], registers[2], registers[3]);
}
static uint64_t toy_xcr0(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0)); /* _xgetbv() would want -mxsave */
    return (uint64_t)high << 32 | low;
}
#endif

enum { TOY_EAX, TOY_EBX, TOY_ECX, TOY_EDX };

/* the registers that the operating system has to save (bits of XCR0) before the instructions may be used */
#define TOY_YMM 0x06u
#define TOY_ZMM 0xe6u

static const struct { const char *name; uint32_t leaf, subleaf; int reg, bit; uint32_t saved; } toy_cpu_features[] = {
    {"sse3", 1, 0, TOY_ECX, 0, 0},
    {"ssse3", 1, 0, TOY_ECX, 9, 0},
    {"sse4_1", 1, 0, TOY_ECX, 19, 0},
    {"sse4_2", 1, 0, TOY_ECX, 20, 0},
    {"crc32", 1, 0, TOY_ECX, 20, 0},
    {"pclmul", 1, 0, TOY_ECX, 1, 0},
    {"movbe", 1, 0, TOY_ECX, 22, 0},
    {"popcnt", 1, 0, TOY_ECX, 23, 0},
    {"avx", 1, 0, TOY_ECX, 28, TOY_YMM},
    {"fma", 1, 0, TOY_ECX, 12, TOY_YMM},
    {"f16c", 1, 0, TOY_ECX, 29, TOY_YMM},
    {"bmi", 7, 0, TOY_EBX, 3, 0},
    {"avx2", 7, 0, TOY_EBX, 5, TOY_YMM},
    {"bmi2", 7, 0, TOY_EBX, 8, 0},
    {"adx", 7, 0, TOY_EBX, 19, 0},
    {"avx512f", 7, 0, TOY_EBX, 16, TOY_ZMM},
    {"avx512dq", 7, 0, TOY_EBX, 17, TOY_ZMM},
    {"avx512ifma", 7, 0, TOY_EBX, 21, TOY_ZMM},
    {"avx512pf", 7, 0, TOY_EBX, 26, TOY_ZMM},
    {"avx512er", 7, 0, TOY_EBX, 27, TOY_ZMM},
    {"avx512cd", 7, 0, TOY_EBX, 28, TOY_ZMM},
    {"avx512bw", 7, 0, TOY_EBX, 30, TOY_ZMM},
    {"avx512vl", 7, 0, TOY_EBX, 31, TOY_ZMM},
    {"avx512vbmi", 7, 0, TOY_ECX, 1, TOY_ZMM},
    {"avx512vbmi2", 7, 0, TOY_ECX, 6, TOY_ZMM},
    {"gfni", 7, 0, TOY_ECX, 8, 0},
    {"vpclmulqdq", 7, 0, TOY_ECX, 10, TOY_YMM},
    {"avx512vnni", 7, 0, TOY_ECX, 11, TOY_ZMM},
    {"avx512bitalg", 7, 0, TOY_ECX, 12, TOY_ZMM},
    {"avx512vpopcntdq", 7, 0, TOY_ECX, 14, TOY_ZMM},
    {"avx5124vnniw", 7, 0, TOY_EDX, 2, TOY_ZMM},
    {"avx5124fmaps", 7, 0, TOY_EDX, 3, TOY_ZMM},
    {"avx512vp2intersect", 7, 0, TOY_EDX, 8, TOY_ZMM},
    {"avx512fp16", 7, 0, TOY_EDX, 23, TOY_ZMM},
    {"avxvnni", 7, 1, TOY_EAX, 4, TOY_YMM},
    {"avx512bf16", 7, 1, TOY_EAX, 5, TOY_ZMM},
    {"avxifma", 7, 1, TOY_EAX, 23, TOY_YMM},
    {"avxvnniint8", 7, 1, TOY_EDX, 4, TOY_YMM},
    {"avxneconvert", 7, 1, TOY_EDX, 5, TOY_YMM},
    {"avxvnniint16", 7, 1, TOY_EDX, 10, TOY_YMM},
    {"lahf_sahf", 0x80000001u, 0, TOY_ECX, 0, 0},
    {"lzcnt", 0x80000001u, 0, TOY_ECX, 5, 0},
    {"abm", 0x80000001u, 0, TOY_ECX, 5, 0},
    {"sse4a", 0x80000001u, 0, TOY_ECX, 6, 0},
    {"xop", 0x80000001u, 0, TOY_ECX, 11, TOY_YMM},
    {"fma4", 0x80000001u, 0, TOY_ECX, 16, TOY_YMM},
    {"tbm", 0x80000001u, 0, TOY_ECX, 21, 0},
};

static int toy_cpu_has(const char *name) {
    uint32_t registers[4];
    for (size_t i = 0; i < sizeof toy_cpu_features / sizeof *toy_cpu_features; i++) {
        if (strcmp(name, toy_cpu_features[i].name)) continue;
        const uint32_t leaf = toy_cpu_features[i].leaf;
        toy_cpuid(leaf & 0x80000000u, 0, registers); /* EAX: the last leaf there is */
        if (registers[TOY_EAX] < leaf) return 0;
        toy_cpuid(leaf, toy_cpu_features[i].subleaf, registers); /* zeros for a subleaf that is not there */
        if (!(registers[toy_cpu_features[i].reg] >> toy_cpu_features[i].bit & 1)) return 0;
        if (toy_cpu_features[i].saved == 0) return 1;
        toy_cpuid(1, 0, registers);
        if (!(registers[TOY_ECX] >> 27 & 1)) return 0; /* OSXSAVE: without it there is no XCR0 to read */
        return (toy_xcr0() & toy_cpu_features[i].saved) == toy_cpu_features[i].saved;
    }
    return -1;
}

#elif defined(__aarch64__) && (defined(__linux__) || defined(__APPLE__))

/* Linux tells in the auxiliary vector (Documentation/arch/arm64/elf_hwcaps), macOS through sysctl, by Arm's own names. */
static const struct { const char *name; int word, bit; const char *sysctl; } toy_cpu_features[] = {
    {"crc32", 1, 7, "hw.optional.armv8_crc32"},
    {"atomics", 1, 8, "hw.optional.arm.FEAT_LSE"},
    {"fp16_scalar_arithmetic", 1, 9, "hw.optional.arm.FEAT_FP16"},
    {"fp16_vector_arithmetic", 1, 10, "hw.optional.arm.FEAT_FP16"},
    {"qrdmx", 1, 12, "hw.optional.arm.FEAT_RDM"},
    {"jcvt", 1, 13, "hw.optional.arm.FEAT_JSCVT"},
    {"complex", 1, 14, "hw.optional.arm.FEAT_FCMA"},
    {"rcpc", 1, 15, "hw.optional.arm.FEAT_LRCPC"},
    {"sha3", 1, 17, "hw.optional.arm.FEAT_SHA3"}, /* EOR3, BCAX, XAR: plain bit operations */
    {"dotprod", 1, 20, "hw.optional.arm.FEAT_DotProd"},
    {"sve", 1, 22, "hw.optional.arm.FEAT_SVE"},
    {"fp16_fml", 1, 23, "hw.optional.arm.FEAT_FHM"},
    {"sve2", 2, 1, "hw.optional.arm.FEAT_SVE2"},
    {"sve2_bitperm", 2, 4, "hw.optional.arm.FEAT_SVE_BitPerm"},
    {"sve2_sha3", 2, 5, "hw.optional.arm.FEAT_SVE_SHA3"},
    {"frint", 2, 8, "hw.optional.arm.FEAT_FRINTTS"},
    {"sve_matmul_int8", 2, 9, "hw.optional.arm.FEAT_I8MM"},
    {"sve_matmul_fp32", 2, 10, "hw.optional.arm.FEAT_F32MM"},
    {"sve_matmul_fp64", 2, 11, "hw.optional.arm.FEAT_F64MM"},
    {"sve_bf16", 2, 12, "hw.optional.arm.FEAT_BF16"},
    {"matmul_int8", 2, 13, "hw.optional.arm.FEAT_I8MM"},
    {"bf16_scalar_arithmetic", 2, 14, "hw.optional.arm.FEAT_BF16"},
    {"bf16_vector_arithmetic", 2, 14, "hw.optional.arm.FEAT_BF16"},
    {"sve2p1", 2, 36, "hw.optional.arm.FEAT_SVE2p1"},
    {"mops", 2, 43, "hw.optional.arm.FEAT_MOPS"},
};

#if defined(__linux__)
#include <sys/auxv.h>
static int toy_cpu_feature(size_t i) {
    const unsigned long bits = getauxval(toy_cpu_features[i].word == 1 ? AT_HWCAP : AT_HWCAP2);
    return (int)(bits >> toy_cpu_features[i].bit & 1);
}
#else
#include <sys/sysctl.h>
static int toy_cpu_feature(size_t i) {
    int value = 0;
    size_t size = sizeof value;
    if (sysctlbyname(toy_cpu_features[i].sysctl, &value, &size, 0, 0)) return -1; /* a macOS from before that name */
    return value != 0;
}
#endif

static int toy_cpu_has(const char *name) {
    for (size_t i = 0; i < sizeof toy_cpu_features / sizeof *toy_cpu_features; i++)
        if (!strcmp(name, toy_cpu_features[i].name)) return toy_cpu_feature(i);
    return -1;
}

#else

static int toy_cpu_has(const char *name) { (void)name; return -1; }

#endif
#endif
