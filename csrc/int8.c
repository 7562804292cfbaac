/* Products of int8: float32 rows are quantised, with one scale for each group of 192 values, and multiplied by packed weights
 * with a scale for each column.
 *
 * One scale for a whole row would be that of its few largest values, and the others would lose their bits.
 *
 * A group's sums are exact in int32, so every instruction set gives the same ones. A weight w is stored as w + OFFSET,
 * unsigned; OFFSET times the sum of a group's values is taken off again. VNNI multiplies 8 bits by 8 bits into 32. AVX2's
 * product of 8 bits adds pairs in 16, which 8-bit weights overflow: so there both are widened to 16 bits, and pairs are added
 * in 32.
 */
#include "p2l_native.h"
#include "panels.h"

#include <math.h>
#include <string.h>

enum { GROUP = 192, OFFSET = 128, ROWS_PER_TASK = 16 /* quantised by one thread */ };

/* Arguments of one product; see p2l_native.h. */
typedef struct {
    const void *x; /* int8; at level 1 int16, reordered by widen */
    const float *scale, *weight_scale, *bias;
    const int32_t *taken; /* off a group's sums: OFFSET times the sum of its values */
    const uint8_t *weight;
    int64_t depth, groups, columns, panel_bytes; /* depth: a multiple of 4 */
    float *out;
} product;

/* The end of a group's values in a row. */
INLINE int64_t end_of(const product *p, int64_t group) {
    return (group + 1) * GROUP < p->depth ? (group + 1) * GROUP : p->depth;
}

/* Writes the totals [rows, PANEL] of one panel. */
INLINE void finish(const product *p, const float *totals, int64_t row, int64_t rows, int64_t column) {
    const int64_t width = p->columns - column < PANEL ? p->columns - column : PANEL;
    for (int64_t r = 0; r < rows; r++) {
        float *out = p->out + (row + r) * p->columns + column;
#pragma omp simd
        for (int64_t c = 0; c < width; c++)
            out[c] = totals[r * PANEL + c] * p->weight_scale[column + c] + (p->bias ? p->bias[column + c] : 0);
    }
}

INLINE void tile_portable(const product *p, const void *panel, int64_t row, int64_t column, int rows) {
    float totals[TILE * PANEL] = {0};
    for (int r = 0; r < rows; r++) {
        const int8_t *x = (const int8_t *)p->x + (row + r) * p->depth;
        for (int64_t g = 0; g < p->groups; g++) {
            const int64_t at = (row + r) * p->groups + g;
            int32_t sums[PANEL];
            for (int c = 0; c < PANEL; c++) sums[c] = -p->taken[at];
            for (int64_t k = g * GROUP; k < end_of(p, g); k += 4) {
                const uint8_t *weight = (const uint8_t *)panel + k * PANEL;
#pragma omp simd
                for (int c = 0; c < PANEL; c++)
                    sums[c] += x[k] * weight[4 * c] + x[k + 1] * weight[4 * c + 1] + x[k + 2] * weight[4 * c + 2] +
                               x[k + 3] * weight[4 * c + 3];
            }
            for (int c = 0; c < PANEL; c++) totals[r * PANEL + c] += (float)sums[c] * p->scale[at];
        }
    }
    finish(p, totals, row, rows, column);
}

#ifdef P2L_LEVELS
/* sums += weights times values, each by four bytes. As an intrinsic, GCC 12 copies the sums to memory and back. */
#define ADD_PRODUCTS(SUMS, WEIGHTS, VALUES) __asm__("vpdpbusd %2, %1, %0" : "+v"(SUMS) : "v"(WEIGHTS), "v"(VALUES))

/* The same by pairs of 16 bits. As intrinsics, GCC 12 adds in another order, which needs more registers than there are. */
#define ADD_PAIRS(SUMS, WEIGHTS, VALUES)                                                                            \
    do {                                                                                                            \
        __m256i pairs;                                                                                              \
        __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(SUMS), "=&x"(pairs) : "x"(WEIGHTS), "x"(VALUES)); \
    } while (0)

/* Four values of 8 bits, or two of 16. */
INLINE int32_t bits_of(const void *x) {
    int32_t bits;
    memcpy(&bits, x, sizeof bits);
    return bits;
}

/* Adds one group of some rows to totals [rows, PANEL]: `steps` times four values x [rows, depth], by a panel's weights. Its
 * sums are local to it, and so stay in registers. */
P2L_VNNI INLINE void group_vnni(const int8_t *x, int64_t depth, const uint8_t *weight, int64_t steps, const int32_t *taken,
                                const float *scale, int64_t groups, float *totals, int rows) {
    __m512i sums[TILE][2];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
    for (int64_t k = 0; k < steps; k++, x += 4, weight += 4 * PANEL) {
        const __m512i first = _mm512_loadu_si512(weight), second = _mm512_loadu_si512(weight + 64);
        fetch_ahead(weight);
        fetch_ahead(weight + 64);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            const __m512i value = _mm512_set1_epi32(bits_of(x + r * depth));
            ADD_PRODUCTS(sums[r][0], first, value);
            ADD_PRODUCTS(sums[r][1], second, value);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        const __m512 by = _mm512_set1_ps(scale[r * groups]);
        const __m512i off = _mm512_set1_epi32(taken[r * groups]);
        float *total = totals + r * PANEL;
        const __m512 first = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[r][0], off));
        const __m512 second = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[r][1], off));
        _mm512_storeu_ps(total, _mm512_fmadd_ps(first, by, _mm512_loadu_ps(total)));
        _mm512_storeu_ps(total + 16, _mm512_fmadd_ps(second, by, _mm512_loadu_ps(total + 16)));
    }
}

/* Two of the panel's four vectors of 8 columns at a time: the sums of more would not fit into 16 registers. A vector's even
 * bytes are a pair of each column's weights, its odd bytes the other pair. */
P2L_AVX2 INLINE void group_avx2(const int16_t *x, int64_t depth, const uint8_t *weight, int64_t steps, const int32_t *taken,
                                const float *scale, int64_t groups, float *totals, int rows) {
    const __m256i low = _mm256_set1_epi16(255);
    for (int part = 0; part < PANEL; part += 16) {
        __m256i sums[AVX2_TILE][2];
        const uint8_t *by_part = weight + 4 * part;
        const int16_t *value_of = x;
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
        for (int64_t k = 0; k < steps; k++, value_of += 4, by_part += 4 * PANEL) {
            const __m256i *four = (const __m256i *)by_part;
            __m256i first = _mm256_and_si256(low, _mm256_loadu_si256(four));
            __m256i second = _mm256_and_si256(low, _mm256_loadu_si256(four + 1));
            fetch_ahead(by_part);
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) {
                const __m256i value = _mm256_set1_epi32(bits_of(value_of + r * depth));
                ADD_PAIRS(sums[r][0], first, value);
                ADD_PAIRS(sums[r][1], second, value);
            }
            first = _mm256_srli_epi16(_mm256_loadu_si256(four), 8);
            second = _mm256_srli_epi16(_mm256_loadu_si256(four + 1), 8);
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) {
                const __m256i value = _mm256_set1_epi32(bits_of(value_of + r * depth + 2));
                ADD_PAIRS(sums[r][0], first, value);
                ADD_PAIRS(sums[r][1], second, value);
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            const __m256 by = _mm256_set1_ps(scale[r * groups]);
            const __m256i off = _mm256_set1_epi32(taken[r * groups]);
            float *total = totals + r * PANEL + part;
            const __m256 first = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums[r][0], off));
            const __m256 second = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums[r][1], off));
            _mm256_storeu_ps(total, _mm256_fmadd_ps(first, by, _mm256_loadu_ps(total)));
            _mm256_storeu_ps(total + 8, _mm256_fmadd_ps(second, by, _mm256_loadu_ps(total + 8)));
        }
    }
}

#define TILES(NAME, TARGET, MOST)                                                                                \
    TARGET static void tile_##NAME(const product *p, const void *panel, int64_t row, int64_t column, int rows) { \
        float totals[TILE * PANEL];                                                                              \
        memset(totals, 0, (size_t)rows * PANEL * sizeof *totals);                                                \
        for (int64_t g = 0; g < p->groups; g++) {                                                                \
            const VALUE_##NAME *x = (const VALUE_##NAME *)p->x + row * p->depth + g * GROUP;                     \
            const uint8_t *weight = (const uint8_t *)panel + g * GROUP * PANEL;                                  \
            const int64_t steps = (end_of(p, g) - g * GROUP) / 4, groups = p->groups, depth = p->depth;          \
            const int32_t *taken = p->taken + row * groups + g;                                                  \
            const float *scale = p->scale + row * groups + g;                                                    \
            P2L_WITH_CONSTANT(rows, MOST, GROUP_##NAME)                                                          \
        }                                                                                                        \
        finish(p, totals, row, rows, column);                                                                    \
    }
#define VALUE_vnni int8_t
#define VALUE_avx2 int16_t
#define GROUP_vnni(ROWS) group_vnni(x, depth, weight, steps, taken, scale, groups, totals, ROWS)
#define GROUP_avx2(ROWS) group_avx2(x, depth, weight, steps, taken, scale, groups, totals, ROWS)
TILES(avx2, P2L_AVX2, AVX2_TILE)
TILES(vnni, P2L_VNNI, TILE)
#endif

P2L_PANEL(portable, , TILE, product)
#ifdef P2L_LEVELS
P2L_PANEL(avx2, P2L_AVX2, AVX2_TILE, product)
P2L_PANEL(vnni, P2L_VNNI, TILE, product)
#endif

/* Four values of 8 bits at a time, in the order in which AVX2 multiplies them: the even two, then the odd two. */
INLINE void widen(const int8_t *values, int64_t size, int16_t *out) {
#pragma omp simd
    for (int64_t i = 0; i < size; i += 4) {
        out[i] = values[i];
        out[i + 1] = values[i + 2];
        out[i + 2] = values[i + 1];
        out[i + 3] = values[i + 3];
    }
}

typedef int32_t __attribute__((may_alias)) float_bits;

/* Writes the scale of values of which the largest has these bits, without its sign: NaN where one of them is not finite.
 * Returns whether they can be scaled: not where all are zero, one is not finite, or they are too small. */
INLINE int scaled(int32_t largest, float *scale) {
    const int32_t infinity = 0x7f800000; /* as numbers, bits have the order of floats; NaN's are above infinity's */
    float most;
    memcpy(&most, &largest, sizeof most);
    *scale = largest < infinity ? most / 127.0f : NAN;
    return largest < infinity && 1 / *scale <= 3e38f;
}

/* Quantises a group of `size` values to out, zeros up to `padded`; returns their sum, and writes their scale. */
INLINE int32_t quantise_group(const float *x, int64_t size, int64_t padded, int8_t *out, float *scale) {
    const float_bits *bits = (const float_bits *)x;
    int32_t largest = 0, total = 0, whole[GROUP];
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < size; i++) {
        const int32_t absolute = bits[i] & 0x7fffffff;
        largest = absolute > largest ? absolute : largest;
    }
    if (!scaled(largest, scale)) {
        memset(out, 0, (size_t)padded);
        return 0;
    }
    const float inverse = 1 / *scale;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < size; i++) {
        whole[i] = (int32_t)nearbyintf(x[i] * inverse);
        total += whole[i];
    }
#pragma omp simd
    for (int64_t i = 0; i < size; i++) out[i] = (int8_t)whole[i]; /* a loop of its own: the other one has wider vectors */
    memset(out + size, 0, (size_t)(padded - size));
    return total;
}

#ifdef P2L_LEVELS
/* The same of a whole group, whose values stay in registers. */
P2L_VNNI INLINE int32_t quantise_whole_vnni(const float *x, int8_t *out, float *scale) {
    enum { VECTORS = GROUP / 16 };
    const __m512i sign = _mm512_set1_epi32(0x7fffffff);
    __m512 values[VECTORS];
    __m512i most = _mm512_setzero_si512(), total = most;
#pragma GCC unroll 16
    for (int i = 0; i < VECTORS; i++) {
        values[i] = _mm512_loadu_ps(x + 16 * i);
        most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_castps_si512(values[i]), sign));
    }
    const int32_t largest = _mm512_reduce_max_epi32(most);
    if (!scaled(largest, scale)) {
        memset(out, 0, GROUP);
        return 0;
    }
    const __m512 inverse = _mm512_set1_ps(1 / *scale);
#pragma GCC unroll 16
    for (int i = 0; i < VECTORS; i++) {
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(values[i], inverse));
        total = _mm512_add_epi32(total, whole);
        _mm_storeu_si128((__m128i *)(out + 16 * i), _mm512_cvtepi32_epi8(whole));
    }
    return _mm512_reduce_add_epi32(total);
}
#endif

/* Quantises rows [first, last) of x [rows, width] to values [rows, depth] of 8 bits, or 16 where they are `wide`, with each
 * group's scale, and OFFSET times its sum. WHOLE(x, out, scale): of a whole group. */
#define QUANTISE(NAME, TARGET, WHOLE)                                                                                         \
    TARGET static void NAME(const float *x, int64_t first, int64_t last, int64_t width, int64_t depth, void *values,          \
                            float *scale, int32_t *taken, int wide) {                                                         \
        const int64_t groups = (depth + GROUP - 1) / GROUP;                                                                   \
        for (int64_t r = first; r < last; r++)                                                                                \
            for (int64_t g = 0; g < groups; g++) {                                                                            \
                const int64_t at = g * GROUP, n = r * groups + g, size = depth - at < GROUP ? depth - at : GROUP;             \
                const float *row = x + r * width + at;                                                                        \
                int8_t few[GROUP], *out = wide ? few : (int8_t *)values + r * depth + at;                                     \
                const int32_t total =                                                                                         \
                    at + GROUP <= width ? WHOLE(row, out, scale + n) : quantise_group(row, width - at, size, out, scale + n); \
                taken[n] = OFFSET * total;                                                                                    \
                if (wide) widen(few, size, (int16_t *)values + r * depth + at);                                               \
            }                                                                                                                 \
    }
#define WHOLE(X, OUT, SCALE) quantise_group(X, GROUP, GROUP, OUT, SCALE) /* a constant size, for which less code runs */
QUANTISE(quantise, P2L_CLONES, WHOLE)
#ifdef P2L_LEVELS
QUANTISE(quantise_vnni, P2L_VNNI, quantise_whole_vnni)
#endif

int p2l_int8_level(void) {
#ifdef P2L_LEVELS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("x86-64-v4")) return 2;
    if (__builtin_cpu_supports("x86-64-v3")) return 1;
#endif
    return 0;
}

typedef struct {
    const float *x;
    int64_t rows, width, depth, tasks;
    void *values;
    float *scale;
    int32_t *taken;
    int level;
} quantisation;

static void quantise_some(void *work, int64_t task, int thread) {
    const quantisation *w = work;
    const int64_t first = w->rows * task / w->tasks, last = w->rows * (task + 1) / w->tasks;
    (void)thread;
#ifdef P2L_LEVELS
    if (w->level == 2) {
        quantise_vnni(w->x, first, last, w->width, w->depth, w->values, w->scale, w->taken, 0);
        return;
    }
#endif
    quantise(w->x, first, last, w->width, w->depth, w->values, w->scale, w->taken, w->level == 1);
}

void p2l_int8_linear(const float *x, int64_t rows, int64_t width, const uint8_t *weight, const float *weight_scale,
                     const float *bias, int64_t columns, uint8_t *scratch, float *out, int level, int threads) {
#ifndef P2L_LEVELS
    level = 0;
#endif
    const int64_t depth = (width + 3) / 4 * 4, groups = (depth + GROUP - 1) / GROUP, size = level == 1 ? 2 : 1;
    float *scale = (float *)scratch;
    int32_t *taken = (int32_t *)(scratch + 4 * rows * groups);
    void *values = scratch + 8 * rows * groups;
    const int64_t tasks = threads > 1 ? (rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK : 1;
    quantisation all = {x, rows, width, depth, tasks, values, scale, taken, level};
    p2l_run(threads, tasks, quantise_some, &all);
    const product p = {values, scale, weight_scale, bias, taken, weight, depth, groups, columns, depth * PANEL, out};
    p2l_panel panel = panel_portable;
#ifdef P2L_LEVELS
    panel = level == 2 ? panel_vnni : level == 1 ? panel_avx2 : panel_portable;
#endif
    p2l_all_panels(&p, panel, rows, size * depth, columns, threads);
}
