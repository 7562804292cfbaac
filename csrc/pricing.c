/* The pricing step of column generation: each prompt's best model once every model pays for the rows that it uses. */
#include "p2l_native.h"

#include <math.h>
#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* reduced [M] = v - penalty, -inf where not allowed; returns its maximum. */
P2L_CLONES static double reduce(const double *v, const double *penalty, const uint8_t *allowed, int64_t n_models,
                                double *restrict reduced) {
    double top = -INFINITY;
    if (allowed) {
#pragma omp simd reduction(max : top)
        for (int64_t m = 0; m < n_models; m++) {
            reduced[m] = allowed[m] ? v[m] - penalty[m] : -INFINITY;
            top = reduced[m] > top ? reduced[m] : top;
        }
    } else {
#pragma omp simd reduction(max : top)
        for (int64_t m = 0; m < n_models; m++) {
            reduced[m] = v[m] - penalty[m];
            top = reduced[m] > top ? reduced[m] : top;
        }
    }
    return top;
}

P2L_CLONES static double maximum(const double *values, int64_t count) {
    double top = -INFINITY;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < count; i++) top = values[i] > top ? values[i] : top;
    return top;
}

static int best_range(const double *v, const double *penalty, const uint8_t *allowed, int64_t first, int64_t last,
                      int64_t n_models, int32_t *best, double *reduced, double *lead) {
    double *row = malloc(sizeof(double) * n_models);
    if (!row) return -1;
    for (int64_t n = first; n < last; n++) {
        const double top = reduce(v + n * n_models, penalty, allowed ? allowed + n * n_models : 0, n_models, row);
        int64_t m = 0;
        while (row[m] != top) m++;
        row[m] = -INFINITY;
        best[n] = (int32_t)m;
        reduced[n] = top;
        lead[n] = top - maximum(row, n_models);
    }
    free(row);
    return 0;
}

int p2l_best_models(const double *v, const double *penalty, const uint8_t *allowed, int64_t n_prompts, int64_t n_models,
                    int threads, int32_t *best, double *reduced, double *lead) {
    int failed = 0;
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads) reduction(+ : failed)
        {
            const int64_t t = omp_get_thread_num(), of = omp_get_num_threads();
            failed += best_range(v, penalty, allowed, n_prompts * t / of, n_prompts * (t + 1) / of, n_models, best, reduced,
                                 lead) != 0;
        }
        return failed ? -1 : 0;
    }
#endif
    (void)threads;
    return best_range(v, penalty, allowed, 0, n_prompts, n_models, best, reduced, lead);
}
