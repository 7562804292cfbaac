/* A task of attention.c, included there once for each instruction set: SUFFIX of the names, TARGET attribute of the functions,
 * LANES floats of a vector, ROWS of a block, and lanes of a line, TILE keys whose scores are in registers at once (TILE * ROWS
 * / LANES of the 16 or 32 there are), ITEM elements that a lane multiplies at once: one float32, or two bfloat16 in a float's
 * 32 bits, the first in the lower half.
 */
#define INLINED TARGET static inline __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 16")
#define VECTORS (ROWS / LANES) /* of a line */
#define vec OF(vec)
#define mask OF(mask)

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t mask __attribute__((vector_size(4 * LANES)));

INLINED vec OF(load)(const float *x) {
    vec v;
    memcpy(&v, x, sizeof v);
    return v;
}

INLINED void OF(store)(float *x, vec v) { memcpy(x, &v, sizeof v); }

INLINED vec OF(chosen)(mask m, vec a, vec b) { return (vec)((m & (mask)a) | (~m & (mask)b)); }

/* 2^x to 1 ulp for -126 <= x <= 0; 0 from -127 down; NaN for NaN. The polynomial's error is 2e-9 on [-0.5, 0.5]. */
INLINED vec OF(power)(vec x) {
    const vec lowest = (vec){0} - 127, rounding = (vec){0} + 12582912; /* 1.5 * 2^23: adding it rounds to a whole number */
    x = OF(chosen)(lowest > x, lowest, x);
    const vec shifted = x + rounding, f = x - (shifted - rounding);
    const vec tail = 0.0555033247f + f * (0.00961843736f + f * (0.00133988744f + f * 0.000153533619f));
    const vec p = 1 + f * (0.693147203f + f * (0.240226479f + f * tail));
    return p * (vec)(((mask)shifted << 23) + (127 << 23)); /* the factor's bits are 0 for -127 */
}

#include "attention_items.h"

/* ROWS rows of `size` columns to [size, ROWS], in squares of four by four. */
INLINED void OF(transpose)(const float *const *rows, float *restrict to, int64_t size) {
    for (int r = 0; r < ROWS; r += 4) {
        int64_t i = 0;
        for (; i + 4 <= size; i += 4) {
            four x[4];
            for (int j = 0; j < 4; j++) memcpy(x + j, rows[r + j] + i, sizeof x[j]);
            const four a = SHUFFLED(x[0], x[1], 0, 4, 1, 5), b = SHUFFLED(x[2], x[3], 0, 4, 1, 5);
            const four c = SHUFFLED(x[0], x[1], 2, 6, 3, 7), d = SHUFFLED(x[2], x[3], 2, 6, 3, 7);
            const four y[4] = {SHUFFLED(a, b, 0, 1, 4, 5), SHUFFLED(a, b, 2, 3, 6, 7), SHUFFLED(c, d, 0, 1, 4, 5),
                               SHUFFLED(c, d, 2, 3, 6, 7)};
            for (int j = 0; j < 4; j++) memcpy(to + (i + j) * ROWS + r, y + j, sizeof y[j]);
        }
        for (; i < size; i++)
            for (int j = 0; j < 4; j++) to[i * ROWS + r + j] = rows[r + j][i];
    }
}

/* The weights 2^(score - highest) of a block's rows for n keys, the first of which is key `start` of the prompt; rows of q and
 * k have `length` items. */
INLINED void OF(weigh)(scratch *s, int64_t block, int64_t start, int64_t n, int64_t length, float scale) {
    const float *q = s->q + block * length * ROWS;
    float *highest = s->highest + block * ROWS, *total = s->total + block * ROWS;
    const int32_t *position = s->position + block * ROWS;
    vec high[VECTORS], sum[VECTORS];
    for (int j = 0; j < VECTORS; j++) high[j] = OF(load)(highest + j * LANES);
    for (int64_t key = 0; key < n; key += TILE) {
        const float *k = s->k + key * length;
        vec score[TILE][VECTORS];
        UNROLLED for (int i = 0; i < TILE; i++) { UNROLLED for (int j = 0; j < VECTORS; j++) score[i][j] = (vec){0}; }
        for (int64_t d = 0; d < length; d++) {
            UNROLLED for (int i = 0; i < TILE; i++) {
                UNROLLED for (int j = 0; j < VECTORS; j++) score[i][j] =
                    OF(plus_product)(score[i][j], k[i * length + d], OF(load)(q + d * ROWS + j * LANES));
            }
        }
        const int hides = start + key + TILE - 1 > position[0]; /* some row does not see some key */
        UNROLLED for (int i = 0; i < TILE; i++) {
            UNROLLED for (int j = 0; j < VECTORS; j++) {
                score[i][j] *= scale;
                if (hides) {
                    mask seen;
                    memcpy(&seen, position + j * LANES, sizeof seen);
                    score[i][j] = OF(chosen)(seen >= (int32_t)(start + key + i), score[i][j], (vec){0} - INFINITY);
                }
                high[j] = OF(chosen)(score[i][j] > high[j], score[i][j], high[j]);
                OF(store)(s->weights + (key + i) * ROWS + j * LANES, score[i][j]);
            }
        }
    }
    for (int j = 0; j < VECTORS; j++) {
        const vec shrink = OF(power)(OF(load)(highest + j * LANES) - high[j]); /* 0 for the first keys */
        OF(store)(s->shrink + j * LANES, shrink);
        OF(store)(highest + j * LANES, high[j]);
        sum[j] = start ? shrink * OF(load)(total + j * LANES) : (vec){0};
    }
    for (int64_t key = 0; key < n; key += ITEM)
        for (int j = 0; j < VECTORS; j++) {
            const float *at = s->weights + key * ROWS + j * LANES;
            vec weights[ITEM];
            for (int i = 0; i < ITEM; i++) weights[i] = key + i < n ? OF(power)(OF(load)(at + i * ROWS) - high[j]) : (vec){0};
            OF(store)(s->weights + key / ITEM * ROWS + j * LANES, OF(items)(weights, sum + j));
        }
    for (int j = 0; j < VECTORS; j++) OF(store)(total + j * LANES, sum[j]);
}

/* Adds n lines of values times their weights to the sums of four rows, in `columns` vectors; first: there is nothing in the
 * sums yet. */
INLINED void OF(add_four)(const float *weights, const float *v, float *sums, const float *shrink, int64_t n, int64_t padded,
                          int columns, int first) {
    vec sum[4][4];
    UNROLLED for (int i = 0; i < 4; i++) { UNROLLED for (int j = 0; j < columns; j++) sum[i][j] = (vec){0}; }
    for (int64_t line = 0; line < n; line++) {
        UNROLLED for (int i = 0; i < 4; i++) {
            UNROLLED for (int j = 0; j < columns; j++) sum[i][j] =
                OF(plus_product)(sum[i][j], weights[line * ROWS + i], OF(load)(v + line * padded + j * LANES));
        }
    }
    UNROLLED for (int i = 0; i < 4; i++) {
        UNROLLED for (int j = 0; j < columns; j++) {
            float *at = sums + i * padded + j * LANES;
            OF(store)(at, first ? sum[i][j] : sum[i][j] + OF(load)(at) * shrink[i]);
        }
    }
}

/* The same for `rows` rows of a block. */
INLINED void OF(add)(scratch *s, int64_t block, int64_t start, int64_t n, int64_t rows) {
    enum { COLUMNS = LANES == 8 ? 2 : 4 }; /* of 4 * COLUMNS sums: 16 vectors in registers, 8 where there are 16 registers */
    for (int64_t r = 0; r < ROWS && r < rows; r += 4) {
        const int64_t seen = s->position[block * ROWS + r + 3] + 1 - start, keys = seen < n ? seen : n;
        if (keys <= 0) continue;
        const int64_t lines = (keys + ITEM - 1) / ITEM; /* what only some of the rows see has no weight in the others */
        const float *weights = s->weights + r, *shrink = s->shrink + r;
        float *sums = s->sums + (block * ROWS + r) * s->padded;
        int64_t column = 0;
        for (; column + COLUMNS * LANES <= s->padded; column += COLUMNS * LANES)
            OF(add_four)(weights, s->v + column, sums + column, shrink, lines, s->padded, COLUMNS, !start);
        for (; column < s->padded; column += LANES)
            OF(add_four)(weights, s->v + column, sums + column, shrink, lines, s->padded, 1, !start);
    }
}

INLINED void OF(attend_as)(const attention *a, scratch *s, task t, int bf16) {
    const int64_t size = a->size, group = a->heads / a->kv_heads, blocks = (t.rows + ROWS - 1) / ROWS;
    const int64_t length = (size + ITEM - 1) / ITEM;
    const int64_t token = a->last ? t.prompt : a->starts[t.prompt], key = a->key_starts[t.prompt];
    const int64_t before = a->key_starts[t.prompt + 1] - key - queries_of(a, t.prompt); /* keys before the first query's own */
    const float scale = (float)(1.44269504088896341 / sqrt((double)size));              /* scores are exponents of 2 */
    for (int64_t block = 0; block < blocks; block++) {
        const float *rows[ROWS];
        for (int64_t r = 0; r < ROWS; r++) {
            const int64_t at = block * ROWS + r, row = t.first + (at < t.rows ? at : t.rows - 1); /* the last one fills up */
            const int64_t from = (token + row / group) * a->q_stride + (t.head * group + row % group) * size;
            s->position[at] = (int32_t)(before + row / group);
            s->highest[at] = -INFINITY;
            if (bf16 || ITEM > 1) {
                rows[r] = s->items + r * length;
                OF(copy)(a->q, from, s->items + r * length, size, bf16);
            } else {
                rows[r] = (const float *)a->q + from;
            }
        }
        OF(transpose)(rows, s->q + block * length * ROWS, length);
    }
    const int64_t visible = s->position[t.rows - 1] + 1, width = 2 * a->kv_heads * size;
    for (int64_t start = 0; start < visible; start += KEYS) {
        const int64_t count = visible - start < KEYS ? visible - start : KEYS, from = (key + start) * width + t.head * size;
        for (int64_t i = 0; i < count; i++) OF(copy)(a->kv, from + i * width, s->k + i * length, size, bf16);
        OF(copy_lines)(a->kv, from + width / 2, width, count, s->v, size, s->padded, bf16);
        memset(s->k + count * length, 0, (TILE - 1) * length * sizeof(float)); /* keys of the last tile that no row sees */
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t seen = s->position[block * ROWS + ROWS - 1] + 1 - start, n = seen < count ? seen : count;
            if (n <= 0) continue;
            OF(weigh)(s, block, start, n, length, scale);
            OF(add)(s, block, start, n, t.rows - block * ROWS);
        }
    }
    for (int64_t r = 0; r < t.rows; r++) {
        const int64_t row = t.first + r, to = ((token + row / group) * a->heads + t.head * group + row % group) * size;
        const float *sums = s->sums + r * s->padded, share = 1 / s->total[r];
        if (bf16) {
#pragma omp simd
            for (int64_t i = 0; i < size; i++) ((uint16_t *)a->out)[to + i] = narrowed(sums[i] * share);
        } else {
#pragma omp simd
            for (int64_t i = 0; i < size; i++) ((float *)a->out)[to + i] = sums[i] * share;
        }
    }
}

TARGET static void OF(attend)(const attention *a, scratch *s, task t) {
    if (a->bf16)
        OF(attend_as)(a, s, t, 1);
    else
        OF(attend_as)(a, s, t, 0);
}

#undef INLINED
#undef UNROLLED
#undef VECTORS
#undef vec
#undef mask
#undef SUFFIX
#undef TARGET
#undef LANES
#undef ROWS
#undef TILE
#undef ITEM
