/* The one-budget LP (paper, equation (6)), exactly.
 *
 * With one budget row and one simplex row, some optimum mixes at most two models, both vertices of the upper concave hull
 * of the points (cost, v). Sorted by cost the hull takes one pass: O(M) per prompt for costs shared by all prompts.
 * Ties are broken the same way everywhere: of equal costs the higher v, of equal (cost, v) the lower index.
 */
#include "hull.h"
#include "p2l_native.h"
#include "pool.h"

#include <float.h>
#include <stdlib.h>

static void merge_sort_by_cost(int32_t *order, int32_t *scratch, const double *costs, int64_t count) {
    /* Bottom-up and stable: equal costs stay in index order. */
    for (int64_t width = 1; width < count; width *= 2) {
        for (int64_t left = 0; left < count; left += 2 * width) {
            const int64_t middle = left + width < count ? left + width : count;
            const int64_t right = left + 2 * width < count ? left + 2 * width : count;
            int64_t i = left, j = middle;
            for (int64_t out = left; out < right; out++)
                scratch[out] = (i < middle && (j >= right || costs[order[i]] <= costs[order[j]])) ? order[i++] : order[j++];
        }
        for (int64_t i = 0; i < count; i++) order[i] = scratch[i];
    }
}

/* 1 when b lies on or below the chord from a to c: b is then no vertex of the upper hull. Costs rise from a to c. */
static inline int below_chord(const double *costs, const double *v, int32_t a, int32_t b, int32_t c) {
    const double left = (v[b] - v[a]) * (costs[c] - costs[a]), right = (v[c] - v[a]) * (costs[b] - costs[a]);
    if (left != right || (left >= DBL_MIN && left <= DBL_MAX)) return left <= right;
    /* Both products over- or underflow: a long double has a wider exponent (on x86 and AArch64). */
    return ((long double)v[b] - v[a]) * ((long double)costs[c] - costs[a]) <=
           ((long double)v[c] - v[a]) * ((long double)costs[b] - costs[a]);
}

void p2l_sort_models(int32_t *order, int32_t *scratch, const double *costs, int64_t n_models) {
    for (int64_t m = 0; m < n_models; m++) order[m] = (int32_t)m;
    merge_sort_by_cost(order, scratch, costs, n_models);
}

int64_t p2l_upper_hull(const double *costs, const double *v, const uint8_t *allowed, const int32_t *order, int64_t n_models,
                       int32_t *hull) {
    int64_t size = 0;
    for (int64_t i = 0; i < n_models; i++) {
        const int32_t m = order[i];
        if (allowed && !allowed[m]) continue;
        if (size) {
            const int32_t top = hull[size - 1];
            if (v[m] <= v[top]) continue; /* more expensive and no better */
            if (costs[m] == costs[top]) size--;
        }
        while (size > 1 && below_chord(costs, v, hull[size - 2], hull[size - 1], m)) size--;
        hull[size++] = m;
    }
    return size;
}

/* 1 when a policy of a share of b costs more than the limit, however it is summed up. */
static inline int exceeds(double a, double b, double share, double limit) {
    const double rest = 1 - share;
    return rest * a + share * b > limit || (long double)rest * a + (long double)share * b > limit;
}

typedef struct {
    const double *v, *costs;
    int costs_per_prompt;
    const double *budget, *highest;
    const uint8_t *allowed;
    int64_t n_models;
    int32_t *indices;
    double *probabilities, *value, *cost;
} batch;

/* Returns the number of infeasible prompts. */
static int64_t solve_range(const void *work, int64_t first, int64_t last, int64_t task) {
    const batch *of = work;
    const int64_t n_models = of->n_models;
    int32_t *order = malloc(sizeof(int32_t) * 3 * n_models);
    (void)task;
    if (!order) return -1;
    int32_t *hull = order + n_models, *scratch = order + 2 * n_models;
    int64_t infeasible = 0;
    for (int64_t n = first; n < last; n++) {
        const double *c = of->costs + (of->costs_per_prompt ? n * n_models : 0), *w = of->v + n * n_models;
        const double limit = of->budget[n], reach = of->highest[n];
        if (n == first || of->costs_per_prompt) p2l_sort_models(order, scratch, c, n_models);
        const int64_t size = p2l_upper_hull(c, w, of->allowed ? of->allowed + n * n_models : 0, order, n_models, hull);
        if (!size || c[hull[0]] > reach) {
            infeasible++;
            continue;
        }
        int64_t beyond = 1; /* first vertex beyond the budget, up to rounding */
        while (beyond < size && c[hull[beyond]] <= reach) beyond++;
        int32_t a = hull[beyond - 1], b = a;
        double share = 0;
        if (beyond < size && c[a] < limit) {
            b = hull[beyond];
            share = (limit - c[a]) / (c[b] - c[a]);
            for (double by = DBL_EPSILON; share > 0 && exceeds(c[a], c[b], share, limit); by *= 2)
                share = by < 1 ? share - share * by : 0;
            if (share == 0) b = a;
        }
        of->indices[2 * n] = a;
        of->indices[2 * n + 1] = b;
        of->probabilities[2 * n] = 1 - share;
        of->probabilities[2 * n + 1] = share;
        of->value[n] = w[a] + share * (w[b] - w[a]);
        of->cost[n] = share > 0 ? limit : c[a];
    }
    free(order);
    return infeasible;
}

int64_t p2l_solve_budget(const double *v, const double *costs, int costs_per_prompt, const double *budget,
                         const double *highest, const uint8_t *allowed, int64_t n_prompts, int64_t n_models, int threads,
                         int32_t *indices, double *probabilities, double *value, double *cost) {
    const batch of = {v, costs, costs_per_prompt, budget, highest, allowed, n_models, indices, probabilities, value, cost};
    return p2l_run_ranges(threads, p2l_parts(threads), n_prompts, solve_range, &of);
}
