/* Products of few or many rows with a weight, for CPUs with AVX-512 BF16 and VNNI.

   A weight [out_features, in_features] lies in blocks of 64 outputs, and each block in the order in
   which it is multiplied: all 64 outputs of 2 (bfloat16) or 4 (int8) inputs after one another. A
   block is then one stream of memory, read once for up to 6 rows. oneDNN's kernel for one row of
   bfloat16 reads at half the speed of memory on such CPUs; this one reads as fast as memory gives.

   A row's sums are added in the same order however many rows there are: its result does not depend
   on its batch. Rows are contiguous; sizes and addresses are checked by the caller, kernels.py. */

#include "avx512.h"

enum { BLOCK = 64, VECTORS = BLOCK / LANES, MAX_ROWS = 6 };
enum { NO_ACTIVATION, SILU, GELU_TANH };

typedef struct {
    bf16 *out;         /* [num_rows, out_features] */
    const float *bias; /* of each packed output, or null */
    long out_features;
    int activation; /* one: a block is 32 outputs of a gate, then 32 that it multiplies */
} Output;

/* x * sigmoid(s), where s is x for SiLU; the tanh form of GELU is the same with its own s. */
AVX512 static inline __m512 activated(__m512 x, int activation) {
    __m512 s = x;
    if (activation == GELU_TANH) {
        const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
        s = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x);
        s = _mm512_mul_ps(s, _mm512_set1_ps(1.59576912f)); /* 2 sqrt(2 / pi) */
    }
    const __m512 power = exponential(_mm512_sub_ps(_mm512_setzero_ps(), s));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1), power));
}

/* Writes what a block of sums comes to. */
AVX512 static void finish(float sums[][BLOCK], long block, long first_row, long rows, Output to) {
    const int vectors = to.activation ? VECTORS / 2 : VECTORS;
    const long first = block * vectors * LANES;
    for (long row = 0; row < rows; row++) {
        bf16 *out = to.out + (first_row + row) * to.out_features + first;
        for (int i = 0; i < vectors && first + i * LANES < to.out_features; i++) {
            __m512 value = _mm512_loadu_ps(sums[row] + i * LANES);
            const float *bias = to.bias ? to.bias + block * BLOCK + i * LANES : 0;
            if (bias) value = _mm512_add_ps(value, _mm512_loadu_ps(bias));
            if (to.activation) {
                __m512 factor = _mm512_loadu_ps(sums[row] + BLOCK / 2 + i * LANES);
                if (bias) factor = _mm512_add_ps(factor, _mm512_loadu_ps(bias + BLOCK / 2));
                value = _mm512_mul_ps(activated(value, to.activation), factor);
            }
            const long left = to.out_features - first - i * LANES;
            const __mmask16 mask = left < LANES ? (1 << left) - 1 : 0xffff;
            store_rounded(out + i * LANES, mask, value);
        }
    }
}

/* `rows` rows from `row` on come next: as many as there are registers, in nearly equal parts. */
static long next_rows(long num_rows, long row, long max_rows) {
    const long left = num_rows - row;
    return left <= max_rows ? left : left < 2 * max_rows ? (left + 1) / 2 : max_rows;
}

#define BF16_BLOCK(ROWS)                                                                          \
    AVX512 static void bf16_block_##ROWS(const bf16 *rows, const bf16 *weight, long in_features, \
                                         float sums[][BLOCK]) {                                   \
        __m512 sum[ROWS][VECTORS];                                                                \
        UNROLLED for (int r = 0; r < ROWS; r++)                                                   \
            UNROLLED for (int i = 0; i < VECTORS; i++) sum[r][i] = _mm512_setzero_ps();           \
        for (long k = 0; k < in_features; k += 2, weight += 2 * BLOCK) {                          \
            __m512i w[VECTORS];                                                                   \
            UNROLLED for (int i = 0; i < VECTORS; i++)                                            \
                w[i] = _mm512_loadu_si512(weight + 2 * LANES * i);                                \
            UNROLLED for (int r = 0; r < ROWS; r++) {                                             \
                const __m512bh x = (__m512bh)repeated(rows + r * in_features + k);                \
                UNROLLED for (int i = 0; i < VECTORS; i++)                                        \
                    sum[r][i] = _mm512_dpbf16_ps(sum[r][i], (__m512bh)w[i], x);                   \
            }                                                                                     \
        }                                                                                         \
        UNROLLED for (int r = 0; r < ROWS; r++)                                                   \
            UNROLLED for (int i = 0; i < VECTORS; i++)                                            \
                _mm512_storeu_ps(sums[r] + LANES * i, sum[r][i]);                                 \
    }
BF16_BLOCK(1)
BF16_BLOCK(2)
BF16_BLOCK(3)
BF16_BLOCK(4)
BF16_BLOCK(5)
BF16_BLOCK(6)

typedef void (*Bf16Block)(const bf16 *, const bf16 *, long, float[][BLOCK]);
static const Bf16Block BF16_BLOCKS[] = {0,            bf16_block_1, bf16_block_2, bf16_block_3,
                                        bf16_block_4, bf16_block_5, bf16_block_6};

/* weight: [num_blocks, in_features / 2, 64, 2]. */
void baton_bf16(const bf16 *rows, const bf16 *weight, const float *bias, bf16 *out, long num_rows,
                long in_features, long out_features, long num_blocks, int activation,
                int num_threads) {
    const Output to = {out, bias, out_features, activation};
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (long block = 0; block < num_blocks; block++) {
        float sums[MAX_ROWS][BLOCK];
        for (long row = 0, n; row < num_rows; row += n) {
            n = next_rows(num_rows, row, MAX_ROWS);
            BF16_BLOCKS[n](rows + row * in_features, weight + block * BLOCK * in_features,
                           in_features, sums);
            finish(sums, block, row, n, to);
        }
    }
}

/* int8: a row x goes in as unit * (254 * high + low) with both in int8, so that 15 bits and a sign of
   it are kept, more than bfloat16 has. Sums are exact. */
enum { MAX_INT8_ROWS = MAX_ROWS / 2, INT8_LARGEST = 127, SPLIT = 2 * INT8_LARGEST, ZERO = 128 };

typedef struct {
    float unit;
    int32_t high_offset, low_offset; /* weights go in as uint8: this much too many of each half */
} Rounding;

/* halves: [2, in_features], high and low. */
AVX512 static Rounding rounded(const bf16 *row, long in_features, int8_t *halves) {
    __m512 most = _mm512_set1_ps(1e-30f);
    __m512 tainted = _mm512_setzero_ps(); /* x * 0: NaN for NaN and infinity */
    for (long k = 0; k < in_features; k += LANES) {
        const __m512 x = widened(row + k);
        most = _mm512_max_ps(most, _mm512_abs_ps(x));
        tainted = _mm512_fmadd_ps(x, _mm512_setzero_ps(), tainted);
    }
    /* As a whole number NaN would look like any other: the unit carries it to every output. */
    const float unit =
        _mm512_reduce_max_ps(most) / (INT8_LARGEST * SPLIT) + _mm512_reduce_add_ps(tainted);
    __m512i highs = _mm512_setzero_si512(), lows = highs;
    for (long k = 0; k < in_features; k += LANES) {
        const __m512 x = _mm512_div_ps(widened(row + k), _mm512_set1_ps(unit));
        const __m512 high = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.f / SPLIT)), 0);
        const __m512i h = _mm512_cvtps_epi32(high);
        const __m512i l = _mm512_cvtps_epi32(_mm512_fnmadd_ps(high, _mm512_set1_ps(SPLIT), x));
        highs = _mm512_add_epi32(highs, h);
        lows = _mm512_add_epi32(lows, l);
        _mm_storeu_si128((__m128i *)(halves + k), _mm512_cvtsepi32_epi8(h));
        _mm_storeu_si128((__m128i *)(halves + in_features + k), _mm512_cvtsepi32_epi8(l));
    }
    return (Rounding){unit, ZERO * _mm512_reduce_add_epi32(highs),
                      ZERO * _mm512_reduce_add_epi32(lows)};
}

#define INT8_BLOCK(ROWS)                                                                          \
    AVX512 static void int8_block_##ROWS(const int8_t *halves, const uint8_t *weight,             \
                                         long in_features, int32_t sums[][BLOCK]) {               \
        __m512i sum[2 * ROWS][VECTORS];                                                           \
        UNROLLED for (int r = 0; r < 2 * ROWS; r++)                                               \
            UNROLLED for (int i = 0; i < VECTORS; i++) sum[r][i] = _mm512_setzero_si512();        \
        for (long k = 0; k < in_features; k += 4, weight += 4 * BLOCK) {                          \
            __m512i w[VECTORS];                                                                   \
            UNROLLED for (int i = 0; i < VECTORS; i++)                                            \
                w[i] = _mm512_loadu_si512(weight + 4 * LANES * i);                                \
            UNROLLED for (int r = 0; r < 2 * ROWS; r++) {                                         \
                const __m512i x = repeated(halves + r * in_features + k);                         \
                UNROLLED for (int i = 0; i < VECTORS; i++)                                        \
                    sum[r][i] = _mm512_dpbusd_epi32(sum[r][i], w[i], x);                          \
            }                                                                                     \
        }                                                                                         \
        UNROLLED for (int r = 0; r < 2 * ROWS; r++)                                               \
            UNROLLED for (int i = 0; i < VECTORS; i++)                                            \
                _mm512_storeu_si512(sums[r] + LANES * i, sum[r][i]);                              \
    }
INT8_BLOCK(1)
INT8_BLOCK(2)
INT8_BLOCK(3)

typedef void (*Int8Block)(const int8_t *, const uint8_t *, long, int32_t[][BLOCK]);
static const Int8Block INT8_BLOCKS[] = {0, int8_block_1, int8_block_2, int8_block_3};

/* Sums of whole numbers to sums of what they stand for. scale: of each output of the block. */
AVX512 static void scaled(int32_t whole[][BLOCK], const Rounding *roundings, const float *scale,
                          long rows, float sums[][BLOCK]) {
    for (long row = 0; row < rows; row++) {
        const Rounding r = roundings[row];
        for (int i = 0; i < BLOCK; i += LANES) {
            const __m512i h = _mm512_sub_epi32(_mm512_loadu_si512(whole[2 * row] + i),
                                               _mm512_set1_epi32(r.high_offset));
            const __m512i l = _mm512_sub_epi32(_mm512_loadu_si512(whole[2 * row + 1] + i),
                                               _mm512_set1_epi32(r.low_offset));
            const __m512 sum =
                _mm512_fmadd_ps(_mm512_cvtepi32_ps(h), _mm512_set1_ps(SPLIT), _mm512_cvtepi32_ps(l));
            const __m512 unit = _mm512_mul_ps(_mm512_set1_ps(r.unit), _mm512_loadu_ps(scale + i));
            _mm512_storeu_ps(sums[row] + i, _mm512_mul_ps(sum, unit));
        }
    }
}

/* weight: int8 plus 128, [num_blocks, in_features / 4, 64, 4]; scale: [num_blocks, 64].
   halves: room for [num_rows, 2, in_features]; roundings: room for one of each row. */
void baton_int8(const bf16 *rows, const uint8_t *weight, const float *scale, const float *bias,
                bf16 *out, int8_t *halves, Rounding *roundings, long num_rows, long in_features,
                long out_features, long num_blocks, int activation, int num_threads) {
    const Output to = {out, bias, out_features, activation};
    /* Few rows take less time than a thread takes to come. */
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_rows > MAX_ROWS)
    for (long row = 0; row < num_rows; row++)
        roundings[row] =
            rounded(rows + row * in_features, in_features, halves + 2 * row * in_features);
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (long block = 0; block < num_blocks; block++) {
        int32_t whole[MAX_ROWS][BLOCK];
        float sums[MAX_INT8_ROWS][BLOCK];
        for (long row = 0, n; row < num_rows; row += n) {
            n = next_rows(num_rows, row, MAX_INT8_ROWS);
            INT8_BLOCKS[n](halves + 2 * row * in_features, weight + block * BLOCK * in_features,
                           in_features, whole);
            scaled(whole, roundings + row, scale + block * BLOCK, n, sums);
            finish(sums, block, row, n, to);
        }
    }
}
