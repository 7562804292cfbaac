/* One budget over a whole batch, exactly.
 *
 * A mean budget over N prompts is the linear relaxation of a multiple-choice knapsack (Sinha and Zoltners, 1979): each
 * prompt's upper hull is a list of steps (extra cost, extra value) of falling slope, and it is optimal to take the steps of
 * all prompts by falling slope until the budget is spent. Nothing needs sorting: the slope at which the budget ends is
 * found by a radix select over the bits of the slopes, in four passes.
 */
#include "hull.h"
#include "p2l_native.h"
#include "pool.h"

#include <stdlib.h>
#include <string.h>

#define DIGIT_BITS 16
#define DIGITS (1 << DIGIT_BITS)

typedef struct {
    const double *v, *costs;
    int costs_per_prompt;
    const uint8_t *allowed;
    int64_t n_models;
    int32_t *sizes, *models;
    double *cost, *value;
    int64_t *counts; /* vertices of each task, whose hulls begin where they would if all earlier ones were full */
} batch;

static int64_t hulls_range(const void *work, int64_t first, int64_t last, int64_t task) {
    const batch *b = work;
    const int64_t n_models = b->n_models;
    int32_t *order = malloc(sizeof(int32_t) * 2 * n_models);
    if (!order) return -1;
    int64_t filled = first * n_models;
    for (int64_t n = first; n < last; n++) {
        const double *c = b->costs + (b->costs_per_prompt ? n * n_models : 0), *w = b->v + n * n_models;
        if (n == first || b->costs_per_prompt) p2l_sort_models(order, order + n_models, c, n_models);
        int32_t *hull = b->models + filled;
        b->sizes[n] = (int32_t)p2l_upper_hull(c, w, b->allowed ? b->allowed + n * n_models : 0, order, n_models, hull);
        for (int32_t i = 0; i < b->sizes[n]; i++) {
            b->cost[filled + i] = c[hull[i]];
            b->value[filled + i] = w[hull[i]];
        }
        filled += b->sizes[n];
    }
    free(order);
    return b->counts[task] = filled - first * n_models;
}

int64_t p2l_hulls(const double *v, const double *costs, int costs_per_prompt, const uint8_t *allowed, int64_t n_prompts,
                  int64_t n_models, int threads, int32_t *sizes, int32_t *models, double *cost, double *value) {
    const int64_t tasks = p2l_parts(threads);
    int64_t *counts = malloc(sizeof(int64_t) * tasks), moved = 0;
    if (!counts) return -1;
    const batch b = {v, costs, costs_per_prompt, allowed, n_models, sizes, models, cost, value, counts};
    const int64_t total = p2l_run_ranges(threads, tasks, n_prompts, hulls_range, &b);
    for (int64_t t = 0; t < tasks && total >= 0; t++) { /* close the gaps */
        const int64_t from = n_prompts * t / tasks * n_models, count = counts[t];
        memmove(models + moved, models + from, sizeof(int32_t) * count);
        memmove(cost + moved, cost + from, sizeof(double) * count);
        memmove(value + moved, value + from, sizeof(double) * count);
        moved += count;
    }
    free(counts);
    return total;
}

/* The slope of the step to vertex i; at most the slope before, whatever rounding says. */
static inline double slope_to(const double *cost, const double *value, int64_t i, double before) {
    const double slope = (value[i] - value[i - 1]) / (cost[i] - cost[i - 1]);
    return slope < before ? slope : before;
}

static inline uint64_t bits_of(double slope) {
    uint64_t bits; /* the bits of positive doubles sort as the doubles do */
    memcpy(&bits, &slope, sizeof bits);
    return bits;
}

typedef struct {
    const int64_t *offsets;
    const double *cost, *value;
    uint64_t prefix;
    int shift;
    double *spent;
} steps;

/* spent [tasks, DIGITS]: the cost of the steps whose leading bits equal the prefix, by their next 16 bits. */
static int64_t histogram(const void *work, int64_t first, int64_t last, int64_t task) {
    const steps *s = work;
    const uint64_t mask = s->shift + DIGIT_BITS == 64 ? 0 : ~(uint64_t)0 << (s->shift + DIGIT_BITS);
    double *spent = s->spent + task * DIGITS;
    memset(spent, 0, sizeof(double) * DIGITS);
    for (int64_t n = first; n < last; n++) {
        double slope = __builtin_inf();
        for (int64_t i = s->offsets[n] + 1; i < s->offsets[n + 1]; i++) {
            slope = slope_to(s->cost, s->value, i, slope);
            const uint64_t bits = bits_of(slope);
            if ((bits & mask) == s->prefix) spent[(bits >> s->shift) & (DIGITS - 1)] += s->cost[i] - s->cost[i - 1];
        }
    }
    return 0;
}

int p2l_select_steps(const int64_t *offsets, const double *cost, const double *value, int64_t n_prompts, double slack,
                     int threads, double *price, double *left) {
    if (threads < 1) threads = 1;
    double *spent = malloc(sizeof(double) * DIGITS * threads);
    if (!spent) return -1;
    uint64_t prefix = 0;
    int found = 1;
    for (int shift = 64 - DIGIT_BITS; shift >= 0 && found; shift -= DIGIT_BITS) {
        const steps s = {offsets, cost, value, prefix, shift, spent};
        p2l_run_ranges(threads, threads, n_prompts, histogram, &s); /* one part for each thread: the sums are large */
        found = 0;
        int64_t last = -1; /* the smallest slope with this prefix, and the cost of its steps */
        double least = 0;
        for (int64_t digit = DIGITS - 1; digit >= 0; digit--) {
            double here = 0;
            for (int t = 0; t < threads; t++) here += spent[(int64_t)t * DIGITS + digit];
            if (here <= 0) continue;
            last = digit;
            least = here;
            if (here > slack) {
                found = 1;
                break;
            }
            slack -= here;
        }
        /* Sums in another order differ by rounding: what exceeded the slack above may just fit now. */
        if (!found && shift + DIGIT_BITS < 64 && last >= 0) {
            found = 1;
            slack += least;
        }
        if (found) prefix |= (uint64_t)last << shift;
    }
    free(spent);
    *left = slack > 0 ? slack : 0;
    *price = 0;
    if (found) memcpy(price, &prefix, sizeof prefix);
    return 0;
}

void p2l_take_steps(const int64_t *offsets, const int32_t *models, const double *cost, const double *value, int64_t n_prompts,
                    double price, double left, int32_t *indices, double *probabilities, double *policy_value,
                    double *policy_cost) {
    for (int64_t n = 0; n < n_prompts; n++) {
        const int64_t end = offsets[n + 1];
        int64_t i = offsets[n];
        double slope = __builtin_inf(), share = 0;
        for (; i + 1 < end; i++) {
            slope = slope_to(cost, value, i + 1, slope);
            if (slope > price) continue;
            if (slope < price || left <= 0) break;
            const double extra = cost[i + 1] - cost[i];
            if (extra > left) {
                share = left / extra;
                left = 0;
                if (share < 1) break;
                share = 0; /* the slack reaches the next vertex, up to rounding */
            } else {
                left -= extra;
            }
        }
        const int64_t j = share > 0 ? i + 1 : i;
        indices[2 * n] = models[i];
        indices[2 * n + 1] = models[j];
        probabilities[2 * n] = 1 - share;
        probabilities[2 * n + 1] = share;
        policy_value[n] = value[i] + share * (value[j] - value[i]);
        policy_cost[n] = cost[i] + share * (cost[j] - cost[i]);
    }
}
