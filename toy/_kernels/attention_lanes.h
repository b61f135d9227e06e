/* Attention of a block of query rows with one query in each lane of a vector.
 *
 * Scores, probabilities and their gradients of a block are matrices (keys, TOY_BLOCK): a row for each key, in it one number
 * for each query of the block. In this form the largest score of a query, the sum of its exponentials and everything else
 * that the softmax does goes down a column: no sum inside a vector. The queries themselves, their outputs and gradients are
 * transposed, (d_head, TOY_BLOCK); keys and values are read where they lie, a number at a time. So all five products of a
 * training step have one shape, numbers times vectors, and `toy_multiply` does them without packing anything.
 *
 * Every element of a product is one chain of fused multiply-adds in the order of the sum, whatever tile it falls into: the
 * backward finds the same scores as the forward, bit by bit.
 *
 * TOY_LANES is 0 where the compiler has no vector types or is told to use no fused multiply-add: sgemm, which picks its
 * instructions when it runs, is then faster.
 */
#ifndef TOY_ATTENTION_LANES_H
#define TOY_ATTENTION_LANES_H

#include "simd_math.h"

#if defined(__GNUC__) && defined(__AVX512F__)
#include <immintrin.h>
#define TOY_LANES 16
#elif defined(__GNUC__) && defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define TOY_LANES 8
#elif defined(__GNUC__) && defined(__aarch64__)
#include <arm_neon.h>
#define TOY_LANES 4
#else
#define TOY_LANES 0
#endif

typedef struct { const float *x; ptrdiff_t x_row, rows; int to_write; } toy_fetch_list;
typedef struct {
    toy_fetch_list lists[7];
    int first, n;                    /* lists first .. n-1 are left */
    ptrdiff_t columns, rows_a_tile;
} toy_fetch;

#if TOY_LANES

#define TOY_BLOCK (2 * TOY_LANES) /* query rows of a block: two vectors, a left and a right one */

/* Rows of the largest tile. Its sums fill the registers: 12 x 2 of 32, or 6 x 2 of the 16 that AVX2 has; a vector to
 * multiply with and its numbers take some of the others. Fewer sums than 8 would wait for each other. */
#if defined(__AVX512F__) || defined(__aarch64__)
#define TOY_TILE 12
#else
#define TOY_TILE 6
#endif

typedef float toy_lanes __attribute__((vector_size(4 * TOY_LANES)));
typedef int32_t toy_lane_bits __attribute__((vector_size(4 * TOY_LANES)));
typedef float toy_lanes_anywhere __attribute__((vector_size(4 * TOY_LANES), aligned(4), may_alias));

TOY_INLINE toy_lanes toy_get(const float *x) { return *(const toy_lanes_anywhere *)x; }
TOY_INLINE void toy_put(float *x, toy_lanes v) { *(toy_lanes_anywhere *)x = v; }
TOY_INLINE toy_lanes toy_all(float x) { return x - (toy_lanes){0}; }

/* lane by lane x > y ? x : y: a NaN in x is passed over */
TOY_INLINE toy_lanes toy_larger(toy_lanes x, toy_lanes y) {
#if defined(__AVX512F__)
    return (toy_lanes)_mm512_max_ps((__m512)x, (__m512)y);
#elif defined(__AVX2__)
    return (toy_lanes)_mm256_max_ps((__m256)x, (__m256)y);
#else
    const toy_lane_bits take = x > y;
    return (toy_lanes)((take & (toy_lane_bits)x) | (~take & (toy_lane_bits)y));
#endif
}

/* 2^x for x <= 0 and for the little above it that rounding makes, error below 1.5 ulp; 2^0 = 1, NaN -> NaN, 0 below -126.5
 * (no denormal numbers: the products that follow would be slow on them).
 *
 * x = n + f with an integer n and |f| <= 1/2; 2^f = 1 + f ln 2 + (f ln 2)^2 q(f ln 2) with the q of `toy_exp`. The integer is
 * in the low bits of x + 1.5 * 2^23 + 127, so that moved up they are the exponent of 2^n, for n = -127 the number 0. */
TOY_INLINE toy_lanes toy_exp2_of_negative(toy_lanes x) {
    const double ln2 = 0.693147180559945309;
    const float round_to_exponent = 12582912.0f + 127.0f;
    x = toy_larger(toy_all(-127.0f), x); /* in this order a NaN stays */
    const toy_lanes shifted = x + round_to_exponent;
    const toy_lanes f = x - (shifted - round_to_exponent);
    toy_lanes p = toy_all((float)(1.3814592e-3 * ln2 * ln2 * ln2 * ln2 * ln2 * ln2));
    p = p * f + (float)(8.3687166e-3 * ln2 * ln2 * ln2 * ln2 * ln2);
    p = p * f + (float)(4.1668389e-2 * ln2 * ln2 * ln2 * ln2);
    p = p * f + (float)(1.6666521e-1 * ln2 * ln2 * ln2);
    p = p * f + (float)(4.9999994e-1 * ln2 * ln2);
    p = p * f + (float)ln2;
    p = p * f + 1.0f;
    return p * (toy_lanes)((toy_lane_bits)shifted << 23);
}

/* ---- what is needed next ---------------------------------------------------------------------------------------------- */

/* Rows of matrices that will soon be read or written. Between the rows of a head lie those of the others, so the hardware does
 * not see them coming; and all asked for at once they would stop the processor, which waits for a dozen lines at a time and
 * no more. So `toy_multiply` asks for some after each tile. */
TOY_INLINE void toy_fetch_some(toy_fetch *fetch) {
    for (ptrdiff_t rows = fetch->rows_a_tile; rows > 0 && fetch->first < fetch->n; rows--) {
        toy_fetch_list *list = &fetch->lists[fetch->first];
        for (ptrdiff_t j = 0; j < fetch->columns; j += 16) {
            if (list->to_write) __builtin_prefetch(list->x + j, 1, 3);
            else __builtin_prefetch(list->x + j, 0, 2);
        }
        list->x += list->x_row;
        if (--list->rows == 0) fetch->first++;
    }
}

/* ---- products --------------------------------------------------------------------------------------------------------- */

/* A tile of `toy_multiply`: its constants make the compiler unroll it and keep the sums in registers. */
TOY_INLINE void toy_tile(const int rows, const int columns, ptrdiff_t n, const float *a, ptrdiff_t a_row, ptrdiff_t a_step,
                         const float *b, ptrdiff_t b_step, float *c, ptrdiff_t c_row, int add) {
    toy_lanes sums[TOY_TILE][2];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int j = 0; j < columns; j++) sums[i][j] = (toy_lanes){0};
    for (ptrdiff_t k = 0; k < n; k++, a += a_step, b += b_step) {
        const toy_lanes left = toy_get(b), right = columns == 2 ? toy_get(b + TOY_LANES) : left;
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            const float number = a[i * a_row];
            sums[i][0] += number * left;
            if (columns == 2) sums[i][1] += number * right;
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int j = 0; j < columns; j++) {
            float *place = c + i * c_row + j * TOY_LANES;
            toy_put(place, add ? toy_get(place) + sums[i][j] : sums[i][j]);
        }
}

TOY_INLINE void toy_multiply_columns(const int columns, ptrdiff_t rows, ptrdiff_t n, const float *a, ptrdiff_t a_row,
                                     ptrdiff_t a_step, const float *b, ptrdiff_t b_step, float *c, ptrdiff_t c_row, int add,
                                     toy_fetch *fetch) {
#define TOY_TILES(ROWS) \
    toy_tile(ROWS, columns, n, a, a_row, a_step, b, b_step, c, c_row, add), rows -= ROWS, a += ROWS * a_row, c += ROWS * c_row
    while (rows > 0) {
        /* the last rows in two tiles of about the same height, not in one that is full and one that is nearly empty */
#if TOY_TILE == 12
        if (rows >= 12 && rows != 16) TOY_TILES(12);
        else if (rows >= 8) TOY_TILES(8);
#else
        if (rows >= 6 && rows != 8) TOY_TILES(6);
#endif
        else if (rows >= 4) TOY_TILES(4);
        else if (rows >= 2) TOY_TILES(2);
        else TOY_TILES(1);
        toy_fetch_some(fetch);
    }
#undef TOY_TILES
}

/* c (rows, columns * TOY_LANES) = a (rows, n) b (n, columns * TOY_LANES), or with `add` that much more; columns: 1 or 2.
 * Steps in elements: a_row from a row of a to the next, a_step from a column of it to the next (one of the two is 1). */
static void toy_multiply(int columns, ptrdiff_t rows, ptrdiff_t n, const float *a, ptrdiff_t a_row, ptrdiff_t a_step,
                         const float *b, ptrdiff_t b_step, float *c, ptrdiff_t c_row, int add, toy_fetch *fetch) {
    if (a_row == 1) {
        if (columns == 2) toy_multiply_columns(2, rows, n, a, 1, a_step, b, b_step, c, c_row, add, fetch);
        else toy_multiply_columns(1, rows, n, a, 1, a_step, b, b_step, c, c_row, add, fetch);
    } else {
        if (columns == 2) toy_multiply_columns(2, rows, n, a, a_row, 1, b, b_step, c, c_row, add, fetch);
        else toy_multiply_columns(1, rows, n, a, a_row, 1, b, b_step, c, c_row, add, fetch);
    }
}

/* ---- into lanes and out of them --------------------------------------------------------------------------------------- */

/* The rows x[0], x[4], x[8], ... of four numbers each, one after another in a vector, and back. */
TOY_INLINE toy_lanes toy_join_rows(const float *const *x, ptrdiff_t j) {
#if defined(__AVX512F__)
    const __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(x[0] + j)), _mm_loadu_ps(x[4] + j), 1);
    const __m256 high = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(x[8] + j)), _mm_loadu_ps(x[12] + j), 1);
    return (toy_lanes)_mm512_castpd_ps(
        _mm512_insertf64x4(_mm512_castpd256_pd512(_mm256_castps_pd(low)), _mm256_castps_pd(high), 1));
#elif defined(__AVX2__)
    return (toy_lanes)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(x[0] + j)), _mm_loadu_ps(x[4] + j), 1);
#else
    return toy_get(x[0] + j);
#endif
}
TOY_INLINE void toy_part_rows(toy_lanes v, float *const *x, ptrdiff_t j) {
#if defined(__AVX512F__)
    _mm_storeu_ps(x[0] + j, _mm512_castps512_ps128((__m512)v));
    _mm_storeu_ps(x[4] + j, _mm512_extractf32x4_ps((__m512)v, 1));
    _mm_storeu_ps(x[8] + j, _mm512_extractf32x4_ps((__m512)v, 2));
    _mm_storeu_ps(x[12] + j, _mm512_extractf32x4_ps((__m512)v, 3));
#elif defined(__AVX2__)
    _mm_storeu_ps(x[0] + j, _mm256_castps256_ps128((__m256)v));
    _mm_storeu_ps(x[4] + j, _mm256_extractf128_ps((__m256)v, 1));
#else
    toy_put(x[0] + j, v);
#endif
}

/* Transpose the 4 x 4 matrices that stand side by side in four vectors. */
#if defined(__AVX512F__)
#define TOY_MIX(NAME, x, y) ((toy_lanes)_mm512_##NAME##_ps((__m512)(x), (__m512)(y)))
#define TOY_HALVES(x, y, which) ((toy_lanes)_mm512_shuffle_ps((__m512)(x), (__m512)(y), which))
#elif defined(__AVX2__)
#define TOY_MIX(NAME, x, y) ((toy_lanes)_mm256_##NAME##_ps((__m256)(x), (__m256)(y)))
#define TOY_HALVES(x, y, which) ((toy_lanes)_mm256_shuffle_ps((__m256)(x), (__m256)(y), which))
#else
#define TOY_MIX(NAME, x, y) toy_##NAME(x, y)
#define TOY_HALVES(x, y, which) toy_halves_##which(x, y)
TOY_INLINE toy_lanes toy_unpacklo(toy_lanes x, toy_lanes y) { return (toy_lanes)vzip1q_f32((float32x4_t)x, (float32x4_t)y); }
TOY_INLINE toy_lanes toy_unpackhi(toy_lanes x, toy_lanes y) { return (toy_lanes)vzip2q_f32((float32x4_t)x, (float32x4_t)y); }
TOY_INLINE toy_lanes toy_halves_0x44(toy_lanes x, toy_lanes y) {
    return (toy_lanes)vzip1q_f64((float64x2_t)x, (float64x2_t)y);
}
TOY_INLINE toy_lanes toy_halves_0xee(toy_lanes x, toy_lanes y) {
    return (toy_lanes)vzip2q_f64((float64x2_t)x, (float64x2_t)y);
}
#endif
TOY_INLINE void toy_turn(toy_lanes rows[4]) {
    const toy_lanes a = TOY_MIX(unpacklo, rows[0], rows[1]), b = TOY_MIX(unpacklo, rows[2], rows[3]);
    const toy_lanes c = TOY_MIX(unpackhi, rows[0], rows[1]), d = TOY_MIX(unpackhi, rows[2], rows[3]);
    rows[0] = TOY_HALVES(a, b, 0x44);
    rows[1] = TOY_HALVES(a, b, 0xee);
    rows[2] = TOY_HALVES(c, d, 0x44);
    rows[3] = TOY_HALVES(c, d, 0xee);
}

/* x (rows, n) -> lanes (n, TOY_BLOCK); the lanes after the last row, of the columns that have rows, repeat it */
static void toy_into_lanes(ptrdiff_t rows, ptrdiff_t n, const float *x, ptrdiff_t x_row, float *lanes) {
    for (ptrdiff_t i = 0; i < rows; i += TOY_LANES, lanes += TOY_LANES) {
        const float *row[TOY_LANES];
        for (ptrdiff_t l = 0; l < TOY_LANES; l++) row[l] = x + (i + l < rows ? i + l : rows - 1) * x_row;
        ptrdiff_t j = 0;
        for (; j + 4 <= n; j += 4) {
            toy_lanes four[4];
#pragma GCC unroll 4
            for (int l = 0; l < 4; l++) four[l] = toy_join_rows(row + l, j);
            toy_turn(four);
#pragma GCC unroll 4
            for (int l = 0; l < 4; l++) toy_put(lanes + (j + l) * TOY_BLOCK, four[l]);
        }
        for (; j < n; j++)
            for (int l = 0; l < TOY_LANES; l++) lanes[j * TOY_BLOCK + l] = row[l][j];
    }
}

/* lanes (n, TOY_BLOCK), each lane times its factor -> x (rows, n); the lanes are scratch afterwards */
static void toy_out_of_lanes(ptrdiff_t rows, ptrdiff_t n, float *lanes, const float *factors, float *x, ptrdiff_t x_row) {
    for (ptrdiff_t i = 0; i < rows; i += TOY_LANES, lanes += TOY_LANES, factors += TOY_LANES) {
        const ptrdiff_t end = rows - i < TOY_LANES ? rows - i : TOY_LANES;
        const toy_lanes factor = toy_get(factors);
        float *row[TOY_LANES];
        /* a lane without a row goes to the beginning of the lanes, which has been read by then */
        for (ptrdiff_t l = 0; l < TOY_LANES; l++) row[l] = l < end ? x + (i + l) * x_row : lanes;
        ptrdiff_t j = 0;
        for (; j + 4 <= n; j += 4) {
            toy_lanes four[4];
#pragma GCC unroll 4
            for (int l = 0; l < 4; l++) four[l] = factor * toy_get(lanes + (j + l) * TOY_BLOCK);
            toy_turn(four);
#pragma GCC unroll 4
            for (int l = 0; l < 4; l++) toy_part_rows(four[l], row + l, j);
        }
        for (; j < n; j++)
            for (ptrdiff_t l = 0; l < end; l++) row[l][j] = factors[l] * lanes[j * TOY_BLOCK + l];
    }
}

/* x (rows, n) -> copy (rows, n), whose rows are close together */
static void toy_copy_rows(ptrdiff_t rows, ptrdiff_t n, const float *x, ptrdiff_t x_row, float *copy) {
    for (ptrdiff_t i = 0; i < rows; i++, x += x_row, copy += n) {
        ptrdiff_t j = 0;
        for (; j + TOY_LANES <= n; j += TOY_LANES) toy_put(copy + j, toy_get(x + j));
        for (; j < n; j++) copy[j] = x[j];
    }
}

/* ---- softmax, down a column of TOY_LANES queries ------------------------------------------------------------------------
 * `scores`, `p`, `d_p`: the first of n keys of that column, TOY_BLOCK floats from one key to the next */

/* Put `value` where a query does not see the key: lane i sees the keys first + i .. last + i, and the rows are the keys
 * key, key + 1, ... */
static void toy_hide_keys(float *scores, ptrdiff_t n, ptrdiff_t key, ptrdiff_t first, ptrdiff_t last, float value) {
    toy_lane_bits lane;
    for (int i = 0; i < TOY_LANES; i++) lane[i] = i;
    const toy_lane_bits bits = (toy_lane_bits)toy_all(value);
    for (ptrdiff_t j = 0; j < n; j++, key++, scores += TOY_BLOCK) {
        const int below = (int)(key - last < TOY_LANES ? key - last : TOY_LANES); /* lanes before it do not see so far */
        const int above = (int)(key - first < TOY_LANES ? key - first : TOY_LANES); /* lanes after it have it behind them */
        const toy_lane_bits hide = (lane < below) | (lane > above);
        toy_put(scores, (toy_lanes)((hide & bits) | (~hide & (toy_lane_bits)toy_get(scores))));
    }
}

/* tanh(x), error below 3 ulp, NaN -> NaN. Near 0 it is x + x^3 q(x^2), q interpolated at Chebyshev's points (3e-8); elsewhere
 * (1 - e) / (1 + e) with e = exp(-2 |x|). */
TOY_INLINE toy_lanes toy_tanh(toy_lanes x) {
    const toy_lane_bits sign = (toy_lane_bits)x & INT32_MIN;
    const toy_lanes size = (toy_lanes)((toy_lane_bits)x & INT32_MAX), square = x * x;
    const toy_lanes e = toy_exp2_of_negative(size * -2.88539008f);
    const toy_lanes far = (toy_lanes)((toy_lane_bits)((1.0f - e) / (1.0f + e)) | sign);
    toy_lanes q = toy_all(-5.9329797e-3f);
    q = q * square + 2.0881319e-2f;
    q = q * square - 5.3825848e-2f;
    q = q * square + 1.3332602e-1f;
    q = q * square - 3.3333327e-1f;
    const toy_lane_bits is_near = size < 0.625f;
    return (toy_lanes)((is_near & (toy_lane_bits)(x + x * square * q)) | (~is_near & (toy_lane_bits)far));
}

/* scores -> softcap tanh(scale score / softcap); slopes, unless NULL: the derivatives of that by scale score */
static void toy_cap_scores(float *scores, ptrdiff_t n, float scale, float softcap, float *slopes) {
    for (ptrdiff_t j = 0; j < n; j++, scores += TOY_BLOCK) {
        const toy_lanes share = toy_tanh(toy_get(scores) * (scale / softcap));
        toy_put(scores, share * softcap);
        if (slopes) toy_put(slopes + j * TOY_BLOCK, 1.0f - share * share);
    }
}

/* largest: (TOY_LANES,), of it and the scores the larger */
static void toy_largest_scores(const float *scores, ptrdiff_t n, float *largest) {
    toy_lanes most = toy_get(largest), other = most;
    for (; n >= 2; n -= 2, scores += 2 * TOY_BLOCK) {
        most = toy_larger(toy_get(scores), most);
        other = toy_larger(toy_get(scores + TOY_BLOCK), other);
    }
    if (n) most = toy_larger(toy_get(scores), most);
    toy_put(largest, toy_larger(most, other));
}

/* scores -> exp(scale (score - largest)); their sums are added to total (TOY_LANES,) */
static void toy_exp_scores(float *scores, ptrdiff_t n, float scale, const float *largest, float *total) {
    const float to_powers_of_two = (float)(scale * 1.44269504088896341);
    const toy_lanes shift = toy_get(largest);
    toy_lanes sum = {0};
    for (ptrdiff_t j = 0; j < n; j++, scores += TOY_BLOCK) {
        const toy_lanes p = toy_exp2_of_negative((toy_get(scores) - shift) * to_powers_of_two);
        toy_put(scores, p);
        sum += p;
    }
    toy_put(total, toy_get(total) + sum);
}

/* the same, and the sums of p d_p are added to expected (TOY_LANES,) */
static void toy_exp_scores_and_expect(float *scores, const float *d_p, ptrdiff_t n, float scale, const float *largest,
                                      float *total, float *expected) {
    const float to_powers_of_two = (float)(scale * 1.44269504088896341);
    const toy_lanes shift = toy_get(largest);
    toy_lanes sum = {0}, dot = {0};
    for (ptrdiff_t j = 0; j < n; j++, scores += TOY_BLOCK, d_p += TOY_BLOCK) {
        const toy_lanes p = toy_exp2_of_negative((toy_get(scores) - shift) * to_powers_of_two);
        toy_put(scores, p);
        sum += p;
        dot += p * toy_get(d_p);
    }
    toy_put(total, toy_get(total) + sum);
    toy_put(expected, toy_get(expected) + dot);
}

/* p -> p inverse, the probabilities; d_p -> p (d_p - expected) scale, times the slopes unless NULL: the gradient of the
 * scores before they were scaled */
static void toy_d_scores(float *p, float *d_p, ptrdiff_t n, float scale, const float *inverse, const float *expected,
                         const float *slopes) {
    const toy_lanes factor = toy_get(inverse), mean = toy_get(expected);
    for (ptrdiff_t j = 0; j < n; j++, p += TOY_BLOCK, d_p += TOY_BLOCK) {
        const toy_lanes probability = toy_get(p) * factor;
        toy_put(p, probability);
        const toy_lanes d_score = probability * (toy_get(d_p) - mean) * scale;
        toy_put(d_p, slopes ? d_score * toy_get(slopes + j * TOY_BLOCK) : d_score);
    }
}

#else

/* the names, for code that asks for TOY_LANES first */
#define TOY_BLOCK 1
#define TOY_TILE 1
#define toy_multiply(...) ((void)0)
#define toy_into_lanes(...) ((void)0)
#define toy_out_of_lanes(...) ((void)0)
#define toy_copy_rows(...) ((void)0)
#define toy_hide_keys(...) ((void)0)
#define toy_cap_scores(...) ((void)0)
#define toy_largest_scores(...) ((void)0)
#define toy_exp_scores(...) ((void)0)
#define toy_exp_scores_and_expect(...) ((void)0)
#define toy_d_scores(...) ((void)0)

#endif
#endif
