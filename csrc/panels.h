/* How products are computed: by panels of columns, tiles of rows, and blocks of rows that fit into a cache. */
#ifndef P2L_PANELS_H
#define P2L_PANELS_H

#include "p2l_native.h"

#include <stdint.h>
#ifdef _OPENMP
#include <omp.h>
#endif
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
    CACHED = 384 << 10 /* bytes of rows that are multiplied by a panel before the next one: they stay in the L2 cache */
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
    TARGET static void panel_##NAME(const PRODUCT *p, int64_t number, int64_t first, int64_t last) {   \
        const void *panel = (const char *)p->weight + number * p->panel_bytes;                         \
        const int64_t column = number * PANEL, tiles = (last - first + MOST - 1) / MOST;               \
        for (int64_t t = 0; t < tiles; t++) {                                                          \
            const int64_t row = first + (last - first) * t / tiles;                                    \
            tile_##NAME(p, panel, row, column, (int)(first + (last - first) * (t + 1) / tiles - row)); \
        }                                                                                              \
    }

/* Calls CALL for this thread's share of the (block of rows, panel) pairs, with `number`, `first` and `last` set. */
#define P2L_FOR_EACH_PANEL(ROWS, ROW_BYTES, COLUMNS, THREAD, THREADS, CALL)                               \
    {                                                                                                     \
        const int64_t panels_ = ((COLUMNS) + PANEL - 1) / PANEL;                                          \
        const int64_t blocks_ = ((ROWS) * (ROW_BYTES) + CACHED - 1) / CACHED, all_ = blocks_ * panels_;   \
        for (int64_t at_ = all_ * (THREAD) / (THREADS); at_ < all_ * ((THREAD) + 1) / (THREADS); at_++) { \
            const int64_t block_ = at_ / panels_, number = at_ % panels_;                                 \
            const int64_t first = (ROWS) * block_ / blocks_, last = (ROWS) * (block_ + 1) / blocks_;      \
            CALL;                                                                                         \
        }                                                                                                 \
    }

#endif
