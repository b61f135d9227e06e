/* Matrix products of float matrices whose operands are rounded to bfloat16: c = a b, or added to c, with sums in float32.
 *
 * A processor with AMX multiplies a tile of 16 rows and 32 columns with one of 32 rows and 16 columns in one instruction
 * (TDPBF16PS), one with AVX512-BF16 the pairs of two registers (VDPBF16PS); both add in float32 (Intel's manual, volume 2).
 * Which of them there is, `toy_bf16_has` says while the program runs; they are compiled whatever -march says, where the
 * compiler knows them. The third way, `TOY_BF16_PORTABLE`, does the same with ordinary float32 instructions: it is there so
 * that the numbers can be looked at on any machine, and is slower than float32.
 *
 * An operand is rounded to nearest, ties to even, when it is packed, and NaN stays NaN. The two instructions take denormal
 * numbers (below 1.2e-38) for zeros. An element of c is the sum over k in an order that depends on k alone, so neither the
 * number of slices nor the place in a slice changes a bit of it.
 *
 * Packed, each operand is a row of panels of 16 lines (rows of a, columns of b), each panel a row of tiles of 16 x 16 pairs:
 * 512 numbers along k = 0 .. 31. In a's tiles a row is a line; in b's a row is a pair (k, k + 1) of all 16 lines.
 */
#ifndef TOY_PRODUCT_BF16_H
#define TOY_PRODUCT_BF16_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "cpu.h"

enum { TOY_BF16_NONE, TOY_BF16_AMX, TOY_BF16_AVX512, TOY_BF16_PORTABLE };

#if defined(__clang__)
#define TOY_KNOWS_BF16 (__clang_major__ >= 12)
#elif defined(__GNUC__)
#define TOY_KNOWS_BF16 (__GNUC__ >= 11)
#else
#define TOY_KNOWS_BF16 0
#endif

#if defined(__x86_64__) && TOY_KNOWS_BF16
#define TOY_BF16_INTRINSICS 1
#include <immintrin.h>
#define TOY_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define TOY_TARGET_AMX __attribute__((target("amx-tile,amx-bf16,avx512f")))
#else
#define TOY_BF16_INTRINSICS 0
#endif

#if TOY_BF16_INTRINSICS && defined(__linux__)
#define TOY_BF16_AMX_INTRINSICS 1
#include <sys/syscall.h>
long syscall(long number, ...); /* unistd.h has it for programs that ask for more than C11 */
#else
#define TOY_BF16_AMX_INTRINSICS 0
#endif

#if defined(_MSC_VER) && !defined(__clang__)
#define TOY_THREAD_LOCAL __declspec(thread)
#else
#define TOY_THREAD_LOCAL _Thread_local
#endif

/* of the blocks that are packed at a time: two panels of a (32 KB) stay in the first-level cache, the rest in the second */
enum { TOY_BF16_K = 512, TOY_BF16_M = 256, TOY_BF16_N = 512, TOY_BF16_TILE = 512 };

typedef struct {
    uint16_t a[TOY_BF16_M * TOY_BF16_K], b[TOY_BF16_N * TOY_BF16_K];
    float edge[32 * 32]; /* a block of c that is not whole */
} toy_bf16_buffers;

/* An operand: number (line, k) is at data[line * line_stride + k * k_stride], one of the strides is 1 */
typedef struct {
    const float *data;
    ptrdiff_t line_stride, k_stride;
} toy_bf16_operand;

static uint16_t toy_bf16_rounded(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40u); /* quiet, whatever its low half was */
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static float toy_bf16_widened(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * what there is
 * ------------------------------------------------------------------------------------------------------------------ */

#if TOY_BF16_AMX_INTRINSICS
/* Linux gives a process the registers of AMX on request (Documentation/arch/x86/xstate.rst), and may refuse */
static int toy_amx_is_granted(void) {
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

static int toy_cpu_has_amx(void) {
    uint32_t registers[4];
    toy_cpuid(0, 0, registers);
    if (registers[TOY_EAX] < 7) return 0;
    toy_cpuid(7, 0, registers);
    if (!(registers[TOY_EDX] >> 22 & 1) || !(registers[TOY_EDX] >> 24 & 1)) return 0; /* AMX-BF16, AMX-TILE */
    return (toy_xcr0() & 0x60000u) == 0x60000u; /* the system saves the tiles and their configuration */
}
#endif

/* Whether a product can be made that way here. Asks the operating system for the registers of AMX. */
static int toy_bf16_has(int way) {
    if (way == TOY_BF16_PORTABLE) return 1;
#if TOY_BF16_INTRINSICS
    static const char *const needed[] = {"avx512bf16", "avx512bw", "avx512dq", "avx512vl"};
    for (int i = 0; i < 4; i++)
        if (toy_cpu_has(needed[i]) != 1) return 0;
    if (way == TOY_BF16_AVX512) return 1;
#endif
#if TOY_BF16_AMX_INTRINSICS
    if (way == TOY_BF16_AMX) return toy_cpu_has_amx() && toy_amx_is_granted();
#endif
    return 0;
}

/* Whether AVX512-BF16 is faster than float32: on AMD's processors VDPBF16PS takes as long as a fused multiply-add of float32
 * and does twice as much; on Intel's it takes twice as long (measured: 80 and 85 GFLOP/s in registers), and the products are
 * 0.6 times as fast as float32's. On AMD's it was not measured. */
static int toy_bf16_avx512_pays(void) {
#if TOY_BF16_INTRINSICS
    uint32_t registers[4];
    toy_cpuid(0, 0, registers);
    return registers[TOY_EBX] == 0x68747541u && registers[TOY_EDX] == 0x69746e65u; /* "AuthenticAMD" */
#else
    return 0;
#endif
}

/* ---------------------------------------------------------------------------------------------------------------------
 * packing: `lines` lines (at most 16 of a panel) and `count` numbers of each, the rest of their tiles becomes zero
 * ------------------------------------------------------------------------------------------------------------------ */

static void toy_bf16_pack_portable(toy_bf16_operand x, int lines, int count, int pairs_are_rows, uint16_t *panel) {
    for (int start = 0; start < count; start += 32, panel += TOY_BF16_TILE)
        for (int line = 0; line < 16; line++)
            for (int k = 0; k < 32; k++) {
                const int inside = line < lines && start + k < count;
                const float number = inside ? x.data[line * x.line_stride + (start + k) * x.k_stride] : 0.0f;
                const int at = pairs_are_rows ? (k / 2 * 16 + line) * 2 + k % 2 : line * 32 + k;
                panel[at] = toy_bf16_rounded(number);
            }
}

#if TOY_BF16_INTRINSICS
/* 16 x 16 pairs: row i of the one is column i of the other */
TOY_TARGET_AVX512 static inline __attribute__((always_inline)) void toy_bf16_transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

TOY_TARGET_AVX512 static inline __attribute__((always_inline)) __m512i toy_bf16_both(__m512 first, __m512 second) {
    return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}

TOY_TARGET_AVX512 static void toy_bf16_pack_avx512(toy_bf16_operand x, int lines, int count, int pairs_are_rows,
                                                   uint16_t *panel) {
    const int along_k = x.k_stride == 1;
    const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __mmask16 of_lines = (__mmask16)((1u << lines) - 1);
    for (int start = 0; start < count; start += 32, panel += TOY_BF16_TILE) {
        const int left = count - start < 32 ? count - start : 32;
        __m512i r[16];
        if (along_k) {
            const __mmask16 low = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
            const __mmask16 high = left <= 16 ? 0 : (__mmask16)((1u << (left - 16)) - 1);
            for (int i = 0; i < 16; i++) {
                const float *from = x.data + i * x.line_stride + start;
                r[i] = i >= lines ? _mm512_setzero_si512()
                                  : toy_bf16_both(_mm512_maskz_loadu_ps(low, from), _mm512_maskz_loadu_ps(high, from + 16));
            }
        } else {
            for (int i = 0; i < 16; i++) {
                const float *from = x.data + (start + 2 * i) * x.k_stride;
                __m512 even = _mm512_setzero_ps(), odd = even;
                if (2 * i < left) even = _mm512_maskz_loadu_ps(of_lines, from);
                if (2 * i + 1 < left) odd = _mm512_maskz_loadu_ps(of_lines, from + x.k_stride);
                r[i] = _mm512_permutexvar_epi16(zip, toy_bf16_both(even, odd));
            }
        }
        if (along_k == pairs_are_rows) toy_bf16_transpose(r);
        for (int i = 0; i < 16; i++) _mm512_storeu_si512(panel + 32 * i, r[i]);
    }
}
#endif

/* ---------------------------------------------------------------------------------------------------------------------
 * c (32, 32) = or += two panels of a times two of b, each of `tiles` tiles; `next`: from one panel to the next
 * ------------------------------------------------------------------------------------------------------------------ */

static void toy_bf16_block_portable(const uint16_t *a, const uint16_t *b, int tiles, ptrdiff_t next, int adds,
                                    float *c, ptrdiff_t ldc) {
    for (int panel = 0; panel < 2; panel++, b += next) {
        float sums[32][16], wide[32][16];
        for (int i = 0; i < 32; i++)
            for (int j = 0; j < 16; j++) sums[i][j] = adds ? c[i * ldc + 16 * panel + j] : 0.0f;
        for (int tile = 0; tile < tiles; tile++) {
            const uint16_t *of_b = b + tile * TOY_BF16_TILE;
            for (int k = 0; k < 32; k++)
                for (int j = 0; j < 16; j++) wide[k][j] = toy_bf16_widened(of_b[(k / 2 * 16 + j) * 2 + k % 2]);
            for (int i = 0; i < 32; i++) {
                const uint16_t *of_a = a + i / 16 * next + tile * TOY_BF16_TILE + i % 16 * 32;
                float row[16];
                memcpy(row, sums[i], sizeof row);
                for (int k = 0; k < 32; k++) {
                    const float left = toy_bf16_widened(of_a[k]);
                    for (int j = 0; j < 16; j++) row[j] += left * wide[k][j];
                }
                memcpy(sums[i], row, sizeof row);
            }
        }
        for (int i = 0; i < 32; i++) memcpy(c + i * ldc + 16 * panel, sums[i], sizeof sums[i]);
    }
}

#if TOY_BF16_INTRINSICS
TOY_TARGET_AVX512 static void toy_bf16_block_avx512(const uint16_t *a, const uint16_t *b, int tiles, ptrdiff_t next, int adds,
                                                    float *c, ptrdiff_t ldc) {
    for (int i = 0; i < 32; i += 8) {
        const uint16_t *lines = a + i / 16 * next + i % 16 * 32;
        __m512 left[8], right[8];
        for (int r = 0; r < 8; r++) {
            left[r] = adds ? _mm512_loadu_ps(c + (i + r) * ldc) : _mm512_setzero_ps();
            right[r] = adds ? _mm512_loadu_ps(c + (i + r) * ldc + 16) : _mm512_setzero_ps();
        }
        for (int tile = 0; tile < tiles; tile++)
            for (int pair = 0; pair < 16; pair++) {
                const uint16_t *of_b = b + tile * TOY_BF16_TILE + pair * 32;
                const __m512bh b_left = (__m512bh)_mm512_loadu_si512(of_b);
                const __m512bh b_right = (__m512bh)_mm512_loadu_si512(of_b + next);
                for (int r = 0; r < 8; r++) {
                    int32_t both;
                    memcpy(&both, lines + tile * TOY_BF16_TILE + r * 32 + pair * 2, sizeof both);
                    const __m512bh of_a = (__m512bh)_mm512_set1_epi32(both);
                    left[r] = _mm512_dpbf16_ps(left[r], of_a, b_left);
                    right[r] = _mm512_dpbf16_ps(right[r], of_a, b_right);
                }
            }
        for (int r = 0; r < 8; r++) {
            _mm512_storeu_ps(c + (i + r) * ldc, left[r]);
            _mm512_storeu_ps(c + (i + r) * ldc + 16, right[r]);
        }
    }
}
#endif

#if TOY_BF16_AMX_INTRINSICS
/* What was written before is in memory, what is read after comes from there: GCC's intrinsics of AMX tell the compiler of no
 * more than eight bytes of what they touch. */
#define TOY_MEMORY_IS_USED(pointer) __asm__ volatile("" : : "r"(pointer) : "memory")

TOY_TARGET_AMX static void toy_bf16_block_amx(const uint16_t *a, const uint16_t *b, int tiles, ptrdiff_t next, int adds,
                                              float *c, ptrdiff_t ldc) {
    const size_t row = (size_t)ldc * sizeof(float);
    TOY_MEMORY_IS_USED(a);
    if (adds) {
        _tile_loadd(0, c, row);
        _tile_loadd(1, c + 16, row);
        _tile_loadd(2, c + 16 * ldc, row);
        _tile_loadd(3, c + 16 * ldc + 16, row);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int tile = 0; tile < tiles; tile++, a += TOY_BF16_TILE, b += TOY_BF16_TILE) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_loadd(7, b + next, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + next, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, row);
    _tile_stored(1, c + 16, row);
    _tile_stored(2, c + 16 * ldc, row);
    _tile_stored(3, c + 16 * ldc + 16, row);
    TOY_MEMORY_IS_USED(c);
}

/* Tiles are configured for each thread: ours for one product, then again what another library may rely on */
TOY_TARGET_AMX static void toy_amx_begin(unsigned char before[64]) {
    unsigned char eight_of_16_rows[64] = {1};
    for (int i = 0; i < 8; i++) eight_of_16_rows[16 + 2 * i] = 64, eight_of_16_rows[48 + i] = 16;
    _tile_storeconfig(before);
    TOY_MEMORY_IS_USED(before);
    TOY_MEMORY_IS_USED(eight_of_16_rows);
    _tile_loadconfig(eight_of_16_rows);
}

TOY_TARGET_AMX static void toy_amx_end(const unsigned char before[64]) {
    TOY_MEMORY_IS_USED(before);
    if (before[0]) _tile_loadconfig(before);
    else _tile_release();
}
#endif

/* ---------------------------------------------------------------------------------------------------------------------
 * the product
 * ------------------------------------------------------------------------------------------------------------------ */

typedef void (*toy_bf16_packer)(toy_bf16_operand, int, int, int, uint16_t *);
typedef void (*toy_bf16_block)(const uint16_t *, const uint16_t *, int, ptrdiff_t, int, float *, ptrdiff_t);

static void toy_bf16_pack(toy_bf16_packer pack, toy_bf16_operand x, int lines, int count, int pairs_are_rows, ptrdiff_t next,
                          uint16_t *to) {
    for (int line = 0; line < lines; line += 32) /* panels in twos */
        for (int panel = line; panel < line + 32; panel += 16, to += next) {
            const int left = lines - panel < 16 ? lines - panel : 16;
            if (left <= 0) {
                memset(to, 0, (size_t)next * sizeof *to);
                continue;
            }
            toy_bf16_operand part = x;
            part.data += panel * x.line_stride;
            pack(part, left, count, pairs_are_rows, to);
        }
}

static void toy_bf16_edge(toy_bf16_block block, const uint16_t *a, const uint16_t *b, int tiles, ptrdiff_t next, int adds,
                          int rows, int columns, float *c, ptrdiff_t ldc, float *edge) {
    for (int i = 0; adds && i < rows; i++) memcpy(edge + 32 * i, c + i * ldc, (size_t)columns * sizeof(float));
    block(a, b, tiles, next, adds, edge, 32);
    for (int i = 0; i < rows; i++) memcpy(c + i * ldc, edge + 32 * i, (size_t)columns * sizeof(float));
}

static toy_bf16_buffers *toy_bf16_of_this_thread(void) {
    static TOY_THREAD_LOCAL _Alignas(64) toy_bf16_buffers buffers;
    return &buffers;
}

/* c (m, n) = a b, or += where adds; the lines of a are the rows of c, those of b its columns. way: one that `toy_bf16_has` */
static void toy_bf16_product(int way, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, toy_bf16_operand a, toy_bf16_operand b, int adds,
                             float *c, ptrdiff_t ldc) {
    toy_bf16_packer pack = toy_bf16_pack_portable;
    toy_bf16_block block = toy_bf16_block_portable;
    if (m <= 0 || n <= 0) return;
    if (k <= 0) {
        for (ptrdiff_t i = 0; !adds && i < m; i++) memset(c + i * ldc, 0, (size_t)n * sizeof(float));
        return;
    }
    toy_bf16_buffers *buffers = toy_bf16_of_this_thread();
#if TOY_BF16_INTRINSICS
    if (way != TOY_BF16_PORTABLE) pack = toy_bf16_pack_avx512, block = toy_bf16_block_avx512;
#endif
#if TOY_BF16_AMX_INTRINSICS
    unsigned char before[64];
    if (way == TOY_BF16_AMX) {
        block = toy_bf16_block_amx;
        toy_amx_begin(before);
    }
#endif
    for (ptrdiff_t deep = 0; deep < k; deep += TOY_BF16_K, adds = 1) {
        const int count = (int)(k - deep < TOY_BF16_K ? k - deep : TOY_BF16_K), tiles = (count + 31) / 32;
        const ptrdiff_t next = (ptrdiff_t)tiles * TOY_BF16_TILE;
        for (ptrdiff_t right = 0; right < n; right += TOY_BF16_N) {
            const int columns = (int)(n - right < TOY_BF16_N ? n - right : TOY_BF16_N);
            toy_bf16_operand of_b = b;
            of_b.data += right * b.line_stride + deep * b.k_stride;
            toy_bf16_pack(pack, of_b, columns, count, 1, next, buffers->b);
            for (ptrdiff_t down = 0; down < m; down += TOY_BF16_M) {
                const int rows = (int)(m - down < TOY_BF16_M ? m - down : TOY_BF16_M);
                toy_bf16_operand of_a = a;
                of_a.data += down * a.line_stride + deep * a.k_stride;
                toy_bf16_pack(pack, of_a, rows, count, 0, next, buffers->a);
                for (int i = 0; i < rows; i += 32)
                    for (int j = 0; j < columns; j += 32) {
                        const uint16_t *panels_a = buffers->a + i / 16 * next, *panels_b = buffers->b + j / 16 * next;
                        float *corner = c + (down + i) * ldc + right + j;
                        if (rows - i >= 32 && columns - j >= 32) block(panels_a, panels_b, tiles, next, adds, corner, ldc);
                        else toy_bf16_edge(block, panels_a, panels_b, tiles, next, adds, rows - i < 32 ? rows - i : 32,
                                           columns - j < 32 ? columns - j : 32, corner, ldc, buffers->edge);
                    }
            }
        }
    }
#if TOY_BF16_AMX_INTRINSICS
    if (way == TOY_BF16_AMX) toy_amx_end(before);
#endif
}

#endif
