/* Attention over a paged pool of KV, read in place.

   A sequence's keys come in tiles of 32. The tile is turned, so that an instruction multiplies two
   inputs of 16 keys, or two keys' weights with 16 inputs of their values, and it serves all query
   heads that share it. Softmax is computed on the way, from tile to tile (Milakov and Gimelshein,
   2018), in float32; weights are rounded to bfloat16, sums are float32. 32 queries of one sequence
   and one KV head are one thread's: sums have one order, whatever the batch and the threads. */

#include <math.h>

#include "avx512.h"

#define INLINED inline __attribute__((always_inline))

enum { TILE = 32, HALVES = TILE / LANES, MAX_HEAD_DIM = 256, MAX_FOLDED = 32, AT_ONCE = 4 };

typedef struct {
    const bf16 *query;             /* [num_tokens, num_heads, head_dim] */
    const uint8_t *keys, *values;  /* [num_blocks, block_size, num_kv_heads, bytes of a vector] */
    bf16 *out;                     /* as query */
    const float *sinks;            /* one more logit of each head, or null */
    const int32_t *query_starts;   /* [num_rows + 1] */
    const int32_t *context_lens;   /* [num_rows] */
    const int32_t *block_table;    /* [num_rows, table_width] */
    int64_t num_rows, table_width, num_heads, num_kv_heads, head_dim, block_size;
    int64_t is_int8;               /* a vector is int8 and its scale in bfloat16, else bfloat16 */
    int64_t window;                /* keys that a token sees, itself included; 0: all */
    int64_t num_threads;
    float scaling, softcap;        /* softcap 0: none */
} Attention;

/* Queries of one sequence and one KV head, "folded": all heads of all tokens. */
typedef struct {
    int n;
    const bf16 *query[MAX_FOLDED];
    bf16 *out[MAX_FOLDED];
    int64_t first_key[MAX_FOLDED], last_key[MAX_FOLDED]; /* that it sees */
    float most[MAX_FOLDED];                              /* of softmax, so far */
    __m512 total[MAX_FOLDED];                            /* likewise, in parts */
    float scores[MAX_FOLDED][TILE];
    bf16 weights[MAX_FOLDED][TILE]; /* of values as they lie in the tile */
    float sums[MAX_FOLDED][MAX_HEAD_DIM];
} Folded;

/* Keys that come next. */
typedef struct {
    int64_t first;
    float key_scale[TILE], value_scale[TILE];
    __m512i keys[MAX_HEAD_DIM / 2][HALVES];          /* pairs of inputs, each of all keys */
    __m512i values[TILE / 2][MAX_HEAD_DIM / LANES]; /* pairs of keys, each of all inputs */
} Tile;

AVX512 static inline float int8_scale(const uint8_t *vector, int64_t head_dim) {
    bf16 scale;
    memcpy(&scale, vector + head_dim, sizeof scale);
    const uint32_t bits = (uint32_t)scale << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

AVX512 static inline __m512 int8_floats(const uint8_t *values) {
    const __m128i bytes = _mm_loadu_si128((const __m128i *)values);
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}

/* 32 inputs from `from` on of a vector, as bfloat16; zeros if there is none. */
AVX512 static inline __m512i part_of(const uint8_t *vector, int64_t from, int64_t is_int8) {
    if (!vector) return _mm512_setzero_si512();
    if (!is_int8) return _mm512_loadu_si512(vector + 2 * from);
    const uint8_t *part = vector + from;
    return (__m512i)_mm512_cvtne2ps_pbh(int8_floats(part + LANES), int8_floats(part));
}

/* 16 vectors of 16 lanes: lane j of vector i becomes lane i of vector j. */
AVX512 static inline void turn(__m512i v[LANES]) {
    __m512i t[LANES];
    UNROLLED for (int i = 0; i < LANES; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    UNROLLED for (int i = 0; i < LANES; i += 4) {
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    UNROLLED for (int i = 0; i < 4; i++) {
        const __m512i a = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
        const __m512i b = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
        t[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
        t[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
        t[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
    UNROLLED for (int i = 0; i < LANES; i++) v[i] = t[i];
}

AVX512 static void load_keys(const Attention *a, const uint8_t *const keys[TILE], Tile *tile) {
    for (int half = 0; half < HALVES; half++)
        for (int64_t from = 0; from < a->head_dim; from += 2 * LANES) {
            __m512i v[LANES];
            UNROLLED for (int i = 0; i < LANES; i++)
                v[i] = part_of(keys[half * LANES + i], from, a->is_int8);
            turn(v);
            UNROLLED for (int i = 0; i < LANES; i++) tile->keys[from / 2 + i][half] = v[i];
        }
}

AVX512 static void load_values(const Attention *a, const uint8_t *const values[TILE], Tile *tile) {
    __m512i low, high; /* which of two vectors' 16-bit lanes to take: by turns */
    int16_t lanes[2][2 * LANES];
    for (int i = 0; i < 2 * LANES; i++) {
        lanes[0][i] = (int16_t)(i / 2 + i % 2 * 2 * LANES);
        lanes[1][i] = (int16_t)(lanes[0][i] + LANES);
    }
    low = _mm512_loadu_si512(lanes[0]);
    high = _mm512_loadu_si512(lanes[1]);
    for (int pair = 0; pair < TILE / 2; pair++)
        for (int64_t from = 0; from < a->head_dim; from += 2 * LANES) {
            const __m512i one = part_of(values[2 * pair], from, a->is_int8);
            const __m512i two = part_of(values[2 * pair + 1], from, a->is_int8);
            __m512i *to = tile->values[pair] + from / LANES;
            to[0] = _mm512_permutex2var_epi16(one, low, two);
            to[1] = _mm512_permutex2var_epi16(one, high, two);
        }
}

static inline int64_t vector_bytes(const Attention *a) {
    return a->is_int8 ? a->head_dim + 2 : 2 * a->head_dim;
}

/* Where the vectors of a key lie in the pools, from their starts. */
static inline int64_t place(const Attention *a, const int32_t *table, int64_t kv_head, int64_t key) {
    const int64_t slot = table[key / a->block_size] * a->block_size + key % a->block_size;
    return (slot * a->num_kv_heads + kv_head) * vector_bytes(a);
}

/* Has up to 32 keys and values from `first` on come from memory: blocks lie anywhere, so the CPU does
   not foresee it. */
static void fetch_tile(const Attention *a, const int32_t *table, int64_t kv_head, int64_t first,
                       int64_t last) {
    for (int64_t key = first; key < first + TILE && key <= last; key++) {
        const int64_t start = place(a, table, kv_head, key);
        for (int64_t byte = 0; byte < vector_bytes(a); byte += 64) {
            __builtin_prefetch(a->keys + start + byte);
            __builtin_prefetch(a->values + start + byte);
        }
    }
}

/* Finds up to 32 keys from `first` on, and puts keys and values where products take them. */
AVX512 static void load_tile(const Attention *a, const int32_t *table, int64_t kv_head,
                             int64_t first, int64_t last, Tile *tile) {
    const uint8_t *keys[TILE], *values[TILE]; /* null behind the last */
    tile->first = first;
    for (int i = 0; i < TILE; i++) {
        const int64_t key = first + i;
        keys[i] = values[i] = 0;
        tile->key_scale[i] = a->scaling;
        tile->value_scale[i] = 1;
        if (key > last) continue;
        keys[i] = a->keys + place(a, table, kv_head, key);
        values[i] = a->values + place(a, table, kv_head, key);
        if (!a->is_int8) continue;
        tile->key_scale[i] *= int8_scale(keys[i], a->head_dim);
        tile->value_scale[i] = int8_scale(values[i], a->head_dim);
    }
    load_keys(a, keys, tile);
    load_values(a, values, tile);
}

/* Products of `n` queries with a tile's keys. Inlined for each n, so that sums are registers. */
AVX512 static INLINED void score(const Attention *a, Folded *folded, const Tile *tile, int f,
                                 int n) {
    __m512 sum[AT_ONCE][HALVES];
    UNROLLED for (int q = 0; q < n; q++)
        UNROLLED for (int h = 0; h < HALVES; h++) sum[q][h] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < a->head_dim / 2; pair++)
        UNROLLED for (int q = 0; q < n; q++) {
            const __m512bh x = (__m512bh)repeated(folded->query[f + q] + 2 * pair);
            UNROLLED for (int h = 0; h < HALVES; h++)
                sum[q][h] = _mm512_dpbf16_ps(sum[q][h], (__m512bh)tile->keys[pair][h], x);
        }
    UNROLLED for (int q = 0; q < n; q++)
        UNROLLED for (int h = 0; h < HALVES; h++)
            _mm512_storeu_ps(folded->scores[f + q] + h * LANES, sum[q][h]);
}

/* Scores to weights; returns what the sums so far are to be multiplied with. */
AVX512 static float soften(const Attention *a, Folded *folded, const Tile *tile, int f) {
    const __m512i lanes =
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i first = _mm512_set1_epi32((int)(folded->first_key[f] - tile->first));
    const __m512i last = _mm512_set1_epi32((int)(folded->last_key[f] - tile->first));
    __m512 scores[HALVES];
    __mmask16 seen[HALVES];
    __m512 highest = _mm512_set1_ps(-INFINITY);
    UNROLLED for (int h = 0; h < HALVES; h++) {
        const __m512i key = _mm512_add_epi32(lanes, _mm512_set1_epi32(h * LANES));
        seen[h] = _mm512_cmple_epi32_mask(key, last) & _mm512_cmpge_epi32_mask(key, first);
        scores[h] = _mm512_mul_ps(_mm512_loadu_ps(folded->scores[f] + h * LANES),
                                  _mm512_loadu_ps(tile->key_scale + h * LANES));
        if (a->softcap) { /* cap * tanh(x / cap) */
            const __m512 one = _mm512_set1_ps(1), cap = _mm512_set1_ps(a->softcap);
            const __m512 power = exponential(_mm512_div_ps(_mm512_add_ps(scores[h], scores[h]), cap));
            const __m512 share = _mm512_div_ps(_mm512_set1_ps(2), _mm512_add_ps(power, one));
            scores[h] = _mm512_mul_ps(cap, _mm512_sub_ps(one, share));
        }
        const __m512 least = _mm512_set1_ps(-INFINITY);
        highest = _mm512_max_ps(highest, _mm512_mask_mov_ps(least, seen[h], scores[h]));
    }
    const float before = folded->most[f], found = _mm512_reduce_max_ps(highest);
    const float most = found > before ? found : before;
    const __m512 factor =
        found > before ? exponential(_mm512_set1_ps(before - most)) : _mm512_set1_ps(1);
    __m512 total = _mm512_mul_ps(folded->total[f], factor);
    UNROLLED for (int h = 0; h < HALVES; h++) {
        const __m512 weight = exponential(_mm512_sub_ps(scores[h], _mm512_set1_ps(most)));
        const __m512 kept = _mm512_maskz_mov_ps(seen[h], weight);
        const __m512 scale = _mm512_loadu_ps(tile->value_scale + h * LANES);
        store_rounded(folded->weights[f] + h * LANES, 0xffff, _mm512_mul_ps(kept, scale));
        total = _mm512_add_ps(total, kept);
    }
    folded->total[f] = total;
    folded->most[f] = most;
    return _mm512_cvtss_f32(factor);
}

/* Adds a tile's values for `n` queries, 32 outputs at a time. Inlined like `score`. */
AVX512 static INLINED void add_values(const Attention *a, Folded *folded, const Tile *tile,
                                      const float *factors, int f, int n) {
    for (int64_t from = 0; from < a->head_dim; from += 2 * LANES) {
        __m512 sum[AT_ONCE][2];
        UNROLLED for (int q = 0; q < n; q++)
            UNROLLED for (int i = 0; i < 2; i++)
                sum[q][i] = _mm512_mul_ps(_mm512_loadu_ps(folded->sums[f + q] + from + i * LANES),
                                          _mm512_set1_ps(factors[f + q]));
        for (int pair = 0; pair < TILE / 2; pair++) {
            const __m512i *values = tile->values[pair] + from / LANES;
            UNROLLED for (int q = 0; q < n; q++) {
                const __m512bh weight = (__m512bh)repeated(folded->weights[f + q] + 2 * pair);
                UNROLLED for (int i = 0; i < 2; i++)
                    sum[q][i] = _mm512_dpbf16_ps(sum[q][i], (__m512bh)values[i], weight);
            }
        }
        UNROLLED for (int q = 0; q < n; q++)
            UNROLLED for (int i = 0; i < 2; i++)
                _mm512_storeu_ps(folded->sums[f + q] + from + i * LANES, sum[q][i]);
    }
}

/* `n` queries, with `n` known to the compiler. */
AVX512 static INLINED void attend_some(const Attention *a, Folded *folded, const Tile *tile, int f,
                                       int n) {
    float factors[MAX_FOLDED];
    score(a, folded, tile, f, n);
    for (int q = f; q < f + n; q++) factors[q] = soften(a, folded, tile, q);
    add_values(a, folded, tile, factors, f, n);
}

AVX512 static void attend_tile(const Attention *a, Folded *folded, const Tile *tile) {
    for (int f = 0; f < folded->n; f += AT_ONCE) {
        switch (folded->n - f) {
            case 1: attend_some(a, folded, tile, f, 1); break;
            case 2: attend_some(a, folded, tile, f, 2); break;
            case 3: attend_some(a, folded, tile, f, 3); break;
            default: attend_some(a, folded, tile, f, AT_ONCE);
        }
    }
}

/* `count` queries from `from` on of one sequence and one KV head. */
AVX512 static void attend(const Attention *a, int64_t row, int64_t kv_head, int64_t from,
                          int64_t count) {
    Folded folded;
    Tile tile;
    const int64_t heads_per_kv = a->num_heads / a->num_kv_heads;
    const int64_t token_start = a->query_starts[row];
    const int64_t before = a->context_lens[row] - (a->query_starts[row + 1] - token_start);
    int64_t first = INT64_MAX, last = 0;
    folded.n = (int)count;
    for (int f = 0; f < folded.n; f++) {
        const int64_t token = (from + f) / heads_per_kv;
        const int64_t head = kv_head * heads_per_kv + (from + f) % heads_per_kv;
        const int64_t offset = ((token_start + token) * a->num_heads + head) * a->head_dim;
        folded.query[f] = a->query + offset;
        folded.out[f] = a->out + offset;
        folded.last_key[f] = before + token;
        folded.first_key[f] = 0;
        if (a->window && folded.last_key[f] >= a->window)
            folded.first_key[f] = folded.last_key[f] - a->window + 1;
        folded.most[f] = a->sinks ? a->sinks[head] : -1e30f;
        folded.total[f] = _mm512_maskz_mov_ps(a->sinks ? 1 : 0, _mm512_set1_ps(1));
        memset(folded.sums[f], 0, sizeof folded.sums[f]);
        if (folded.first_key[f] < first) first = folded.first_key[f];
        if (folded.last_key[f] > last) last = folded.last_key[f];
    }
    const int32_t *table = a->block_table + row * a->table_width;
    for (int64_t key = first / TILE * TILE; key <= last; key += TILE) {
        load_tile(a, table, kv_head, key, last, &tile);
        fetch_tile(a, table, kv_head, key + TILE, last);
        attend_tile(a, &folded, &tile);
    }
    for (int f = 0; f < folded.n; f++) {
        const __m512 share = _mm512_set1_ps(1 / _mm512_reduce_add_ps(folded.total[f]));
        for (int64_t i = 0; i < a->head_dim; i += LANES)
            store_rounded(folded.out[f] + i, 0xffff,
                          _mm512_mul_ps(_mm512_loadu_ps(folded.sums[f] + i), share));
    }
}

void baton_attend(const Attention *a) {
    const int64_t heads_per_kv = a->num_heads / a->num_kv_heads;
    int64_t starts[a->num_rows + 1]; /* of each row's parts among all rows' */
    starts[0] = 0;
    for (int64_t row = 0; row < a->num_rows; row++) {
        const int64_t folded = (a->query_starts[row + 1] - a->query_starts[row]) * heads_per_kv;
        starts[row + 1] = starts[row] + a->num_kv_heads * ((folded + MAX_FOLDED - 1) / MAX_FOLDED);
    }
#pragma omp parallel for schedule(dynamic) num_threads((int)a->num_threads)
    for (int64_t part = starts[a->num_rows] - 1; part >= 0; part--) { /* the longest first */
        int64_t row = 0;
        while (starts[row + 1] <= part) row++;
        const int64_t from = (part - starts[row]) / a->num_kv_heads * MAX_FOLDED;
        const int64_t kv_head = (part - starts[row]) % a->num_kv_heads;
        const int64_t left =
            (a->query_starts[row + 1] - a->query_starts[row]) * heads_per_kv - from;
        attend(a, row, kv_head, from, left < MAX_FOLDED ? left : MAX_FOLDED);
    }
}
