/* RMS norms in one pass over memory. */

#include <math.h>

#include "avx512.h"

enum { MIN_SHARED = 1 << 15 }; /* values from which on threads are worth waking */

/* weight * x / sqrt(mean(x * x) + epsilon), rounded before weight, too, as transformers does. */
AVX512 static void rms_norm(const bf16 *x, const bf16 *weight, bf16 *out, long size, float epsilon) {
    __m512 sum = _mm512_setzero_ps();
    for (long i = 0; i < size; i += LANES) {
        const __m512 value = widened(x + i);
        sum = _mm512_fmadd_ps(value, value, sum);
    }
    const __m512 factor = _mm512_set1_ps(1 / sqrtf(_mm512_reduce_add_ps(sum) / size + epsilon));
    for (long i = 0; i < size; i += LANES) {
        store_rounded(out + i, 0xffff, _mm512_mul_ps(widened(x + i), factor));
        store_rounded(out + i, 0xffff, _mm512_mul_ps(widened(out + i), widened(weight + i)));
    }
}

/* rows, out: [num_rows, size]; size: a multiple of 16. */
void baton_rms_norm(const bf16 *rows, const bf16 *weight, bf16 *out, long num_rows, long size,
                    float epsilon, int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_rows * size >= MIN_SHARED)
    for (long row = 0; row < num_rows; row++)
        rms_norm(rows + row * size, weight, out + row * size, size, epsilon);
}
