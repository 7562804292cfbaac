/* Products of float32 or bfloat16 rows by packed weights, with bias, for few rows and many: a library's call costs as much as
 * a product of eight rows, and its own layout of weights cannot be mapped from a file.
 *
 * Packed weights [columns / 32, depth, 32], float32; of bfloat16 [columns / 32, depth / 2, 32, 2]. Sums are float32.
 */
#include "p2l_native.h"
#include "panels.h"

#include <string.h>

typedef struct {
    const void *x, *weight, *bias;
    int64_t depth, columns, panel_bytes;
    void *out;
} product;

INLINE int64_t width_at(const product *p, int64_t column) { return p->columns - column < PANEL ? p->columns - column : PANEL; }

INLINE void tile_portable(const product *p, const void *panel, int64_t row, int64_t column, int rows) {
    const int64_t width = width_at(p, column);
    const float *bias = p->bias ? (const float *)p->bias + column : 0;
    for (int r = 0; r < rows; r++) {
        const float *x = (const float *)p->x + (row + r) * p->depth, *weight = panel;
        float sums[PANEL] = {0}, *out = (float *)p->out + (row + r) * p->columns + column;
        for (int64_t k = 0; k < p->depth; k++, weight += PANEL) {
#pragma omp simd
            for (int c = 0; c < PANEL; c++) sums[c] += x[k] * weight[c];
        }
        for (int64_t c = 0; c < width; c++) out[c] = sums[c] + (bias ? bias[c] : 0);
    }
}

#ifdef P2L_LEVELS
P2L_AVX512 INLINE void rows_avx512(const product *p, const void *panel, int64_t row, int64_t column, int rows) {
    const float *x = (const float *)p->x + row * p->depth, *weight = panel;
    __m512 sums[TILE][2];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < p->depth; k++, weight += PANEL) {
        const __m512 first = _mm512_loadu_ps(weight), second = _mm512_loadu_ps(weight + 16);
        fetch_ahead(weight);
        fetch_ahead(weight + 16);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            const __m512 value = _mm512_set1_ps(x[r * p->depth + k]);
            sums[r][0] = _mm512_fmadd_ps(value, first, sums[r][0]);
            sums[r][1] = _mm512_fmadd_ps(value, second, sums[r][1]);
        }
    }
    const int64_t width = width_at(p, column);
    const float *bias = (const float *)p->bias + column;
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        const int64_t left = width - 16 * half;
        const __mmask16 some = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1 << left) - 1);
        const __m512 add = p->bias ? _mm512_maskz_loadu_ps(some, bias + 16 * half) : _mm512_setzero_ps();
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++)
            _mm512_mask_storeu_ps((float *)p->out + (row + r) * p->columns + column + 16 * half, some,
                                  _mm512_add_ps(sums[r][half], add));
    }
}

/* Half a panel at a time: the sums of more columns would not fit into 16 registers. */
P2L_AVX2 INLINE void rows_avx2(const product *p, const void *panel, int64_t row, int64_t column, int rows) {
    const float *x = (const float *)p->x + row * p->depth, *bias = (const float *)p->bias + column;
    const int64_t width = width_at(p, column);
    for (int part = 0; part < PANEL; part += 16) {
        const float *weight = (const float *)panel + part;
        __m256 sums[AVX2_TILE][2];
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = _mm256_setzero_ps();
        for (int64_t k = 0; k < p->depth; k++, weight += PANEL) {
            const __m256 first = _mm256_loadu_ps(weight), second = _mm256_loadu_ps(weight + 8);
            fetch_ahead(weight);
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) {
                const __m256 value = _mm256_set1_ps(x[r * p->depth + k]);
                sums[r][0] = _mm256_fmadd_ps(value, first, sums[r][0]);
                sums[r][1] = _mm256_fmadd_ps(value, second, sums[r][1]);
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            float stored[16], *out = (float *)p->out + (row + r) * p->columns + column + part;
            _mm256_storeu_ps(stored, sums[r][0]);
            _mm256_storeu_ps(stored + 8, sums[r][1]);
            for (int64_t c = 0; c < 16 && part + c < width; c++) out[c] = stored[c] + (p->bias ? bias[part + c] : 0);
        }
    }
}

P2L_BF16 INLINE void rows_bf16(const product *p, const void *panel, int64_t row, int64_t column, int rows) {
    const uint16_t *x = (const uint16_t *)p->x + row * p->depth, *bias = (const uint16_t *)p->bias + column;
    const char *weight = panel;
    __m512 sums[TILE][2];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < p->depth; k += 2, weight += 4 * PANEL) {
        const __m512bh first = (__m512bh)_mm512_loadu_ps(weight), second = (__m512bh)_mm512_loadu_ps(weight + 64);
        fetch_ahead(weight);
        fetch_ahead(weight + 64);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, x + r * p->depth + k, sizeof pair);
            const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], value, first);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], value, second);
        }
    }
    const int64_t width = width_at(p, column);
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        const int64_t left = width - 16 * half;
        const __mmask16 some = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1 << left) - 1);
        const __m512i wide =
            p->bias ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, bias + 16 * half)) : _mm512_setzero_si512();
        const __m512 add = (__m512)_mm512_slli_epi32(wide, 16);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++)
            _mm256_mask_storeu_epi16((uint16_t *)p->out + (row + r) * p->columns + column + 16 * half, some,
                                     (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(sums[r][half], add)));
    }
}

#define TILES(NAME, TARGET, MOST)                                                                                \
    TARGET static void tile_##NAME(const product *p, const void *panel, int64_t row, int64_t column, int rows) { \
        P2L_WITH_CONSTANT(rows, MOST, ROWS_##NAME)                                                               \
    }
#define ROWS_avx512(ROWS) rows_avx512(p, panel, row, column, ROWS)
#define ROWS_avx2(ROWS) rows_avx2(p, panel, row, column, ROWS)
#define ROWS_bf16(ROWS) rows_bf16(p, panel, row, column, ROWS)
TILES(avx512, P2L_AVX512, TILE)
TILES(avx2, P2L_AVX2, AVX2_TILE)
TILES(bf16, P2L_BF16, TILE)
#endif

P2L_PANEL(portable, , TILE, product)
#ifdef P2L_LEVELS
P2L_PANEL(avx512, P2L_AVX512, TILE, product)
P2L_PANEL(avx2, P2L_AVX2, AVX2_TILE, product)
P2L_PANEL(bf16, P2L_BF16, TILE, product)
#endif

int p2l_linear_level(int bf16) {
#ifdef P2L_LEVELS
    __builtin_cpu_init();
    if (bf16) return __builtin_cpu_supports("avx512bf16") ? 2 : -1;
    if (__builtin_cpu_supports("x86-64-v4")) return 2;
    if (__builtin_cpu_supports("x86-64-v3")) return 1;
#endif
    return bf16 ? -1 : 0;
}

void p2l_linear(const void *x, int64_t rows, int64_t depth, const void *weight, const void *bias, int64_t columns, void *out,
                int bf16, int level, int threads) {
    const int64_t size = bf16 ? 2 : 4;
    const product p = {x, weight, bias, depth, columns, depth * PANEL * size, out};
    p2l_panel panel = panel_portable;
    (void)level;
#ifdef P2L_LEVELS
    panel = bf16 ? panel_bf16 : level == 2 ? panel_avx512 : level == 1 ? panel_avx2 : panel_portable;
#endif
    p2l_all_panels(&p, panel, rows, depth * size, columns, threads);
}
