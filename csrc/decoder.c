/* A decoder's steps between its matrix products: RMSNorm, rotary position embedding (RoPE) and SwiGLU, one pass each. torch
 * needs up to six passes and widens bfloat16 in memory.
 *
 * Rows are float32 or bfloat16 (as uint16_t). Arithmetic is float32; results are rounded once, to nearest, ties to even.
 * Reference implementations: p2l_engine/kernels/{rms_norm,rotary,swiglu}.py.
 */
#include "bfloat16.h"
#include "p2l_native.h"
#include "pool.h"

#include <math.h>
#include <string.h>

INLINE float get(const void *x, int64_t i, int bf16) {
    return bf16 ? widened(((const uint16_t *)x)[i]) : ((const float *)x)[i];
}

INLINE void put(void *x, int64_t i, float value, int bf16) {
    if (bf16)
        ((uint16_t *)x)[i] = narrowed(value);
    else
        ((float *)x)[i] = value;
}

INLINE void *at(void *x, int64_t i, int bf16) { return (char *)x + i * (bf16 ? 2 : 4); }
INLINE const void *from(const void *x, int64_t i, int bf16) { return (const char *)x + i * (bf16 ? 2 : 4); }

/* exp(x) to 2 ulp for x <= 0; 0 below -87. */
INLINE float exp_below_zero(float x) {
    const float clamped = x < -87.0f ? -87.0f : x;
    const float k = nearbyintf(clamped * 1.44269504f);
    const float r = (clamped - k * 0.693145752f) - k * 1.42860677e-6f; /* ln 2 in two parts */
    const float tail = 0.0416666667f + r * (8.33333333e-3f + r * 1.38888889e-3f);
    const float p = 1 + r * (1 + r * (0.5f + r * (0.166666667f + r * tail)));
    const int32_t bits = ((int32_t)k + 127) << 23;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return x < -87.0f ? 0 : p * scale;
}

INLINE void rms_norm_row(void *restrict x, const void *restrict delta, const void *restrict weight, void *restrict out,
                         int64_t columns, float eps, int bf16) {
    float squares = 0;
    if (delta) {
#pragma omp simd
        for (int64_t i = 0; i < columns; i++) put(x, i, get(x, i, bf16) + get(delta, i, bf16), bf16);
    }
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < columns; i++) squares += get(x, i, bf16) * get(x, i, bf16);
    const float scale = 1 / sqrtf(squares / (float)columns + eps);
#pragma omp simd
    for (int64_t i = 0; i < columns; i++) put(out, i, get(x, i, bf16) * scale * get(weight, i, bf16), bf16);
}

/* Adds the gradient of x to d_x, and this row's part of the weight's gradient to d_weight. */
INLINE void rms_norm_backward_row(const void *restrict x, const void *restrict weight, const void *restrict d_out,
                                  void *restrict d_x, float *restrict d_weight, int64_t columns, float eps, int bf16) {
    float squares = 0, along = 0;
#pragma omp simd reduction(+ : squares, along)
    for (int64_t i = 0; i < columns; i++) {
        squares += get(x, i, bf16) * get(x, i, bf16);
        along += get(x, i, bf16) * get(d_out, i, bf16) * get(weight, i, bf16);
    }
    const float scale = 1 / sqrtf(squares / (float)columns + eps), share = along * scale * scale * scale / (float)columns;
#pragma omp simd
    for (int64_t i = 0; i < columns; i++) {
        const float direct = get(d_out, i, bf16) * get(weight, i, bf16) * scale;
        put(d_x, i, get(d_x, i, bf16) + direct - get(x, i, bf16) * share, bf16);
    }
    if (d_weight) {
#pragma omp simd
        for (int64_t i = 0; i < columns; i++) d_weight[i] += get(d_out, i, bf16) * get(x, i, bf16) * scale;
    }
}

INLINE void swiglu_row(const void *restrict gate_up, void *restrict out, int64_t inner, int bf16) {
    const void *up = from(gate_up, inner, bf16);
#pragma omp simd
    for (int64_t i = 0; i < inner; i++) {
        const float gate = get(gate_up, i, bf16), small = exp_below_zero(-fabsf(gate));
        /* sigmoid, without overflow: 1 / (1 + small), or small / (1 + small) */
        put(out, i, gate * (gate >= 0 ? 1 : small) / (1 + small) * get(up, i, bf16), bf16);
    }
}

/* Writes d_gate_up, and recomputes the output, which the gradient of the next product needs. */
INLINE void swiglu_backward_row(const void *restrict gate_up, const void *restrict d_out, void *restrict d_gate_up,
                                void *restrict out, int64_t inner, int bf16) {
    const void *up = from(gate_up, inner, bf16);
    void *d_up = at(d_gate_up, inner, bf16);
#pragma omp simd
    for (int64_t i = 0; i < inner; i++) {
        const float gate = get(gate_up, i, bf16), small = exp_below_zero(-fabsf(gate)), d = get(d_out, i, bf16);
        const float sigmoid = (gate >= 0 ? 1 : small) / (1 + small), other = (gate >= 0 ? small : 1) / (1 + small);
        const float silu = gate * sigmoid, linear = get(up, i, bf16);
        put(out, i, silu * linear, bf16);
        put(d_up, i, d * silu, bf16);
        put(d_gate_up, i, d * linear * (sigmoid + silu * other), bf16);
    }
}

INLINE void rope(const void *restrict x, void *restrict out, const float *restrict cosine, const float *restrict sine,
                 int64_t half, int bf16) {
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        const float first = get(x, i, bf16), second = get(x, half + i, bf16);
        put(out, i, first * cosine[i] - second * sine[i], bf16);
        put(out, half + i, second * cosine[i] + first * sine[i], bf16);
    }
}

INLINE void rope_in_place(void *x, const float *restrict cosine, const float *restrict sine, int64_t half, int bf16) {
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        const float first = get(x, i, bf16), second = get(x, half + i, bf16);
        put(x, i, first * cosine[i] - second * sine[i], bf16);
        put(x, half + i, second * cosine[i] + first * sine[i], bf16);
    }
}

typedef struct {
    void *x;
    int64_t tokens, queries, keys, half;
    const float *cosine, *sine;
    int64_t n_positions;
    const int32_t *positions, *sources;
    const void *prefix;
    int64_t n_prefix;
    void *kv;
} rope_kv;

/* Returns 1 when the row's source or position is out of range, else 0. */
INLINE int rope_kv_row(const rope_kv *r, int64_t row, int bf16) {
    const int64_t head = 2 * r->half, width = r->keys * head, source = r->sources[row], size = bf16 ? 2 : 4;
    void *kv = at(r->kv, row * 2 * width, bf16);
    if (source < 0) {
        if (-1 - source >= r->n_prefix) return 1;
        memcpy(kv, from(r->prefix, (-1 - source) * 2 * width, bf16), 2 * width * size);
        return 0;
    }
    if (source >= r->tokens || r->positions[source] < 0 || r->positions[source] >= r->n_positions) return 1;
    const float *cosine = r->cosine + r->positions[source] * r->half, *sine = r->sine + r->positions[source] * r->half;
    void *x = at(r->x, source * (r->queries + 2 * r->keys) * head, bf16);
    for (int64_t h = 0; h < r->queries; h++) rope_in_place(at(x, h * head, bf16), cosine, sine, r->half, bf16);
    for (int64_t h = 0; h < r->keys; h++)
        rope(at(x, (r->queries + h) * head, bf16), at(kv, h * head, bf16), cosine, sine, r->half, bf16);
    memcpy(at(kv, width, bf16), at(x, r->queries * head + width, bf16), width * size);
    return 0;
}

/* Rotates the first `rotated` heads of a row by its position's angle, or back when inverse. */
INLINE void rope_row(void *x, const float *cosine, const float *sine, int64_t rotated, int64_t half, int inverse, int bf16) {
    for (int64_t h = 0; h < rotated; h++) {
        void *head = at(x, 2 * h * half, bf16);
#pragma omp simd
        for (int64_t i = 0; i < half; i++) {
            const float first = get(head, i, bf16), second = get(head, half + i, bf16), s = inverse ? -sine[i] : sine[i];
            put(head, i, first * cosine[i] - second * s, bf16);
            put(head, half + i, second * cosine[i] + first * s, bf16);
        }
    }
}

/* The arguments of a step over rows. */
typedef struct {
    int64_t columns; /* of a row; of SwiGLU `inner` */
    void *x;
    const void *delta, *weight;
    const void *gate_up, *d_out;
    void *out, *d_x;
    float *d_weight, eps;
    const float *cosine, *sine;
    int64_t heads, rotated, half;
    int inverse;
    const rope_kv *kv;
} step;

/* Loops over a range of rows, instantiated per dtype (`bf16` is a constant) and compiled per instruction set. */
#define RANGES(NAME, BF16)                                                                                                   \
    P2L_CLONES static int64_t rms_norm_##NAME(const void *work, int64_t first, int64_t last, int64_t task) {                 \
        const step *s = work;                                                                                                \
        (void)task;                                                                                                          \
        for (int64_t n = first; n < last; n++)                                                                               \
            rms_norm_row(at(s->x, n * s->columns, BF16), s->delta ? from(s->delta, n * s->columns, BF16) : 0, s->weight,     \
                         at(s->out, n * s->columns, BF16), s->columns, s->eps, BF16);                                        \
        return 0;                                                                                                            \
    }                                                                                                                        \
    P2L_CLONES static int64_t swiglu_##NAME(const void *work, int64_t first, int64_t last, int64_t task) {                   \
        const step *s = work;                                                                                                \
        (void)task;                                                                                                          \
        for (int64_t n = first; n < last; n++)                                                                               \
            swiglu_row(from(s->gate_up, 2 * n * s->columns, BF16), at(s->out, n * s->columns, BF16), s->columns, BF16);      \
        return 0;                                                                                                            \
    }                                                                                                                        \
    P2L_CLONES static int64_t rms_norm_backward_##NAME(const void *work, int64_t first, int64_t last, int64_t task) {        \
        const step *s = work;                                                                                                \
        for (int64_t n = first; n < last; n++)                                                                               \
            rms_norm_backward_row(from(s->x, n * s->columns, BF16), s->weight, from(s->d_out, n * s->columns, BF16),         \
                                  at(s->d_x, n * s->columns, BF16), s->d_weight ? s->d_weight + task * s->columns : 0,       \
                                  s->columns, s->eps, BF16);                                                                 \
        return 0;                                                                                                            \
    }                                                                                                                        \
    P2L_CLONES static int64_t swiglu_backward_##NAME(const void *work, int64_t first, int64_t last, int64_t task) {          \
        const step *s = work;                                                                                                \
        (void)task;                                                                                                          \
        for (int64_t n = first; n < last; n++)                                                                               \
            swiglu_backward_row(from(s->gate_up, 2 * n * s->columns, BF16), from(s->d_out, n * s->columns, BF16),            \
                                at(s->d_x, 2 * n * s->columns, BF16), at(s->out, n * s->columns, BF16), s->columns, BF16);   \
        return 0;                                                                                                            \
    }                                                                                                                        \
    P2L_CLONES static int64_t rope_##NAME(const void *work, int64_t first, int64_t last, int64_t task) {                     \
        const step *s = work;                                                                                                \
        (void)task;                                                                                                          \
        for (int64_t n = first; n < last; n++)                                                                               \
            rope_row(at(s->x, n * s->heads * 2 * s->half, BF16), s->cosine + n * s->half, s->sine + n * s->half, s->rotated, \
                     s->half, s->inverse, BF16);                                                                             \
        return 0;                                                                                                            \
    }                                                                                                                        \
    P2L_CLONES static int64_t rope_kv_##NAME(const void *work, int64_t first, int64_t last, int64_t task) {                  \
        const step *s = work;                                                                                                \
        int outside = 0;                                                                                                     \
        (void)task;                                                                                                          \
        for (int64_t n = first; n < last; n++) outside |= rope_kv_row(s->kv, n, BF16);                                       \
        return outside;                                                                                                      \
    }

RANGES(f32, 0)
RANGES(bf16, 1)

void p2l_rms_norm(void *x, const void *delta, const void *weight, void *out, int64_t rows, int64_t columns, double eps,
                  int bf16, int threads) {
    const step s = {.columns = columns, .x = x, .delta = delta, .weight = weight, .out = out, .eps = (float)eps};
    p2l_run_ranges(threads, p2l_parts(threads), rows, bf16 ? rms_norm_bf16 : rms_norm_f32, &s);
}

void p2l_swiglu(const void *gate_up, void *out, int64_t rows, int64_t inner, int bf16, int threads) {
    const step s = {.columns = inner, .gate_up = gate_up, .out = out};
    p2l_run_ranges(threads, p2l_parts(threads), rows, bf16 ? swiglu_bf16 : swiglu_f32, &s);
}

int p2l_rope_kv(void *x, int64_t tokens, int64_t queries, int64_t keys, int64_t half, const float *cosine, const float *sine,
                int64_t n_positions, const int32_t *positions, const int32_t *sources, int64_t rows, const void *prefix,
                int64_t n_prefix, void *kv, int bf16, int threads) {
    const rope_kv r = {x, tokens, queries, keys, half, cosine, sine, n_positions, positions, sources, prefix, n_prefix, kv};
    const step s = {.kv = &r};
    return p2l_run_ranges(threads, p2l_parts(threads), rows, bf16 ? rope_kv_bf16 : rope_kv_f32, &s) != 0;
}

/* One part for each thread, since each adds to a sum of its own: in the same order in every run. */
void p2l_rms_norm_backward(const void *x, const void *weight, const void *d_out, void *d_x, float *d_weight, int64_t rows,
                           int64_t columns, double eps, int bf16, int threads) {
    const step s = {.columns = columns,
                    .x = (void *)x,
                    .weight = weight,
                    .d_out = d_out,
                    .d_x = d_x,
                    .d_weight = d_weight,
                    .eps = (float)eps};
    p2l_run_ranges(threads, threads, rows, bf16 ? rms_norm_backward_bf16 : rms_norm_backward_f32, &s);
}

void p2l_swiglu_backward(const void *gate_up, const void *d_out, void *d_gate_up, void *out, int64_t rows, int64_t inner,
                         int bf16, int threads) {
    const step s = {.columns = inner, .gate_up = gate_up, .d_out = d_out, .d_x = d_gate_up, .out = out};
    p2l_run_ranges(threads, p2l_parts(threads), rows, bf16 ? swiglu_backward_bf16 : swiglu_backward_f32, &s);
}

void p2l_rope(void *x, const float *cosine, const float *sine, int64_t rows, int64_t heads, int64_t rotated, int64_t half,
              int inverse, int bf16, int threads) {
    const step s = {
        .x = x, .cosine = cosine, .sine = sine, .heads = heads, .rotated = rotated, .half = half, .inverse = inverse};
    p2l_run_ranges(threads, p2l_parts(threads), rows, bf16 ? rope_bf16 : rope_f32, &s);
}
