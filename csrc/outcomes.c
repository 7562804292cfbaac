/* The outcome probabilities of every pair of models, from exp(theta), with divisions only. */
#include "p2l_native.h"

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

void p2l_outcomes(const double *e, const double *lambda, double ground, int64_t outcomes, int64_t n_prompts, int64_t n_models,
                  int threads, double *out) {
    const int64_t pairs = n_models * (n_models - 1) / 2;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) if (threads > 1)
#endif
    for (int64_t n = 0; n < n_prompts; n++)
        outcomes_of(e + n * n_models, lambda ? lambda[n] : 1, ground, outcomes, n_models, out + n * outcomes * pairs);
    (void)threads;
}
