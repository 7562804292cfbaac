/* v = W q (paper, equation (6)): each model's win rate against the opponents, per prompt. With a tie as half a win, one
 * formula serves rk, rk-reparam and grk (paper, 2.2). All terms are positive, so nothing cancels:
 *     P(b beats a) + P(neither wins) / 2
 *         = (phi_b / (phi_b + lambda phi_a + g) + (lambda phi_b + g) / (lambda phi_b + phi_a + g)) / 2. */
#include "p2l_native.h"
#include "sigmoid_mixture.h"

#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* One prompt whose coefficients span too much for shared exponentials, pair by pair. */
static void win_rates_wide(const double *theta, const int64_t *support, const double *weights, int64_t k,
                           int64_t n_models, double *v) {
    for (int64_t b = 0; b < n_models; b++) {
        double sum = 0;
        for (int64_t s = 0; s < k; s++) sum += weights[s] * p2l_sigmoid(theta[b] - theta[support[s]]);
        v[b] = sum;
    }
}

/* y [M] exponentials of all models, e and w [k] those of the support with its weights. */
P2L_CLONES static void win_rates_row(const double *theta, const int64_t *support, const double *w, int64_t k,
                                     int64_t n_models, double shift, double *restrict y, double *restrict e,
                                     double *restrict v) {
#pragma omp simd
    for (int64_t b = 0; b < n_models; b++) {
        y[b] = p2l_exp(theta[b] - shift);
        v[b] = 0;
    }
    for (int64_t s = 0; s < k; s++) e[s] = y[support[s]];
    for (int64_t s = 0; s < k; s += P2L_GROUP) {
        const double e0 = e[s], e1 = e[s + 1], e2 = e[s + 2], e3 = e[s + 3];
        const double w0 = w[s], w1 = w[s + 1], w2 = w[s + 2], w3 = w[s + 3];
#pragma omp simd
        for (int64_t b = 0; b < n_models; b++) {
            const double x = y[b], d0 = x + e0, d1 = x + e1, d2 = x + e2, d3 = x + e3;
            const double d01 = d0 * d1, d23 = d2 * d3;
            const double n01 = w0 * d1 + w1 * d0, n23 = w2 * d3 + w3 * d2;
            v[b] += (n01 * d23 + n23 * d01) / (d01 * d23);
        }
    }
#pragma omp simd
    for (int64_t b = 0; b < n_models; b++) v[b] *= y[b];
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

P2L_CLONES static void tie_win_rates_row(const double *theta, double lambda, double ground, const int64_t *support,
                                         const double *w, int64_t k, int64_t n_models, double shift, double *restrict y,
                                         double *restrict e, double *restrict v) {
#pragma omp simd
    for (int64_t b = 0; b < n_models; b++) {
        y[b] = p2l_exp(theta[b] - shift);
        v[b] = 0;
    }
    for (int64_t s = 0; s < k; s++) e[s] = y[support[s]];
    for (int64_t s = 0; s < k; s++) {
        const double wins = lambda * e[s] + ground, loses = e[s], weight = w[s] / 2;
#pragma omp simd
        for (int64_t b = 0; b < n_models; b++) {
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

static void one_prompt(const double *row, ties tie, int64_t n, const int64_t *support, const double *weights, int64_t k,
                       int64_t n_models, double *y, double *e, double *v) {
    double low = row[0], high = row[0];
    for (int64_t b = 1; b < n_models; b++) {
        low = row[b] < low ? row[b] : low;
        high = row[b] > high ? row[b] : high;
    }
    if (!tie.log_lambda) {
        if (high - low < P2L_SPAN)
            win_rates_row(row, support, weights, k, n_models, high, y, e, v);
        else
            win_rates_wide(row, support, weights, k, n_models, v);
        return;
    }
    const double log_lambda = tie.log_lambda[n];
    if (tie.grounded) { /* the fictitious bad model has coefficient 0 */
        low = low < 0 ? low : 0;
        high = high > 0 ? high : 0;
    }
    if (high - low < P2L_SPAN && log_lambda < P2L_SPAN)
        tie_win_rates_row(row, exp(log_lambda), tie.grounded ? exp(-high) : 0, support, weights, k, n_models, high, y, e, v);
    else
        tie_win_rates_wide(row, log_lambda, tie.grounded, support, weights, k, n_models, v);
}

static int win_rates_range(const double *theta, ties tie, const double *q, int q_per_prompt, int64_t first, int64_t last,
                           int64_t n_models, double *v) {
    const int64_t capacity = n_models + P2L_GROUP;
    double *scratch = malloc(sizeof(double) * 3 * capacity);
    int64_t *support = malloc(sizeof(int64_t) * capacity);
    if (!scratch || !support) {
        free(scratch);
        free(support);
        return -1;
    }
    double *y = scratch, *e = scratch + capacity, *weights = scratch + 2 * capacity;
    int64_t k = 0;
    for (int64_t n = first; n < last; n++) {
        if (n == first || q_per_prompt) k = p2l_pack_support(q + (q_per_prompt ? n * n_models : 0), n_models, support, weights);
        one_prompt(theta + n * n_models, tie, n, support, weights, k, n_models, y, e, v + n * n_models);
    }
    free(scratch);
    free(support);
    return 0;
}

static int win_rates(const double *theta, ties tie, const double *q, int q_per_prompt, int64_t n_prompts, int64_t n_models,
                     int threads, double *v) {
    int failed = 0;
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads) reduction(+ : failed)
        {
            const int64_t t = omp_get_thread_num(), of = omp_get_num_threads();
            failed += win_rates_range(theta, tie, q, q_per_prompt, n_prompts * t / of, n_prompts * (t + 1) / of, n_models,
                                      v) != 0;
        }
        return failed ? -1 : 0;
    }
#endif
    (void)threads;
    failed = win_rates_range(theta, tie, q, q_per_prompt, 0, n_prompts, n_models, v);
    return failed;
}

int p2l_win_rates(const double *theta, const double *q, int q_per_prompt, int64_t n_prompts, int64_t n_models,
                  int threads, double *v) {
    return win_rates(theta, (ties){NULL, 0}, q, q_per_prompt, n_prompts, n_models, threads, v);
}

int p2l_tie_win_rates(const double *theta, const double *log_lambda, int grounded, const double *q, int q_per_prompt,
                      int64_t n_prompts, int64_t n_models, int threads, double *v) {
    return win_rates(theta, (ties){log_lambda, grounded != 0}, q, q_per_prompt, n_prompts, n_models, threads, v);
}
