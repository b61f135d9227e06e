/* Float functions and row reductions that gcc and clang turn into vector code by themselves.
 *
 * The functions are branch-free straight-line C, so that a loop that calls one becomes SIMD. Infinities and NaN behave
 * as in IEEE arithmetic (no -ffast-math): a run that diverged shows NaN, not a plausible number.
 *
 * A sum in vector registers is a sum in another order. `omp simd reduction` gives that permission to the loops below
 * and to nothing else (-fopenmp-simd; no OpenMP runtime is involved). The order is fixed when this is compiled, so
 * the same input gives the same bits every time.
 */
#ifndef TOY_SIMD_MATH_H
#define TOY_SIMD_MATH_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(_MSC_VER)
#define TOY_INLINE static __forceinline
#define TOY_RESTRICT __restrict
#else
#define TOY_INLINE static inline __attribute__((always_inline))
#define TOY_RESTRICT restrict
#endif

TOY_INLINE uint32_t toy_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
TOY_INLINE float toy_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }

/* exp(x), error below 1.1 ulp; exp(0) = 1, -inf -> 0, +inf -> inf, NaN -> NaN, gradual underflow.
 *
 * x = n ln 2 + r with an integer n and |r| <= ln(2)/2;  exp(x) = 2^n (1 + r + r^2 q(r)).
 * q is a degree-4 minimax fit of (exp(r) - 1 - r) / r^2, weighted so that exp(r) has an even relative error (3e-9).
 */
TOY_INLINE float toy_exp(float x) {
    const float round_to_integer = 12582912.0f; /* 1.5 * 2^23: adding it leaves the nearest integer in the low bits */
    float y = x < -104.0f ? -104.0f : x;        /* exp(-104) rounds to 0 */
    y = y > 89.0f ? 89.0f : y;                  /* exp(89) is inf */
    const float shifted = y * 1.44269504f + round_to_integer;
    const float n = shifted - round_to_integer;
    /* ln 2 in two parts; the first has so few bits that n times it is exact */
    const float r = (y - n * 0.693359375f) - n * -2.12194440e-4f;
    float q = 1.3814592e-3f;
    q = q * r + 8.3687166e-3f;
    q = q * r + 4.1668389e-2f;
    q = q * r + 1.6666521e-1f;
    q = q * r + 4.9999994e-1f;
    const float p = (q * r) * r + r + 1.0f;
    /* 2^n in two factors: n reaches -150 and 128, an exponent field holds -126 .. 127 */
    const int32_t exponent = (int32_t)(toy_bits(shifted) - toy_bits(round_to_integer));
    const int32_t half = exponent >> 1;
    return p * toy_float((uint32_t)(half + 127) << 23) * toy_float((uint32_t)(exponent - half + 127) << 23);
}

/* s = 1 / (1 + exp(-x)), and s (1 - s), its derivative. With e = exp(-|x|) <= 1 nothing overflows, and 1 - s has no
 * cancellation: s = 1 / (1 + e) or e / (1 + e), and s (1 - s) = e / (1 + e)^2. */
typedef struct { float value, derivative; } toy_sigmoid_pair;
TOY_INLINE toy_sigmoid_pair toy_sigmoid_both(float x) {
    const float e = toy_exp(-fabsf(x));
    const float larger = 1.0f / (1.0f + e), smaller = e * larger;
    const toy_sigmoid_pair both = {x < 0.0f ? smaller : larger, larger * smaller};
    return both;
}
TOY_INLINE float toy_sigmoid(float x) { return 1.0f / (1.0f + toy_exp(-x)); } /* exp(-x) = inf gives 0, as it should */

/* GELU, tanh form. (1 + tanh(u)) / 2 = sigmoid(2u), so gelu(x) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3). */
#define TOY_GELU_2U(x) (1.5957691216f * ((x) + 0.044715f * (x) * (x) * (x)))
TOY_INLINE float toy_gelu(float x) { return x * toy_sigmoid(TOY_GELU_2U(x)); }
TOY_INLINE float toy_gelu_derivative(float x) {
    const toy_sigmoid_pair s = toy_sigmoid_both(TOY_GELU_2U(x));
    const float slope = 1.5957691216f * (1.0f + 3.0f * 0.044715f * x * x); /* of 2u */
    return s.value + x * s.derivative * slope;
}

TOY_INLINE float toy_silu(float x) { return x * toy_sigmoid(x); }
TOY_INLINE float toy_silu_derivative(float x) {
    const toy_sigmoid_pair s = toy_sigmoid_both(x);
    return s.value + x * s.derivative;
}

TOY_INLINE float toy_row_sum(const float *x, ptrdiff_t n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (ptrdiff_t i = 0; i < n; i++) sum += x[i];
    return sum;
}

TOY_INLINE float toy_row_dot(const float *x, const float *y, ptrdiff_t n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (ptrdiff_t i = 0; i < n; i++) sum += x[i] * y[i];
    return sum;
}

/* out = x gamma, returns the sum of out (z - mean) and puts the sum of out in *sum. The products are stored and so
 * rounded once; fused into later subtractions they would leave rounding noise where a gradient is exactly 0. */
TOY_INLINE float toy_row_scale_and_sums(const float *x, const float *gamma, const float *z, float mean,
                                        float *TOY_RESTRICT out, float *sum, ptrdiff_t n) {
    float plain = 0.0f, dot = 0.0f;
    for (ptrdiff_t i = 0; i < n; i++) out[i] = x[i] * gamma[i];
#pragma omp simd reduction(+ : plain, dot)
    for (ptrdiff_t i = 0; i < n; i++) {
        plain += out[i];
        dot += out[i] * (z[i] - mean);
    }
    *sum = plain;
    return dot;
}

/* sum of (x - mean)^2 */
TOY_INLINE float toy_row_squared_deviation(const float *x, float mean, ptrdiff_t n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (ptrdiff_t i = 0; i < n; i++) sum += (x[i] - mean) * (x[i] - mean);
    return sum;
}

/* The largest element, -inf for n = 0. A NaN is passed over here; the exponentials that follow bring it back. */
TOY_INLINE float toy_row_max(const float *x, ptrdiff_t n) {
    float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
    for (ptrdiff_t i = 0; i < n; i++) largest = x[i] > largest ? x[i] : largest;
    return largest;
}

/* y = exp(scale * (x - shift)), returns the sum of y; x and y may be the same row */
TOY_INLINE float toy_row_exp(const float *x, float scale, float shift, float *y, ptrdiff_t n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (ptrdiff_t i = 0; i < n; i++) {
        const float e = toy_exp(scale * (x[i] - shift));
        y[i] = e;
        sum += e;
    }
    return sum;
}

/* Sum of exp(x - shift). Summed in double every 1024 elements: a vocabulary-wide float sum would lose digits. */
TOY_INLINE double toy_row_sum_exp(const float *x, float shift, ptrdiff_t n) {
    double total = 0.0;
    for (ptrdiff_t start = 0; start < n; start += 1024) {
        const ptrdiff_t end = start + 1024 < n ? start + 1024 : n;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (ptrdiff_t i = start; i < end; i++) sum += toy_exp(x[i] - shift);
        total += sum;
    }
    return total;
}

TOY_INLINE double toy_sum_of_squares(const float *x, ptrdiff_t n) {
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (ptrdiff_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    return sum;
}

#endif
