/* What the kernels share: names for AVX-512's parts, and the exponential. */

#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 16 };

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni")))
#define UNROLLED _Pragma("GCC unroll 8") /* what it indexes must be registers */

typedef uint16_t bf16;

/* The 4 bytes at `values` in every lane. */
AVX512 static inline __m512i repeated(const void *values) {
    int32_t lane;
    memcpy(&lane, values, sizeof lane);
    return _mm512_set1_epi32(lane);
}

/* 16 values as floats. */
AVX512 static inline __m512 widened(const bf16 *values) {
    const __m256i half = _mm256_loadu_si256((const __m256i *)values);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* 16 floats, the first of them as the mask says, rounded. */
AVX512 static inline void store_rounded(bf16 *to, __mmask16 mask, __m512 values) {
    _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(values));
}

/* e^x, off by at most 2 in the last place; the polynomial is Cephes' expf (S. Moshier, 1984).
   NaN stays NaN: of two operands, one of them NaN, min and max give the second. */
AVX512 static inline __m512 exponential(__m512 x) {
    x = _mm512_min_ps(_mm512_set1_ps(89), _mm512_max_ps(_mm512_set1_ps(-104), x)); /* infinity, 0 */
    const __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693359375f), x);
    rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(-2.12194440e-4f), rest);
    __m512 sum = _mm512_set1_ps(1.9875691500e-4f);
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.3981999507e-3f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(8.3334519073e-3f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(4.1665795894e-2f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.6666665459e-1f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(5.0000001201e-1f));
    sum = _mm512_fmadd_ps(_mm512_mul_ps(sum, rest), rest, _mm512_add_ps(rest, _mm512_set1_ps(1)));
    return _mm512_scalef_ps(sum, whole);
}
