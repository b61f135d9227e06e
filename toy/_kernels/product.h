/* The product of two matrices by the project's own code, where that is faster than sgemm: which widths of vector there are,
 * which of them this processor has, and the memory that a thread packs into. The product itself is in product_lanes.h.
 *
 * Time for the products of a training step over OpenBLAS 0.3.30's, one thread of an Intel Xeon (Sapphire Rapids or later), for
 * the shapes tiny, char, baby and gpt2-124M of benchmarks/train_step.py: with AVX-512 0.83, 0.88, 0.92 and 0.88 (MKL: 0.74,
 * 0.83, 0.90, 0.86); with AVX2 alone, OpenBLAS held to it by OPENBLAS_CORETYPE=Haswell, 0.84, 0.92, 0.95 and 0.96. On ARM
 * nothing was measured: sgemm stays, as where the compiler has no vector types.
 */
#ifndef TOY_PRODUCT_H
#define TOY_PRODUCT_H

#include "cpu.h"
#include "simd_math.h"

enum { TOY_NO_PRODUCT, TOY_PRODUCT_AVX2, TOY_PRODUCT_AVX512 };

#if defined(__GNUC__) && defined(__x86_64__) && !defined(_WIN32)

#include <immintrin.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

#define TOY_PRAGMA_TEXT(text) _Pragma(#text)
#define TOY_PRAGMA(text) TOY_PRAGMA_TEXT(text)
#if defined(__clang__)
#define TOY_UNROLL(times) TOY_PRAGMA(clang loop unroll_count(times))
#define TOY_UNROLL_ALL TOY_PRAGMA(clang loop unroll(full))
#else
#define TOY_UNROLL(times) TOY_PRAGMA(GCC unroll times)
#define TOY_UNROLL_ALL TOY_PRAGMA(GCC unroll 16)
#endif
#define TOY_DEPTH 384         /* terms of a sum that are added up in registers */
#define TOY_MOST_COLUMNS 768  /* of b that are packed at a time: 1.2 MB a thread */
#define TOY_FEW_COLUMNS 32    /* 48 KB: room enough on a stack */

#define TOY_PRODUCT(name) toy_avx512_##name
#define TOY_PRODUCT_TARGET __attribute__((target("avx512f,avx512dq,avx2,fma")))
#define TOY_PRODUCT_LANES 16
#define TOY_PRODUCT_ROWS 14
#define TOY_PRODUCT_UNROLL 2
#define TOY_PRODUCT_AHEAD 8
#include "product_lanes.h"

#define TOY_PRODUCT(name) toy_avx2_##name
#define TOY_PRODUCT_TARGET __attribute__((target("avx2,fma")))
#define TOY_PRODUCT_LANES 8
#define TOY_PRODUCT_ROWS 6
#define TOY_PRODUCT_UNROLL 4
#define TOY_PRODUCT_AHEAD 0 /* the processor fetches well enough, and two loads a step more are felt */
#include "product_lanes.h"

static pthread_key_t toy_panels_key;
static ptrdiff_t toy_columns; /* that are packed at a time on this processor */

/* The widest product that this processor has. Once, before any product. */
static int toy_product_init(void) {
    if (pthread_key_create(&toy_panels_key, free)) return TOY_NO_PRODUCT;
    long second_cache = 512 << 10;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    if (sysconf(_SC_LEVEL2_CACHE_SIZE) > 0) second_cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    /* the panels fill three quarters of it: packed for fewer columns, the rows of a are copied more often than need be */
    toy_columns = second_cache / 4 * 3 / (TOY_DEPTH * (long)sizeof(float)) / TOY_FEW_COLUMNS * TOY_FEW_COLUMNS;
    if (toy_columns < TOY_FEW_COLUMNS) toy_columns = TOY_FEW_COLUMNS;
    if (toy_columns > TOY_MOST_COLUMNS) toy_columns = TOY_MOST_COLUMNS;
    if (toy_cpu_has("avx2") != 1 || toy_cpu_has("fma") != 1) return TOY_NO_PRODUCT;
    return toy_cpu_has("avx512f") == 1 && toy_cpu_has("avx512dq") == 1 ? TOY_PRODUCT_AVX512 : TOY_PRODUCT_AVX2;
}

/* This thread's memory for panels, which it keeps until it ends; NULL if there is none to be had. */
static float *toy_panels(void) {
    void *panels = pthread_getspecific(toy_panels_key);
    if (panels != NULL) return panels;
    if (posix_memalign(&panels, 64, toy_columns * TOY_DEPTH * sizeof(float))) return NULL;
    if (pthread_setspecific(toy_panels_key, panels)) {
        free(panels);
        return NULL;
    }
    return panels;
}

static void toy_product_in(int which, int a_is_transposed, int b_is_transposed, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k,
                           const float *a, ptrdiff_t a_row, const float *b, ptrdiff_t b_row, int add, float *c,
                           ptrdiff_t c_row, float *panels, ptrdiff_t room) {
    if (which == TOY_PRODUCT_AVX512)
        toy_avx512_multiply(a_is_transposed, b_is_transposed, m, n, k, a, a_row, b, b_row, add, c, c_row, panels, room);
    else
        toy_avx2_multiply(a_is_transposed, b_is_transposed, m, n, k, a, a_row, b, b_row, add, c, c_row, panels, room);
}

/* Out of memory: panel by panel, slower and with the same bits. */
__attribute__((noinline)) static void toy_product_on_stack(int which, int a_is_transposed, int b_is_transposed, ptrdiff_t m,
                                                           ptrdiff_t n, ptrdiff_t k, const float *a, ptrdiff_t a_row,
                                                           const float *b, ptrdiff_t b_row, int add, float *c,
                                                           ptrdiff_t c_row) {
    _Alignas(64) float panel[TOY_FEW_COLUMNS * TOY_DEPTH];
    toy_product_in(which, a_is_transposed, b_is_transposed, m, n, k, a, a_row, b, b_row, add, c, c_row, panel,
                   TOY_FEW_COLUMNS);
}

/* c (m, n) = a (m, k) b (k, n), or with `add` that much more. a lies in memory as (k, m) if it is transposed, b as (n, k);
 * the steps from row to row are in numbers. */
static void toy_product(int which, int a_is_transposed, int b_is_transposed, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k,
                        const float *a, ptrdiff_t a_row, const float *b, ptrdiff_t b_row, int add, float *c,
                        ptrdiff_t c_row) {
    float *panels = toy_panels();
    if (panels == NULL)
        toy_product_on_stack(which, a_is_transposed, b_is_transposed, m, n, k, a, a_row, b, b_row, add, c, c_row);
    else
        toy_product_in(which, a_is_transposed, b_is_transposed, m, n, k, a, a_row, b, b_row, add, c, c_row, panels,
                       toy_columns);
}

#else

static int toy_product_init(void) { return TOY_NO_PRODUCT; }
static void toy_product(int which, int a_is_transposed, int b_is_transposed, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k,
                        const float *a, ptrdiff_t a_row, const float *b, ptrdiff_t b_row, int add, float *c,
                        ptrdiff_t c_row) {
    (void)which, (void)a_is_transposed, (void)b_is_transposed, (void)m, (void)n, (void)k, (void)a, (void)a_row, (void)b;
    (void)b_row, (void)add, (void)c, (void)c_row;
}

#endif
#endif
