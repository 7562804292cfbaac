/* The outcome probabilities of every pair of models, from exp(theta), with divisions only. */
#include "p2l_native.h"

/* One prompt: out [outcomes, M (M - 1) / 2], pairs i < j in row-major order. */
P2L_CLONES static void outcomes_of(const double *restrict e, double lambda, double ground, int64_t outcomes, int64_t m,
                                   double *restrict out) {
    const int64_t pairs = m * (m - 1) / 2;
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
                A[j] = a / (a + lambda * e[j] + ground);
                B[j] = e[j] / (e[j] + lambda * a + ground);
                const double rest = 1 - A[j] - B[j];
                T[j] = rest > 0 ? rest : 0;
            }
        } else {
#pragma omp simd
            for (int64_t j = i + 1; j < m; j++) {
                A[j] = a / (a + lambda * e[j] + ground);
                B[j] = e[j] / (e[j] + lambda * a + ground);
                D[j] = 1 / (1 + a + e[j]);
                const double rest = 1 - A[j] - B[j] - D[j];
                T[j] = rest > 0 ? rest : 0;
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
