/* The pricing step of column generation: each prompt's best model by reduced value.
 *
 * Where many prompts are indifferent between models at the same dual prices, no prices would split them as the rows require. A
 * little noise, a hash of prompt and model and so the same in every pass, breaks these ties. */
#include "hull.h"
#include "p2l_native.h"
#include "pool.h"

#include <math.h>
#include <stdlib.h>

/* A number in [-1, 0) from a prompt and a model (splitmix64). */
static inline double noise_of(int64_t prompt, int64_t n_models, int64_t model) {
    uint64_t z = (uint64_t)(prompt * n_models + model + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    return (double)(int64_t)(z >> 11) * -0x1p-53;
}

P2L_CLONES static void add_noise(double *restrict row, int64_t prompt, int64_t n_models, double scale) {
#pragma omp simd
    for (int64_t m = 0; m < n_models; m++) row[m] += scale * noise_of(prompt, n_models, m);
}

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

typedef struct {
    const double *v, *penalty;
    const uint8_t *allowed;
    int64_t first_prompt;
    double noise;
    int64_t n_models;
    int32_t *best;
    double *reduced, *most, *lead;
} batch;

static int64_t best_range(const void *work, int64_t first, int64_t last, int64_t task) {
    const batch *b = work;
    const int64_t n_models = b->n_models;
    double *row = malloc(sizeof(double) * n_models);
    (void)task;
    if (!row) return -1;
    for (int64_t n = first; n < last; n++) {
        const double *w = b->v + n * n_models;
        double top = reduce(w, b->penalty, b->allowed ? b->allowed + n * n_models : 0, n_models, row);
        b->most[n] = top;
        if (b->noise > 0) {
            add_noise(row, b->first_prompt + n, n_models, b->noise);
            top = maximum(row, n_models);
        }
        int64_t m = 0;
        while (row[m] != top) m++;
        row[m] = -INFINITY;
        b->best[n] = (int32_t)m;
        b->reduced[n] = w[m] - b->penalty[m];
        b->lead[n] = top - maximum(row, n_models);
    }
    free(row);
    return 0;
}

int p2l_best_models(const double *v, const double *penalty, const uint8_t *allowed, int64_t first_prompt, double noise,
                    int64_t n_prompts, int64_t n_models, int threads, int32_t *best, double *reduced, double *most,
                    double *lead) {
    const batch b = {v, penalty, allowed, first_prompt, noise, n_models, best, reduced, most, lead};
    return (int)p2l_run_ranges(threads, p2l_parts(threads), n_prompts, best_range, &b);
}

void p2l_noise(const int64_t *prompts, int64_t n_prompts, int64_t n_models, double *noise) {
    for (int64_t n = 0; n < n_prompts; n++)
        for (int64_t m = 0; m < n_models; m++) noise[n * n_models + m] = noise_of(prompts[n], n_models, m);
}

static inline int uses_no_more(const double *amounts, int64_t stride, int64_t n_rows, int32_t a, int32_t b) {
    for (int64_t k = 0; k < n_rows; k++)
        if (amounts[k * stride + a] > amounts[k * stride + b]) return 0;
    return 1;
}

int p2l_undominated(const double *v, const double *amounts, int amounts_per_prompt, int64_t n_rows, int64_t n_prompts,
                    int64_t n_models, uint8_t *usable) {
    int32_t *order = malloc(sizeof(int32_t) * 3 * n_models);
    double *fall = malloc(sizeof(double) * n_models);
    if (!order || !fall) {
        free(order);
        free(fall);
        return -1;
    }
    int32_t *kept = order + n_models;
    /* Row k of prompt n: amounts [K, M], or [K, N, M]. */
    const int64_t stride = amounts_per_prompt ? n_prompts * n_models : n_models;
    for (int64_t n = 0; n < n_prompts; n++) {
        const double *a = amounts + (amounts_per_prompt ? n * n_models : 0);
        uint8_t *mask = usable + n * n_models;
        int64_t size = 0;
        for (int64_t m = 0; m < n_models; m++) fall[m] = -v[n * n_models + m];
        p2l_sort_models(order, order + 2 * n_models, fall, n_models);
        for (int64_t i = 0; i < n_models; i++) {
            const int32_t m = order[i];
            if (!mask[m]) continue;
            int64_t k = 0;
            while (k < size && !uses_no_more(a, stride, n_rows, kept[k], m)) k++;
            if (k < size) {
                mask[m] = 0;
                continue;
            }
            /* At equal value it may dominate earlier ones. */
            const double *w = v + n * n_models;
            for (k = size - 1; k >= 0 && w[kept[k]] == w[m]; k--)
                if (uses_no_more(a, stride, n_rows, m, kept[k])) {
                    mask[kept[k]] = 0;
                    kept[k] = kept[--size];
                }
            kept[size++] = m;
        }
    }
    free(order);
    free(fall);
    return 0;
}
