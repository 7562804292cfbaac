/* How products are computed: by panels of columns, tiles of rows, and blocks of rows that fit into a cache. */
#ifndef P2L_PANELS_H
#define P2L_PANELS_H

#include "p2l_native.h"
#include "pool.h"

#include <stdint.h>
#ifdef P2L_LEVELS
#include <immintrin.h>
#define P2L_AVX2 __attribute__((target("avx2,fma")))
#define P2L_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define P2L_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")))
#define P2L_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))
#endif

#define INLINE static inline __attribute__((always_inline))

enum {
    PANEL = 32, /* columns whose weights lie together */
    TILE = 12,  /* rows whose sums with a panel stay in registers; with AVX2, of half a panel: */
    AVX2_TILE = 6,
    AHEAD = 8192,         /* how far ahead of the weights in use others are fetched, in bytes: two pages */
    CACHED = 384 << 10,   /* bytes of rows that are multiplied by a panel before the next one: they stay in the L2 cache */
    TASKS_PER_THREAD = 16 /* of a product, so that a thread that starts late leaves more to the others */
};

/* CALL(rows) with a constant, so that it is compiled for each number of rows up to MOST, which is 6 or 12. */
#define P2L_WITH_CONSTANT(ROWS, MOST, CALL) \
    switch (ROWS) {                         \
    case 1:                                 \
        CALL(1);                            \
        break;                              \
    case 2:                                 \
        CALL(2);                            \
        break;                              \
    case 3:                                 \
        CALL(3);                            \
        break;                              \
    case 4:                                 \
        CALL(4);                            \
        break;                              \
    case 5:                                 \
        CALL(5);                            \
        break;                              \
    case 6:                                 \
        CALL(6);                            \
        break;                              \
    case 7:                                 \
        CALL(MOST < 7 ? 6 : 7);             \
        break;                              \
    case 8:                                 \
        CALL(MOST < 8 ? 6 : 8);             \
        break;                              \
    case 9:                                 \
        CALL(MOST < 9 ? 6 : 9);             \
        break;                              \
    case 10:                                \
        CALL(MOST < 10 ? 6 : 10);           \
        break;                              \
    case 11:                                \
        CALL(MOST < 11 ? 6 : 11);           \
        break;                              \
    default:                                \
        CALL(MOST);                         \
        break;                              \
    }

/* Defines panel_NAME: all rows [first, last) by one panel, in tiles of nearly equal size by tile_NAME. */
#define P2L_PANEL(NAME, TARGET, MOST, PRODUCT)                                                         \
    TARGET static void panel_##NAME(const void *of, int64_t number, int64_t first, int64_t last) {     \
        const PRODUCT *p = of;                                                                         \
        const void *panel = (const char *)p->weight + number * p->panel_bytes;                         \
        const int64_t column = number * PANEL, tiles = (last - first + MOST - 1) / MOST;               \
        for (int64_t t = 0; t < tiles; t++) {                                                          \
            const int64_t row = first + (last - first) * t / tiles;                                    \
            tile_##NAME(p, panel, row, column, (int)(first + (last - first) * (t + 1) / tiles - row)); \
        }                                                                                              \
    }

#ifdef P2L_LEVELS
/* Weights come from memory once a pass, and the CPU's own prefetchers stop at the end of each page of 4 KiB: without this,
 * products of 8 to 16 rows take 1.15 to 1.35 times as long. The address may be past the last panel. */
INLINE void fetch_ahead(const void *weight) { _mm_prefetch((const char *)weight + AHEAD, _MM_HINT_T0); }
#endif

typedef void (*p2l_panel)(const void *product, int64_t number, int64_t first, int64_t last);

typedef struct {
    const void *product;
    p2l_panel panel;
    int64_t rows, blocks, panels, tasks;
} p2l_panels;

static void p2l_some_panels(void *work, int64_t task, int thread) {
    const p2l_panels *w = work;
    const int64_t all = w->blocks * w->panels;
    (void)thread;
    for (int64_t i = all * task / w->tasks; i < all * (task + 1) / w->tasks; i++) {
        const int64_t block = i / w->panels;
        w->panel(w->product, i % w->panels, w->rows * block / w->blocks, w->rows * (block + 1) / w->blocks);
    }
}

/* Calls panel(product, number, first, last) for every panel of columns and block of rows, block by block. */
INLINE void p2l_all_panels(const void *product, p2l_panel panel, int64_t rows, int64_t row_bytes, int64_t columns,
                           int threads) {
    const int64_t blocks = (rows * row_bytes + CACHED - 1) / CACHED, panels = (columns + PANEL - 1) / PANEL;
    const int64_t most = threads > 1 ? TASKS_PER_THREAD * threads : 1, all = blocks * panels;
    p2l_panels work = {product, panel, rows, blocks, panels, all < most ? all : most};
    p2l_run(threads, work.tasks, p2l_some_panels, &work);
}

#endif
