/* The native core: win rates, the one-budget LP, and the router's Bradley-Terry score.
 *
 * All arrays are row-major, contiguous float64 unless a type says otherwise; N prompts, M models. Callers have checked
 * their arguments (finite values, q >= 0 with sum 1, costs >= 0): nothing here validates. Every routine is batched over
 * prompts and runs on `threads` OpenMP threads; 1 keeps it on the calling thread. The readable twins of these routines are
 * in p2l_engine/routing/reference.py.
 */
#ifndef P2L_NATIVE_H
#define P2L_NATIVE_H

#include <stdint.h>

/* GCC compiles one copy per instruction set and the loader picks the best one that the CPU has. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define P2L_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define P2L_CLONES
#endif

/* v[n, b] = sum_a q[a] sigmoid(theta[n, b] - theta[n, a]); q is [M], or [N, M] when q_per_prompt.
 * Returns 0, or -1 when working memory could not be had. */
int p2l_win_rates(const double *theta, const double *q, int q_per_prompt, int64_t n_prompts, int64_t n_models,
                  int threads, double *v);

/* maximise p.v[n] subject to p.cost <= budget[n], p in the simplex: exact, by the upper concave hull of (cost, v).
 * costs is [M] or [N, M] (costs_per_prompt); budget [N], +inf for none. Fills indices [N, 2] (a model of probability zero
 * repeats the first), probabilities [N, 2], value [N] and cost [N]. Returns the number of prompts whose budget lies below
 * their cheapest model (their rows are not written), or -1 when working memory could not be had. */
int64_t p2l_solve_budget(const double *v, const double *costs, int costs_per_prompt, const double *budget,
                         int64_t n_prompts, int64_t n_models, int threads, int32_t *indices, double *probabilities,
                         double *value, double *cost);

/* score[n] solves sum_a q[a] sigmoid(score - theta[n, a]) = rate[n]; -inf at rate <= 0, +inf at rate >= 1.
 * Returns the number of prompts whose root did not converge (their score is NaN), or -1 without working memory. */
int64_t p2l_bt_score(const double *theta, const double *q, int q_per_prompt, const double *rate, int64_t n_prompts,
                     int64_t n_models, int threads, double *score);

/* The instruction set that the loader chose: 4, 3 or 2 for x86-64-v4 (AVX-512), v3 (AVX2), v2; 0 elsewhere. */
int p2l_isa_level(void);

/* Threads that `threads = 0` would mean: OpenMP's own maximum, 1 without OpenMP. */
int p2l_max_threads(void);

#endif
