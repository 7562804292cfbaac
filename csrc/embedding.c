/* Rows of a table, by their numbers, as float32 or bfloat16 (as uint16_t). */
#include "bfloat16.h"
#include "p2l_native.h"
#include "pool.h"

#include <string.h>

typedef struct {
    const void *table;
    const int32_t *tokens;
    void *out;
    int64_t columns;
} gather;

static int64_t copy_rows(const void *of, int64_t first, int64_t last, int64_t bytes) {
    const gather *g = of;
    for (int64_t i = first; i < last; i++)
        memcpy((char *)g->out + i * bytes, (const char *)g->table + g->tokens[i] * bytes, (size_t)bytes);
    return 0;
}

static int64_t copy_f32(const void *of, int64_t first, int64_t last, int64_t task) {
    (void)task;
    return copy_rows(of, first, last, 4 * ((const gather *)of)->columns);
}

static int64_t copy_bf16(const void *of, int64_t first, int64_t last, int64_t task) {
    (void)task;
    return copy_rows(of, first, last, 2 * ((const gather *)of)->columns);
}

P2L_CLONES static int64_t widen(const void *of, int64_t first, int64_t last, int64_t task) {
    const gather *g = of;
    (void)task;
    for (int64_t i = first; i < last; i++) {
        const uint16_t *row = (const uint16_t *)g->table + g->tokens[i] * g->columns;
        float *out = (float *)g->out + i * g->columns;
#pragma omp simd
        for (int64_t c = 0; c < g->columns; c++) out[c] = widened(row[c]);
    }
    return 0;
}

int p2l_embed(const void *table, int64_t n_rows, int64_t columns, const int32_t *tokens, int64_t n, void *out, int table_bf16,
              int bf16, int threads) {
    for (int64_t i = 0; i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= n_rows) return 1;
    const gather g = {table, tokens, out, columns};
    p2l_run_ranges(threads, p2l_parts(threads), n, bf16 ? copy_bf16 : table_bf16 ? widen : copy_f32, &g);
    return 0;
}
