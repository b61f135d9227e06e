/* The block types of GGUF files read as float32: loops that gcc and clang turn into vector code by themselves.
 *
 * A function reads n numbers (whole blocks) that start at `from` and writes them to `to`. Blocks stand back to back, so
 * nothing in them is aligned. Half-precision scales are little-endian, as this code is. Every product of a scale and a
 * small integer is exact in float32 (11 bits times at most 12), so that each number is rounded at most once, by the
 * addition of the minimum, and the result is the same bits with and without fused multiply-adds.
 *
 * Layouts: ggml-common.h of ggml, https://github.com/ggml-org/ggml; in the comments below, number j of a block.
 */
#ifndef TOY_DEQUANTIZE_H
#define TOY_DEQUANTIZE_H

#include "simd_math.h"

#if defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#endif

/* half to float, exact; without branches and without float32 subnormals in between, which some processors are slow with */
TOY_INLINE float toy_half_bits(uint32_t half) {
    const uint32_t magnitude = (half & 0x7fffu) << 13, exponent = magnitude & 0x0f800000u;
    const uint32_t normal = magnitude + (112u << 23); /* the exponent bias is 127 instead of 15 */
    const uint32_t special = normal + (112u << 23);   /* infinity and NaN: exponent 255 */
    /* subnormal: as the fraction of 2^-14 (1 + fraction), and 2^-14 taken away again */
    const uint32_t subnormal = toy_bits(toy_float(magnitude + (113u << 23)) - toy_float(113u << 23));
    uint32_t bits = exponent == 0x0f800000u ? special : normal;
    bits = exponent == 0 ? subnormal : bits;
    return toy_float(bits | (half & 0x8000u) << 16);
}

TOY_INLINE float toy_half(const uint8_t *from) {
    uint16_t half;
    memcpy(&half, from, 2);
#if defined(__F16C__)
    return _cvtsh_ss(half);
#else
    return toy_half_bits(half);
#endif
}

static void toy_read_f16(const uint8_t *TOY_RESTRICT from, float *TOY_RESTRICT to, ptrdiff_t n) {
    ptrdiff_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8) {
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(from + 2 * i))));
    }
#endif
    for (; i < n; i++) {
        uint16_t half;
        memcpy(&half, from + 2 * i, 2);
        to[i] = toy_half_bits(half);
    }
}

static void toy_read_bf16(const uint8_t *TOY_RESTRICT from, float *TOY_RESTRICT to, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i++) { /* the upper half of a float32 */
        uint16_t half;
        memcpy(&half, from + 2 * i, 2);
        to[i] = toy_float((uint32_t)half << 16);
    }
}

/* The 32-number types are read a few blocks at a time: first their numbers as bytes, in words of eight (a loop over 16 bytes
 * is too short for compilers that prefer wider vectors), then the arithmetic, as loops over 32 bytes in memory. */
enum { TOY_BLOCKS = 8 };

/* the low halves of 16 bytes, then the high halves, each as a byte */
TOY_INLINE void toy_halves_of_16(const uint8_t *from, uint64_t *q) {
    uint64_t bytes[2];
    memcpy(bytes, from, 16);
    q[0] = bytes[0] & 0x0f0f0f0f0f0f0f0fu;
    q[1] = bytes[1] & 0x0f0f0f0f0f0f0f0fu;
    q[2] = bytes[0] >> 4 & 0x0f0f0f0f0f0f0f0fu;
    q[3] = bytes[1] >> 4 & 0x0f0f0f0f0f0f0f0fu;
}

/* Eight bits as eight bytes, each 0 or 16: byte j keeps bit j alone, 127 more carry any such bit to the top of the byte */
TOY_INLINE uint64_t toy_bits_as_16(uint32_t bits) {
    const uint64_t alone = (bits & 255u) * 0x0101010101010101u & 0x8040201008040201u;
    return (alone + 0x7f7f7f7f7f7f7f7fu) >> 3 & 0x1010101010101010u;
}

TOY_INLINE void toy_fifth_bits(const uint8_t *from, uint64_t *q) {
    for (int k = 0; k < 4; k++) q[k] |= toy_bits_as_16(from[k]);
}

/* 32 numbers: d, 16 bytes; number j in the low half of byte j, number j + 16 in the high half; d (q - 8) */
static void toy_read_q4_0(const uint8_t *TOY_RESTRICT from, float *TOY_RESTRICT to, ptrdiff_t n) {
    for (ptrdiff_t left = n / 32; left > 0; left -= TOY_BLOCKS) {
        const ptrdiff_t blocks = left < TOY_BLOCKS ? left : TOY_BLOCKS;
        uint64_t words[4 * TOY_BLOCKS];
        const int8_t *q = (const int8_t *)words;
        for (ptrdiff_t k = 0; k < blocks; k++) toy_halves_of_16(from + 18 * k + 2, words + 4 * k);
        for (ptrdiff_t k = 0; k < blocks; k++, from += 18, to += 32, q += 32) {
            const float d = toy_half(from);
            for (int j = 0; j < 32; j++) to[j] = d * (float)(q[j] - 8);
        }
    }
}

/* 32 numbers: d, m, 16 bytes as in Q4_0; d q + m */
static void toy_read_q4_1(const uint8_t *TOY_RESTRICT from, float *TOY_RESTRICT to, ptrdiff_t n) {
    for (ptrdiff_t left = n / 32; left > 0; left -= TOY_BLOCKS) {
        const ptrdiff_t blocks = left < TOY_BLOCKS ? left : TOY_BLOCKS;
        uint64_t words[4 * TOY_BLOCKS];
        const int8_t *q = (const int8_t *)words;
        for (ptrdiff_t k = 0; k < blocks; k++) toy_halves_of_16(from + 20 * k + 4, words + 4 * k);
        for (ptrdiff_t k = 0; k < blocks; k++, from += 20, to += 32, q += 32) {
            const float d = toy_half(from), m = toy_half(from + 2);
            for (int j = 0; j < 32; j++) to[j] = d * (float)q[j] + m;
        }
    }
}

/* 32 numbers: d, 32 bits, 16 bytes as in Q4_0; bit j is the fifth bit of number j; d (q - 16) */
static void toy_read_q5_0(const uint8_t *TOY_RESTRICT from, float *TOY_RESTRICT to, ptrdiff_t n) {
    for (ptrdiff_t left = n / 32; left > 0; left -= TOY_BLOCKS) {
        const ptrdiff_t blocks = left < TOY_BLOCKS ? left : TOY_BLOCKS;
        uint64_t words[4 * TOY_BLOCKS];
        const int8_t *q = (const int8_t *)words;
        for (ptrdiff_t k = 0; k < blocks; k++) {
            toy_halves_of_16(from + 22 * k + 6, words + 4 * k);
            toy_fifth_bits(from + 22 * k + 2, words + 4 * k);
        }
        for (ptrdiff_t k = 0; k < blocks; k++, from += 22, to += 32, q += 32) {
            const float d = toy_half(from);
            for (int j = 0; j < 32; j++) to[j] = d * (float)(q[j] - 16);
        }
    }
}

/* 32 numbers: d, m, 32 bits and 16 bytes as in Q5_0; d q + m */
static void toy_read_q5_1(const uint8_t *TOY_RESTRICT from, float *TOY_RESTRICT to, ptrdiff_t n) {
    for (ptrdiff_t left = n / 32; left > 0; left -= TOY_BLOCKS) {
        const ptrdiff_t blocks = left < TOY_BLOCKS ? left : TOY_BLOCKS;
        uint64_t words[4 * TOY_BLOCKS];
        const int8_t *q = (const int8_t *)words;
        for (ptrdiff_t k = 0; k < blocks; k++) {
            toy_halves_of_16(from + 24 * k + 8, words + 4 * k);
            toy_fifth_bits(from + 24 * k + 4, words + 4 * k);
        }
        for (ptrdiff_t k = 0; k < blocks; k++, from += 24, to += 32, q += 32) {
            const float d = toy_half(from), m = toy_half(from + 2);
            for (int j = 0; j < 32; j++) to[j] = d * (float)q[j] + m;
        }
    }
}

/* 32 numbers: d, 32 signed bytes; d q */
static void toy_read_q8_0(const uint8_t *TOY_RESTRICT from, float *TOY_RESTRICT to, ptrdiff_t n) {
    for (; n > 0; n -= 32, from += 34, to += 32) {
        const float d = toy_half(from);
        for (int j = 0; j < 32; j++) to[j] = d * (float)(int8_t)from[2 + j];
    }
}

/* Q4_K and Q5_K have 8 pairs of a scale and a minimum, 6 bits each, in 12 bytes: pairs 0 to 3 in the low six bits of bytes
 * 0 to 3 and 4 to 7; pairs 4 to 7 with their low four bits in bytes 8 to 11 and their high two on top of those first eight. */
TOY_INLINE void toy_pair_of_six_bits(const uint8_t *from, int pair, int *scale, int *minimum) {
    if (pair < 4) {
        *scale = from[pair] & 63;
        *minimum = from[pair + 4] & 63;
    } else {
        *scale = (from[pair + 4] & 15) | (from[pair - 4] >> 6) << 4;
        *minimum = (from[pair + 4] >> 4) | (from[pair] >> 6) << 4;
    }
}

/* 256 numbers: d, dmin, 12 bytes of pairs, 128 bytes. Two times 32 numbers share 32 bytes, the first 32 in the low halves;
 * each 32 have a pair; d scale q - dmin minimum */
static void toy_read_q4_k(const uint8_t *TOY_RESTRICT from, float *TOY_RESTRICT to, ptrdiff_t n) {
    for (; n > 0; n -= 256, from += 144, to += 256) {
        const float d = toy_half(from), dmin = toy_half(from + 2);
        for (int two = 0; two < 4; two++) {
            const uint8_t *TOY_RESTRICT bytes = from + 16 + 32 * two;
            float *TOY_RESTRICT low = to + 64 * two, *TOY_RESTRICT high = low + 32;
            int scale[2], minimum[2];
            toy_pair_of_six_bits(from + 4, 2 * two, &scale[0], &minimum[0]);
            toy_pair_of_six_bits(from + 4, 2 * two + 1, &scale[1], &minimum[1]);
            const float d0 = d * (float)scale[0], m0 = dmin * (float)minimum[0];
            const float d1 = d * (float)scale[1], m1 = dmin * (float)minimum[1];
            for (int j = 0; j < 32; j++) low[j] = d0 * (float)(int)(bytes[j] & 15) - m0;
            for (int j = 0; j < 32; j++) high[j] = d1 * (float)(int)(bytes[j] >> 4) - m1;
        }
    }
}

/* 256 numbers: as Q4_K with 32 bytes before the 128; bit k of byte j is the fifth bit of number 32 k + j */
static void toy_read_q5_k(const uint8_t *TOY_RESTRICT from, float *TOY_RESTRICT to, ptrdiff_t n) {
    for (; n > 0; n -= 256, from += 176, to += 256) {
        const float d = toy_half(from), dmin = toy_half(from + 2);
        const uint8_t *TOY_RESTRICT fifth = from + 16;
        for (int two = 0; two < 4; two++) {
            const uint8_t *TOY_RESTRICT bytes = from + 48 + 32 * two;
            float *TOY_RESTRICT low = to + 64 * two, *TOY_RESTRICT high = low + 32;
            int scale[2], minimum[2];
            toy_pair_of_six_bits(from + 4, 2 * two, &scale[0], &minimum[0]);
            toy_pair_of_six_bits(from + 4, 2 * two + 1, &scale[1], &minimum[1]);
            const float d0 = d * (float)scale[0], m0 = dmin * (float)minimum[0];
            const float d1 = d * (float)scale[1], m1 = dmin * (float)minimum[1];
            for (int j = 0; j < 32; j++) {
                const int q = (int)(bytes[j] & 15) | (fifth[j] >> (2 * two) & 1) << 4;
                low[j] = d0 * (float)q - m0;
            }
            for (int j = 0; j < 32; j++) {
                const int q = (int)(bytes[j] >> 4) | (fifth[j] >> (2 * two + 1) & 1) << 4;
                high[j] = d1 * (float)q - m1;
            }
        }
    }
}

/* 256 numbers: 128 bytes, 64 bytes, 16 signed scales, d. Each half of 128 numbers has 64 bytes (four bits a number: the
 * first 64 numbers in the low halves) and 32 bytes (two bits a number: 32 numbers each, lowest first); each 16 numbers have
 * a scale; d scale (q - 32) */
static void toy_read_q6_k(const uint8_t *TOY_RESTRICT from, float *TOY_RESTRICT to, ptrdiff_t n) {
    for (; n > 0; n -= 256, from += 210, to += 256) {
        const float d = toy_half(from + 208);
        for (int half = 0; half < 2; half++) {
            const uint8_t *TOY_RESTRICT four = from + 64 * half, *TOY_RESTRICT two = from + 128 + 32 * half;
            const int8_t *scales = (const int8_t *)from + 192 + 8 * half;
            int8_t q[128];
            for (int j = 0; j < 32; j++) q[j] = (int8_t)(((four[j] & 15) | (two[j] & 3) << 4) - 32);
            for (int j = 0; j < 32; j++) q[j + 32] = (int8_t)(((four[j + 32] & 15) | (two[j] >> 2 & 3) << 4) - 32);
            for (int j = 0; j < 32; j++) q[j + 64] = (int8_t)((four[j] >> 4 | (two[j] >> 4 & 3) << 4) - 32);
            for (int j = 0; j < 32; j++) q[j + 96] = (int8_t)((four[j + 32] >> 4 | (two[j] >> 6) << 4) - 32);
            float scale[128];
            for (int group = 0; group < 8; group++) {
                const float product = d * (float)scales[group];
                for (int j = 0; j < 16; j++) scale[16 * group + j] = product;
            }
            for (int j = 0; j < 128; j++) to[128 * half + j] = scale[j] * (float)q[j];
        }
    }
}

/* A row of 32-number blocks times x without writing the row down: for each block d (sum of q x) plus what the block adds to
 * each number times the sum of x, which the caller gives for every block (`sums`, n / 32). In Q4_1 half of the range goes
 * from q to the minimum, so that no large terms cancel. Two accumulators, because each fused multiply-add waits for the one
 * before it. */
typedef float (*toy_dotter)(const uint8_t *from, const float *x, const float *sums, ptrdiff_t n);

#if defined(__GNUC__)
typedef float toy_f16s __attribute__((vector_size(64)));   /* 16 numbers, in as many registers as it takes */
typedef int32_t toy_i16s __attribute__((vector_size(64)));
typedef int8_t toy_b16s __attribute__((vector_size(16)));
typedef uint8_t toy_u16s __attribute__((vector_size(16)));

TOY_INLINE toy_f16s toy_load_16(const float *x) { toy_f16s v; memcpy(&v, x, 64); return v; }
/* what __builtin_convertvector says, which gcc 12 does number by number */
TOY_INLINE toy_f16s toy_widen(toy_b16s q) {
#if defined(__AVX512F__)
    return (toy_f16s)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)q));
#elif defined(__AVX2__)
    const __m128i low = (__m128i)q, high = _mm_unpackhi_epi64(low, low);
    const __m256 parts[2] = {
        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high)),
    };
    toy_f16s wide;
    memcpy(&wide, parts, 64);
    return wide;
#else
    return __builtin_convertvector(__builtin_convertvector(q, toy_i16s), toy_f16s);
#endif
}
TOY_INLINE float toy_total_16(toy_f16s v) {
    float total = 0.0f;
    for (int j = 0; j < 16; j++) total += v[j];
    return total;
}

/* sum of (q - 8) x over a block of 16 bytes with two numbers each */
TOY_INLINE toy_f16s toy_centred_halves(const uint8_t *from, const float *x) {
    toy_u16s bytes;
    memcpy(&bytes, from, 16);
    const toy_f16s low = toy_widen((toy_b16s)(bytes & 15) - 8), high = toy_widen((toy_b16s)(bytes >> 4) - 8);
    return low * toy_load_16(x) + high * toy_load_16(x + 16);
}

TOY_INLINE toy_f16s toy_32_bytes(const uint8_t *from, const float *x) {
    toy_b16s low, high;
    memcpy(&low, from, 16);
    memcpy(&high, from + 16, 16);
    return toy_widen(low) * toy_load_16(x) + toy_widen(high) * toy_load_16(x + 16);
}

static float toy_dot_q4_0(const uint8_t *from, const float *x, const float *sums, ptrdiff_t n) {
    toy_f16s first = {0}, second = {0};
    (void)sums;
    for (; n >= 64; n -= 64, from += 36, x += 64) {
        first += toy_half(from) * toy_centred_halves(from + 2, x);
        second += toy_half(from + 18) * toy_centred_halves(from + 20, x + 32);
    }
    if (n > 0) first += toy_half(from) * toy_centred_halves(from + 2, x);
    return toy_total_16(first + second);
}

static float toy_dot_q4_1(const uint8_t *from, const float *x, const float *sums, ptrdiff_t n) {
    toy_f16s first = {0}, second = {0};
    float minima = 0.0f, others = 0.0f;
    for (; n >= 64; n -= 64, from += 40, x += 64, sums += 2) {
        const float d = toy_half(from), e = toy_half(from + 20);
        first += d * toy_centred_halves(from + 4, x);
        second += e * toy_centred_halves(from + 24, x + 32);
        minima += (toy_half(from + 2) + 8.0f * d) * sums[0];
        others += (toy_half(from + 22) + 8.0f * e) * sums[1];
    }
    if (n > 0) {
        const float d = toy_half(from);
        first += d * toy_centred_halves(from + 4, x);
        minima += (toy_half(from + 2) + 8.0f * d) * sums[0];
    }
    return toy_total_16(first + second) + (minima + others);
}

static float toy_dot_q8_0(const uint8_t *from, const float *x, const float *sums, ptrdiff_t n) {
    toy_f16s first = {0}, second = {0};
    (void)sums;
    for (; n >= 64; n -= 64, from += 68, x += 64) {
        first += toy_half(from) * toy_32_bytes(from + 2, x);
        second += toy_half(from + 34) * toy_32_bytes(from + 36, x + 32);
    }
    if (n > 0) first += toy_half(from) * toy_32_bytes(from + 2, x);
    return toy_total_16(first + second);
}
#else
#define toy_dot_q4_0 NULL
#define toy_dot_q4_1 NULL
#define toy_dot_q8_0 NULL
#endif

/* the sums of x over blocks of 32 */
TOY_INLINE void toy_sums_of_32(const float *x, float *sums, ptrdiff_t n) {
    for (ptrdiff_t k = 0; k < n / 32; k++) {
        float total = 0.0f;
        for (int j = 0; j < 32; j++) total += x[32 * k + j];
        sums[k] = total;
    }
}

typedef void (*toy_reader)(const uint8_t *TOY_RESTRICT from, float *TOY_RESTRICT to, ptrdiff_t n);

/* number: of ggml's enum; block: numbers in a block; bytes: of a block; dot: NULL where there is none */
typedef struct { const char *name; int number, block, bytes; toy_reader read; toy_dotter dot; } toy_block_type;

static const toy_block_type toy_block_types[] = {
    {"F16", 1, 1, 2, toy_read_f16, NULL},
    {"BF16", 30, 1, 2, toy_read_bf16, NULL},
    {"Q4_0", 2, 32, 18, toy_read_q4_0, toy_dot_q4_0},
    {"Q4_1", 3, 32, 20, toy_read_q4_1, toy_dot_q4_1},
    {"Q5_0", 6, 32, 22, toy_read_q5_0, NULL},
    {"Q5_1", 7, 32, 24, toy_read_q5_1, NULL},
    {"Q8_0", 8, 32, 34, toy_read_q8_0, toy_dot_q8_0},
    {"Q4_K", 12, 256, 144, toy_read_q4_k, NULL},
    {"Q5_K", 13, 256, 176, toy_read_q5_k, NULL},
    {"Q6_K", 14, 256, 210, toy_read_q6_k, NULL},
};
enum { TOY_N_BLOCK_TYPES = sizeof(toy_block_types) / sizeof(toy_block_types[0]) };

/* One dot product for each of four rows of w (ldw numbers apart) with x: four sums in flight, x read once. */
TOY_INLINE void toy_four_dots(const float *w, ptrdiff_t ldw, const float *x, ptrdiff_t n, float *sums) {
    const float *w0 = w, *w1 = w + ldw, *w2 = w1 + ldw, *w3 = w2 + ldw;
    float s0 = 0.0f, s1 = 0.0f, s2 = 0.0f, s3 = 0.0f;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (ptrdiff_t i = 0; i < n; i++) {
        s0 += w0[i] * x[i];
        s1 += w1[i] * x[i];
        s2 += w2[i] * x[i];
        s3 += w3[i] * x[i];
    }
    sums[0] = s0;
    sums[1] = s1;
    sums[2] = s2;
    sums[3] = s3;
}

#endif
