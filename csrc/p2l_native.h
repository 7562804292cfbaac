/* The native core: win rates, the one-budget LP per prompt and per batch, the router's Bradley-Terry score, pair outcomes,
 * the loss of votes, and a decoder's steps between its matrix products.
 *
 * Arrays are row-major, contiguous float64 unless a type says otherwise; N prompts, M models. Callers check their arguments
 * (finite values, q >= 0 with sum 1, costs >= 0); nothing is validated here. Routines are batched over prompts and run on
 * `threads` >= 1 threads (see pool.h); 1 stays on the calling thread. Reference implementations: tests/support/reference.py.
 */
#ifndef P2L_NATIVE_H
#define P2L_NATIVE_H

#include <stdint.h>

/* GCC compiles one copy per instruction set; the loader picks the best one that the CPU supports. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define P2L_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define P2L_LEVELS /* functions may have a target of their own, chosen by p2l_isa_level */
#else
#define P2L_CLONES
#endif

/* v[n, b] = sum_a q[a] sigmoid(theta[n, b] - theta[n, a]); q is [M], or [N, M] when q_per_prompt.
 * Returns 0, or -1 when memory allocation fails. */
int p2l_win_rates(const double *theta, const double *q, int q_per_prompt, int64_t n_prompts, int64_t n_models, int threads,
                  double *v);

/* The same with ties as half a win: v[n, b] = sum_a q[a] (P(b beats a) + P(neither wins) / 2), for
 * P(b beats a) = phi_b / (phi_b + lambda phi_a + g), phi = exp(theta), lambda = exp(log_lambda[n]) >= 1; g is 1 when grounded
 * (rk-reparam, grk), else 0 (rk, with log_lambda its threshold). */
int p2l_tie_win_rates(const double *theta, const double *log_lambda, int grounded, const double *q, int q_per_prompt,
                      int64_t n_prompts, int64_t n_models, int threads, double *v);

/* The same (log_lambda NULL: without ties) of some models alone, whose costs rise: v is [N, n_candidates], and 0 where a
 * cheaper candidate has a coefficient so much higher that rounding cannot hide it. No policy with one bound on costs, and no
 * price of them, would choose those. */
int p2l_contending_win_rates(const double *theta, const double *log_lambda, int grounded, const double *q,
                             const int64_t *models, const double *costs, int64_t n_candidates, int64_t n_prompts,
                             int64_t n_models, int threads, double *v);

/* Maximises p.v[n] subject to p.cost <= budget[n], p in the simplex; exact, by the upper concave hull of (cost, v). costs
 * is [M] or [N, M] (costs_per_prompt); budget [N], +inf for none; highest [N]: a model of up to this cost, a rounding above the
 * budget, counts as within it; allowed [N, M], or NULL for all. Fills indices [N, 2] (a model of probability zero repeats the
 * first), probabilities [N, 2], value [N] and cost [N]. Returns the number of prompts whose cheapest allowed model costs more
 * than `highest` (their rows are not written), or -1 when memory allocation fails. */
int64_t p2l_solve_budget(const double *v, const double *costs, int costs_per_prompt, const double *budget,
                         const double *highest, const uint8_t *allowed, int64_t n_prompts, int64_t n_models, int threads,
                         int32_t *indices, double *probabilities, double *value, double *cost);

/* The upper hulls of N prompts, concatenated: sizes [N], and each vertex's model, cost and value (arrays of capacity N x M).
 * Returns the number of vertices, or -1 when memory allocation fails. */
int64_t p2l_hulls(const double *v, const double *costs, int costs_per_prompt, const uint8_t *allowed, int64_t n_prompts,
                  int64_t n_models, int threads, int32_t *sizes, int32_t *models, double *cost, double *value);

/* The dual price of one budget over a batch. The steps along all hulls (offsets [N + 1], cost, value) are taken by falling
 * slope while the slack lasts; `slack` is what may be spent beyond every prompt's first vertex. Fills price, the slope at
 * which the slack is used up (0 if it never is), and left, what remains for steps of exactly this slope. Returns 0, or -1
 * when memory allocation fails. */
int p2l_select_steps(const int64_t *offsets, const double *cost, const double *value, int64_t n_prompts, double slack,
                     int threads, double *price, double *left);

/* The policies at that dual price: every steeper step, and as many steps of exactly that slope as `left` pays for, in
 * prompt order; at most one prompt ends between two vertices. Fills indices [N, 2], probabilities [N, 2], policy_value and
 * policy_cost [N]. */
void p2l_take_steps(const int64_t *offsets, const int32_t *models, const double *cost, const double *value, int64_t n_prompts,
                    double price, double left, int32_t *indices, double *probabilities, double *policy_value,
                    double *policy_cost);

/* Each prompt's best model by v[n, m] - penalty[m] + noise * p2l_noise[first_prompt + n, m] among the allowed ones (allowed
 * [N, M], NULL for all): its index (the lowest of equals), its lead over the runner-up (+inf when there is none) and,
 * without the noise, its own reduced value and the maximum over all models. Returns 0, or -1 when memory allocation fails. */
int p2l_best_models(const double *v, const double *penalty, const uint8_t *allowed, int64_t first_prompt, double noise,
                    int64_t n_prompts, int64_t n_models, int threads, int32_t *best, double *reduced, double *most,
                    double *lead);

/* The noise [N, M]: a hash of prompt (prompts [N]) and model, in [-1, 0). */
void p2l_noise(const int64_t *prompts, int64_t n_prompts, int64_t n_models, double *noise);

/* Clears in usable [N, M] the dominated models: another usable model has no less value and needs no more of any row's amounts
 * ([K, M] or [K, N, M]); of equal models the first stays. Some optimum needs none of them. Returns 0, or -1 when memory
 * allocation fails. */
int p2l_undominated(const double *v, const double *amounts, int amounts_per_prompt, int64_t n_rows, int64_t n_prompts,
                    int64_t n_models, uint8_t *usable);

/* score[n] solves sum_a q[a] sigmoid(score - theta[n, a]) = rate[n]; -inf at rate <= 0, +inf at rate >= 1.
 * Returns the number of prompts whose root did not converge (their score is NaN), or -1 when memory allocation fails. */
int64_t p2l_bt_score(const double *theta, const double *q, int q_per_prompt, const double *rate, int64_t n_prompts,
                     int64_t n_models, int threads, double *score);

/* The probabilities of each pair's outcomes (outcomes: 2 for bt, 3 for rk models, 4 for grk: A, B, tie, both bad) from e =
 * exp(theta) [N, M], lambda [N] (NULL: 1) and ground (0, or 1 for grounded models), into out [N, outcomes, M (M - 1) / 2]. */
void p2l_outcomes(const double *e, const double *lambda, double ground, int64_t outcomes, int64_t n_prompts, int64_t n_models,
                  int threads, double *out);

/* The votes' negative log-likelihoods, summed by prompt with their weights into loss [N], and the derivatives: by theta, added
 * to slope [N, M] (zeros), and by lambda, into by_excess [N]. t = theta - shift[n] [N, M], e = exp(t), ground = exp(-shift) [N]
 * (NULL: models without a ground), excess = lambda - 1 [N] (NULL: 0). Prompt n has the votes bounds[n] to bounds[n + 1] on
 * models a and b: outcome 0 a, 1 b, 2 tie, 3 both bad; `outcomes` as above, 3 counts both bad as a tie; half_ties counts either
 * tie as half a win and half a loss. Within 300 of each other, theta and log lambda neither overflow nor underflow. */
void p2l_votes_loss(const double *t, const double *e, const double *ground, const double *excess, const int64_t *bounds,
                    const int64_t *a, const int64_t *b, const int64_t *outcome, const double *weight, int64_t outcomes,
                    int half_ties, int64_t n_prompts, int64_t n_models, int threads, double *loss, double *slope,
                    double *by_excess);

/* Products with packed weights: out [rows, columns] = x [rows, depth] times the weights, plus bias [columns] (or NULL). Rows
 * are float32 or, with bf16, bfloat16; so are weights, bias and out. Packed weights: panels of 32 columns, the last one padded
 * with zeros, each [depth, 32], or with bf16 [depth / 2, 32, 2] for an even depth. level: of the instruction set, at most
 * p2l_linear_level. */
void p2l_linear(const void *x, int64_t rows, int64_t depth, const void *weight, const void *bias, int64_t columns, void *out,
                int bf16, int level, int threads);

/* 2: AVX-512 (with bf16: AVX512-BF16), 1: AVX2, 0: what the compiler makes of plain C, -1: cannot be computed. */
int p2l_linear_level(int bf16);

/* The same with int8 weights, stored as weight + 128 in uint8 panels [depth / 4, 32, 4] (depth: width, padded to a multiple of
 * 4), and weight_scale [columns]. Each row of x [rows, width] is quantised to 8 bits first, by groups of 192 values; scratch
 * holds scale and taken [rows, groups], then values [rows, depth] of 8 bits, or 16 at level 1. A row with a value that is not
 * finite gives NaN. */
void p2l_int8_linear(const float *x, int64_t rows, int64_t width, const uint8_t *weight, const float *weight_scale,
                     const float *bias, int64_t columns, uint8_t *scratch, float *out, int level, int threads);

/* 2: AVX-512 with VNNI, 1: AVX2, 0: what the compiler makes of plain C. */
int p2l_int8_level(void);

/* A decoder's steps between its matrix products. Rows are contiguous, float32 or, with bf16, bfloat16.
 *
 * x [rows, columns] += delta (or NULL), then out = x / sqrt(mean(x^2) + eps) * weight [columns]. */
void p2l_rms_norm(void *x, const void *delta, const void *weight, void *out, int64_t rows, int64_t columns, double eps,
                  int bf16, int threads);

/* out [n, columns] = rows tokens [n] of table [n_rows, columns]: float32, or bfloat16 as told; a bfloat16 table may be widened
 * to float32. Returns 0, or 1 for a token that is no row's number. */
int p2l_embed(const void *table, int64_t n_rows, int64_t columns, const int32_t *tokens, int64_t n, void *out, int table_bf16,
              int bf16, int threads);

/* SwiGLU: out [rows, inner] = silu(gate) * up; each row of gate_up [rows, 2 inner] holds gate, then up. */
void p2l_swiglu(const void *gate_up, void *out, int64_t rows, int64_t inner, int bf16, int threads);

/* RoPE of x [tokens, queries + 2 keys heads of 2 half columns]: queries in place, keys (rotated) and values (copied) into
 * kv [rows, 2, keys, 2 half]. Row r is token sources[r], at positions[sources[r]] of the tables cosine and sine
 * [n_positions, half], or row -1 - sources[r] of prefix [n_prefix, 2, keys, 2 half] where that is negative. Returns 0, or 1
 * when a source or a position is out of range; that row is then not written. */
int p2l_rope_kv(void *x, int64_t tokens, int64_t queries, int64_t keys, int64_t half, const float *cosine, const float *sine,
                int64_t n_positions, const int32_t *positions, const int32_t *sources, int64_t rows, const void *prefix,
                int64_t n_prefix, void *kv, int bf16, int threads);

/* Causal attention within each of N prompts, softmax(q k' / sqrt(size)) v, where heads / kv_heads query heads share a key head.
 * q: `queries` rows of [heads, size], q_stride elements apart; kv [keys, 2, kv_heads, size]; starts and key_starts [N + 1]: the
 * offsets of the prompts in q and kv. A prompt has no fewer keys than queries; its last query sees them all, the one before it
 * all but one. last: q holds each prompt's last query alone. rounded: float32 is rounded to bfloat16 for the products where the
 * CPU has dot products of bfloat16 (sums stay float32), as it is there for bf16. Fills out [queries, heads, size]. Returns 0, 1
 * when the offsets do not fit (nothing is written then), or -1 when memory allocation fails. */
int p2l_attention(const void *q, int64_t q_stride, int64_t queries, const void *kv, int64_t keys, const int32_t *starts,
                  const int32_t *key_starts, int64_t prompts, int64_t heads, int64_t kv_heads, int64_t size, int last, int bf16,
                  int rounded, int threads, void *out);

/* Packed weights [depth, columns] and their bias (or NULL): as in p2l_linear, or with a scale as in p2l_int8_linear. */
typedef struct {
    const void *data, *bias;
    const float *scale;
    int64_t depth, columns;
    int level;
} p2l_weight;

/* gate_up: both products of SwiGLU, the gate's columns first. */
typedef struct {
    const void *attention_norm, *mlp_norm;
    p2l_weight qkv, out, gate_up, down;
} p2l_layer_weights;

/* A packed batch on its way through the layers. Given: its shape, positions and sources as in p2l_rope_kv, starts and
 * key_starts as in p2l_attention, the threads of each step. x [tokens, columns] and delta, its next summand; the others are
 * scratch, of the size of the step's result. */
typedef struct {
    int64_t tokens, keys, prompts, heads, kv_heads, half, n_positions;
    double eps;
    int bf16, rounded, norm_threads, qkv_threads, rope_threads, attention_threads, out_threads, gate_up_threads, gate_threads,
        down_threads;
    const float *cosine, *sine;
    const int32_t *positions, *sources, *starts, *key_starts;
    void *x, *delta, *normed, *projected, *kv, *attended, *gate_up, *gate;
    uint8_t *scratch;
} p2l_batch;

/* One layer: x += delta (not in the first layer), attention, MLP. Its keys and values are left in kv [keys, 2, kv_heads, size],
 * what is still to be added to x in delta. Returns 0, 1 when sources, positions or offsets are out of range, or -1 when memory
 * allocation fails. */
int p2l_layer(const p2l_layer_weights *w, const p2l_batch *b, int first, const void *prefix, int64_t n_prefix);

/* The backward passes of these steps, for training.
 *
 * RMSNorm: adds the gradient of the input to d_x [rows, columns]; d_weight [threads, columns] (or NULL), zeros on entry,
 * gets each thread's part of the weight's gradient. */
void p2l_rms_norm_backward(const void *x, const void *weight, const void *d_out, void *d_x, float *d_weight, int64_t rows,
                           int64_t columns, double eps, int bf16, int threads);

/* SwiGLU: d_gate_up [rows, 2 inner] from d_out [rows, inner]; also recomputes out [rows, inner]. */
void p2l_swiglu_backward(const void *gate_up, const void *d_out, void *d_gate_up, void *out, int64_t rows, int64_t inner,
                         int bf16, int threads);

/* RoPE in place on the first `rotated` of each row's heads of 2 half columns; cosine and sine [rows, half]; inverse: the
 * inverse rotation, which is also the gradient. */
void p2l_rope(void *x, const float *cosine, const float *sine, int64_t rows, int64_t heads, int64_t rotated, int64_t half,
              int inverse, int bf16, int threads);

/* The instruction set that the loader chose: 5 for x86-64-v4 (AVX-512) with bfloat16 dot products; 4, 3 or 2 for v4, v3 (AVX2),
 * v2; 0 elsewhere. */
int p2l_isa_level(void);

#endif
