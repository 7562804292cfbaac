/* The outcome probabilities of every pair of models, from exp(theta), with divisions only. */
#include "p2l_native.h"
#include "pool.h"

/* One prompt: out [outcomes, M (M - 1) / 2], pairs i < j in row-major order. Ties are sums of positive terms (see
 * p2l_engine/feedback/formulas.py), not what is left of 1: nothing cancels. */
P2L_CLONES static void outcomes_of(const double *restrict e, double lambda, double ground, int64_t outcomes, int64_t m,
                                   double *restrict out) {
    const int64_t pairs = m * (m - 1) / 2;
    const double excess = lambda - 1; /* at least 1e-6, so that its last digits do not matter */
    double *first = out, *second = out + pairs, *tie = out + 2 * pairs, *bad = out + 3 * pairs;
    for (int64_t i = 0, start = 0; i + 1 < m; start += m - 1 - i, i++) {
        const double a = e[i];
        double *restrict A = first + start - i - 1, *restrict B = second + start - i - 1;
        double *restrict T = tie + start - i - 1, *restrict D = bad + start - i - 1;
        if (outcomes == 2) {
#pragma omp simd
            for (int64_t j = i + 1; j < m; j++) {
                A[j] = a / (a + e[j]);
                B[j] = e[j] / (a + e[j]);
            }
        } else if (outcomes == 3) {
#pragma omp simd
            for (int64_t j = i + 1; j < m; j++) {
                const double beats = 1 / (a + lambda * e[j] + ground), loses = 1 / (e[j] + lambda * a + ground);
                A[j] = a * beats;
                B[j] = e[j] * loses;
                T[j] = excess * (lambda + 1) * (A[j] * B[j]) + ground * (lambda * (a + e[j]) + ground) * beats * loses;
            }
        } else {
#pragma omp simd
            for (int64_t j = i + 1; j < m; j++) {
                A[j] = a / (a + lambda * e[j] + ground);
                B[j] = e[j] / (e[j] + lambda * a + ground);
                D[j] = 1 / (1 + a + e[j]);
                T[j] = excess * (A[j] * B[j]) * ((2 + (lambda + 1) * (a + e[j])) * D[j]);
            }
        }
    }
}

typedef struct {
    const double *e, *lambda;
    double ground;
    int64_t outcomes, n_models;
    double *out;
} batch;

static int64_t outcomes_range(const void *work, int64_t first, int64_t last, int64_t task) {
    const batch *b = work;
    const int64_t width = b->outcomes * (b->n_models * (b->n_models - 1) / 2);
    (void)task;
    for (int64_t n = first; n < last; n++)
        outcomes_of(b->e + n * b->n_models, b->lambda ? b->lambda[n] : 1, b->ground, b->outcomes, b->n_models,
                    b->out + n * width);
    return 0;
}

void p2l_outcomes(const double *e, const double *lambda, double ground, int64_t outcomes, int64_t n_prompts, int64_t n_models,
                  int threads, double *out) {
    const batch b = {e, lambda, ground, outcomes, n_models, out};
    p2l_run_ranges(threads, p2l_parts(threads), n_prompts, outcomes_range, &b);
}
