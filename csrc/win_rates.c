/* v = W q (paper, equation (6)): each model's win rate against the opponents, per prompt. With a tie as half a win, one
 * formula serves rk, rk-reparam and grk (paper, 2.2). All terms are positive, so nothing cancels:
 *     P(b beats a) + P(neither wins) / 2
 *         = (phi_b / (phi_b + lambda phi_a + g) + (lambda phi_b + g) / (lambda phi_b + phi_a + g)) / 2. */
#include "p2l_native.h"
#include "pool.h"
#include "sigmoid_mixture.h"

#include <stdlib.h>

#define P2L_NARROW 20.0
#define P2L_HIGHER 1e-4

/* One prompt whose coefficients span too much for shared exponentials, pair by pair. */
static void win_rates_wide(const double *theta, const int64_t *support, const double *weights, int64_t k, int64_t n_models,
                           double *v) {
    for (int64_t b = 0; b < n_models; b++) {
        double sum = 0;
        for (int64_t s = 0; s < k; s++) sum += weights[s] * p2l_sigmoid(theta[b] - theta[support[s]]);
        v[b] = sum;
    }
}

P2L_CLONES static void exponentials(const double *theta, int64_t n_models, double shift, double *restrict y) {
#pragma omp simd
    for (int64_t b = 0; b < n_models; b++) y[b] = p2l_exp(theta[b] - shift);
}

/* v [count] of the exponentials y; e and w [k] those of the support with its weights. */
P2L_CLONES static void win_rates_row(const double *y, int64_t count, const double *e, const double *w, int64_t k,
                                     double *restrict v) {
    for (int64_t b = 0; b < count; b++) v[b] = 0;
    for (int64_t s = 0; s < k; s += P2L_GROUP) {
        const double e0 = e[s], e1 = e[s + 1], e2 = e[s + 2], e3 = e[s + 3];
        const double w0 = w[s], w1 = w[s + 1], w2 = w[s + 2], w3 = w[s + 3];
#pragma omp simd
        for (int64_t b = 0; b < count; b++) {
            const double x = y[b], d0 = x + e0, d1 = x + e1, d2 = x + e2, d3 = x + e3;
            const double d01 = d0 * d1, d23 = d2 * d3;
            const double n01 = w0 * d1 + w1 * d0, n23 = w2 * d3 + w3 * d2;
            v[b] += (n01 * d23 + n23 * d01) / (d01 * d23);
        }
    }
#pragma omp simd
    for (int64_t b = 0; b < count; b++) v[b] *= y[b];
}

/* The same two functions with ties; the wide one works in logarithms. */
static void tie_win_rates_wide(const double *theta, double log_lambda, int grounded, const int64_t *support,
                               const double *weights, int64_t k, int64_t n_models, double *v) {
    for (int64_t b = 0; b < n_models; b++) {
        double sum = 0;
        for (int64_t s = 0; s < k; s++) {
            const double a = theta[support[s]];
            const double against = exp(log_lambda + a - theta[b]) + (grounded ? exp(-theta[b]) : 0);
            const double unbeaten = exp(log_lambda + theta[b] - a) + (grounded ? exp(-a) : 0);
            sum += weights[s] * (1 / (1 + against) + (isinf(unbeaten) ? 1 : unbeaten / (1 + unbeaten)));
        }
        v[b] = sum / 2;
    }
}

P2L_CLONES static void tie_win_rates_row(const double *y, int64_t count, double lambda, double ground, const double *e,
                                         const double *w, int64_t k, double *restrict v) {
    for (int64_t b = 0; b < count; b++) v[b] = 0;
    for (int64_t s = 0; s < k; s++) {
        const double wins = lambda * e[s] + ground, loses = e[s], weight = w[s] / 2;
#pragma omp simd
        for (int64_t b = 0; b < count; b++) {
            const double unbeaten = lambda * y[b] + ground, d1 = y[b] + wins, d2 = unbeaten + loses;
            v[b] += weight * (y[b] * d2 + unbeaten * d1) / (d1 * d2);
        }
    }
}

/* The tie parameters of a batch; a NULL log_lambda is Bradley-Terry. */
typedef struct {
    const double *log_lambda;
    int grounded;
} ties;

/* The models whose win rates are wanted, of rising cost; count 0: all of them, and no one knows a cost. */
typedef struct {
    const int64_t *models;
    const double *costs;
    int64_t count;
} candidates;

/* The places of the candidates that no cheaper one beats, and their exponentials x; returns their number. Win rates rise with
 * the coefficient: at most P2L_NARROW from the others, by far more than rounding where it is P2L_HIGHER. sure: whether it is.
 */
static int64_t contenders(const double *row, candidates among, int sure, const double *y, int64_t *place, double *x) {
    int64_t found = 0;
    double cheaper = -INFINITY, equal = -INFINITY;
    for (int64_t c = 0; c < among.count; c++) {
        const double own = row[among.models[c]];
        if (c > 0 && among.costs[c] > among.costs[c - 1]) {
            cheaper = equal > cheaper ? equal : cheaper;
            equal = -INFINITY;
        }
        equal = own > equal ? own : equal;
        if (sure && cheaper >= own + P2L_HIGHER) continue;
        place[found] = c;
        x[found++] = y[among.models[c]];
    }
    return found;
}

/* scratch: y, e, x and rates, each of the models and a group; v [M], or [count] of the candidates. */
typedef struct {
    double *y, *e, *x, *rates;
    int64_t *place;
} scratch;

static void one_prompt(const double *row, ties tie, int64_t n, const int64_t *support, const double *weights, int64_t k,
                       int64_t n_models, candidates among, scratch of, double *v) {
    double low = row[0], high = row[0];
    for (int64_t b = 1; b < n_models; b++) {
        low = row[b] < low ? row[b] : low;
        high = row[b] > high ? row[b] : high;
    }
    const double log_lambda = tie.log_lambda ? tie.log_lambda[n] : 0;
    if (tie.log_lambda && tie.grounded) { /* the fictitious bad model has coefficient 0 */
        low = low < 0 ? low : 0;
        high = high > 0 ? high : 0;
    }
    double *out = among.count ? of.rates : v;
    if (high - low >= P2L_SPAN || log_lambda >= P2L_SPAN) {
        if (tie.log_lambda)
            tie_win_rates_wide(row, log_lambda, tie.grounded, support, weights, k, n_models, out);
        else
            win_rates_wide(row, support, weights, k, n_models, out);
        for (int64_t c = 0; c < among.count; c++) v[c] = out[among.models[c]];
        return;
    }
    exponentials(row, n_models, high, of.y);
    for (int64_t s = 0; s < k; s++) of.e[s] = of.y[support[s]];
    const double *x = of.y;
    int64_t count = n_models;
    if (among.count) {
        count = contenders(row, among, high - low + log_lambda <= P2L_NARROW, of.y, of.place, of.x);
        x = of.x;
    }
    if (tie.log_lambda)
        tie_win_rates_row(x, count, exp(log_lambda), tie.grounded ? exp(-high) : 0, of.e, weights, k, out);
    else
        win_rates_row(x, count, of.e, weights, k, out);
    if (!among.count) return;
    for (int64_t c = 0; c < among.count; c++) v[c] = 0;
    for (int64_t c = 0; c < count; c++) v[of.place[c]] = out[c];
}

/* The arguments of all three functions. */
typedef struct {
    const double *theta;
    ties tie;
    const double *q;
    int q_per_prompt;
    int64_t n_models;
    candidates among;
    double *v;
} batch;

static int64_t win_rates_range(const void *work, int64_t first, int64_t last, int64_t task) {
    const batch *b = work;
    const int64_t n_models = b->n_models, capacity = n_models + P2L_GROUP;
    double *numbers = malloc(sizeof(double) * 5 * capacity);
    int64_t *support = malloc(sizeof(int64_t) * 2 * capacity);
    (void)task;
    if (!numbers || !support) {
        free(numbers);
        free(support);
        return -1;
    }
    double *weights = numbers;
    const scratch of = {numbers + capacity, numbers + 2 * capacity, numbers + 3 * capacity, numbers + 4 * capacity,
                        support + capacity};
    const int64_t width = b->among.count ? b->among.count : n_models;
    int64_t k = 0;
    for (int64_t n = first; n < last; n++) {
        if (n == first || b->q_per_prompt)
            k = p2l_pack_support(b->q + (b->q_per_prompt ? n * n_models : 0), n_models, support, weights);
        one_prompt(b->theta + n * n_models, b->tie, n, support, weights, k, n_models, b->among, of, b->v + n * width);
    }
    free(numbers);
    free(support);
    return 0;
}

int p2l_win_rates(const double *theta, const double *q, int q_per_prompt, int64_t n_prompts, int64_t n_models, int threads,
                  double *v) {
    const batch b = {theta, {NULL, 0}, q, q_per_prompt, n_models, {NULL, NULL, 0}, v};
    return (int)p2l_run_ranges(threads, p2l_parts(threads), n_prompts, win_rates_range, &b);
}

int p2l_tie_win_rates(const double *theta, const double *log_lambda, int grounded, const double *q, int q_per_prompt,
                      int64_t n_prompts, int64_t n_models, int threads, double *v) {
    const batch b = {theta, {log_lambda, grounded != 0}, q, q_per_prompt, n_models, {NULL, NULL, 0}, v};
    return (int)p2l_run_ranges(threads, p2l_parts(threads), n_prompts, win_rates_range, &b);
}

int p2l_contending_win_rates(const double *theta, const double *log_lambda, int grounded, const double *q,
                             const int64_t *models, const double *costs, int64_t n_candidates, int64_t n_prompts,
                             int64_t n_models, int threads, double *v) {
    const batch b = {theta, {log_lambda, grounded != 0}, q, 0, n_models, {models, costs, n_candidates}, v};
    return (int)p2l_run_ranges(threads, p2l_parts(threads), n_prompts, win_rates_range, &b);
}
