/* The router's Bradley-Terry coefficient (paper, Algorithm 1 step 3, equation (9)) by Brent's method.
 *
 * The equation G(x) = sum_a q_a sigmoid(x - theta_a) = R is solved on the logit scale, f(x) = logit G(x) - logit R, where
 * it is nearly a straight line: a handful of steps where G itself takes a dozen. G and 1 - G are two sums of positive
 * terms, so f keeps its relative accuracy however close R comes to 0 or 1. As G lies between the sigmoids of the lowest and
 * the highest theta that q supports, the root lies in [low + logit R, high + logit R]: a bracket, up to rounding, which
 * widening the bracket handles.
 */
#include "p2l_native.h"
#include "pool.h"
#include "sigmoid_mixture.h"

#include <float.h>
#include <stdlib.h>

#define MAX_STEPS 100
#define X_TOLERANCE 1e-13

typedef struct {
    const double *theta; /* [k] coefficients of the supported models */
    const double *e;     /* [k] exp(theta - shift), unused when wide */
    const double *w;     /* [k] weights */
    int64_t k;
    double shift, logit_rate;
    int wide;
} mixture;

/* logit G(x) = log(sum w y/(y+e)) - log(sum w e/(y+e)); the factor y leaves the first sum. */
P2L_CLONES static double logit_narrow(const double *restrict e, const double *restrict w, int64_t k, double x) {
    const double y = exp(x);
    double win = 0, lose = 0;
#pragma omp simd reduction(+ : win, lose)
    for (int64_t s = 0; s < k; s++) {
        const double share = w[s] / (y + e[s]);
        win += share;
        lose += share * e[s];
    }
    return x + log(win) - log(lose);
}

static double logit_wide(const mixture *g, double x) {
    double win = 0, lose = 0;
    for (int64_t s = 0; s < g->k; s++) {
        win += g->w[s] * p2l_sigmoid(x - g->theta[s]);
        lose += g->w[s] * p2l_sigmoid(g->theta[s] - x);
    }
    return log(win) - log(lose);
}

static double excess(const mixture *g, double x) {
    const double logit = g->wide ? logit_wide(g, x) : logit_narrow(g->e, g->w, g->k, x - g->shift);
    return logit - g->logit_rate;
}

/* Brent (1973), chapter 4: bisection, secant and inverse quadratic steps. f(a) and f(b) differ in sign. */
static double brent(const mixture *g, double a, double fa, double b, double fb, int *converged) {
    double c = a, fc = fa, step = b - a, before = step;
    *converged = 1;
    for (int i = 0; i < MAX_STEPS; i++) {
        if (fabs(fc) < fabs(fb)) {
            a = b, b = c, c = a;
            fa = fb, fb = fc, fc = fa;
        }
        const double tolerance = 2 * DBL_EPSILON * fabs(b) + X_TOLERANCE, half = 0.5 * (c - b);
        if (fb == 0 || fabs(half) <= tolerance) return b;
        if (fabs(before) < tolerance || fabs(fa) <= fabs(fb)) {
            step = before = half;
        } else {
            double p, q;
            const double s = fb / fa;
            if (a == c) {
                p = 2 * half * s;
                q = 1 - s;
            } else {
                const double u = fa / fc, r = fb / fc;
                p = s * (2 * half * u * (u - r) - (b - a) * (r - 1));
                q = (u - 1) * (r - 1) * (s - 1);
            }
            if (p > 0)
                q = -q;
            else
                p = -p;
            if (2 * p < fmin(3 * half * q - fabs(tolerance * q), fabs(before * q))) {
                before = step;
                step = p / q;
            } else {
                step = before = half;
            }
        }
        a = b, fa = fb;
        b += fabs(step) > tolerance ? step : copysign(tolerance, half);
        fb = excess(g, b);
        if ((fb > 0) == (fc > 0)) {
            c = a, fc = fa;
            step = before = b - a;
        }
    }
    *converged = 0;
    return b;
}

static double solve(const mixture *g, double low, double high, int *converged) {
    /* At the ends of the bracket f is zero or of a known sign; where rounding says otherwise, widen it. */
    double a = low + g->logit_rate, b = high + g->logit_rate, pad = 4 * DBL_EPSILON * (1 + fabs(a) + fabs(b));
    *converged = 1;
    if (low == high) return a;
    double fa = excess(g, a), fb = excess(g, b);
    for (int i = 0; i < 64 && fa > 0; i++, pad *= 2) fa = excess(g, a -= pad);
    for (int i = 0; i < 64 && fb < 0; i++, pad *= 2) fb = excess(g, b += pad);
    if (!(fa <= 0 && fb >= 0)) {
        *converged = 0;
        return NAN;
    }
    if (fa == 0) return a;
    if (fb == 0) return b;
    return brent(g, a, fa, b, fb, converged);
}

P2L_CLONES static void exponentials(const double *restrict theta, double shift, int64_t k, double *restrict e) {
#pragma omp simd
    for (int64_t s = 0; s < k; s++) e[s] = p2l_exp(theta[s] - shift);
}

typedef struct {
    const double *theta, *q;
    int q_per_prompt;
    const double *rate;
    int64_t n_models;
    double *score;
} batch;

/* Returns the number of prompts that did not converge. */
static int64_t score_range(const void *work, int64_t first, int64_t last, int64_t task) {
    const batch *b = work;
    const int64_t n_models = b->n_models, capacity = n_models + P2L_GROUP;
    double *scratch = malloc(sizeof(double) * 3 * capacity);
    int64_t *support = malloc(sizeof(int64_t) * capacity);
    (void)task;
    if (!scratch || !support) {
        free(scratch);
        free(support);
        return -1;
    }
    double *coefficients = scratch, *e = scratch + capacity, *weights = scratch + 2 * capacity;
    int64_t k = 0, diverged = 0;
    for (int64_t n = first; n < last; n++) {
        const double rate = b->rate[n];
        if (n == first || b->q_per_prompt)
            k = p2l_pack_support(b->q + (b->q_per_prompt ? n * n_models : 0), n_models, support, weights);
        if (rate <= 0 || rate >= 1) {
            b->score[n] = rate <= 0 ? -INFINITY : INFINITY;
            continue;
        }
        double low = INFINITY, high = -INFINITY;
        for (int64_t s = 0; s < k; s++) {
            const double t = coefficients[s] = b->theta[n * n_models + support[s]];
            low = t < low ? t : low;
            high = t > high ? t : high;
        }
        mixture g = {coefficients, e, weights, k, high, log(rate) - log1p(-rate), 0};
        /* |x - shift| is at most the span plus |logit R| < 746 / 2; both must stay inside exp's range. */
        g.wide = !(high - low < P2L_SPAN) || fabs(g.logit_rate) > 500;
        if (!g.wide) exponentials(coefficients, high, k, e);
        int converged;
        b->score[n] = solve(&g, low, high, &converged);
        if (!converged) {
            b->score[n] = NAN;
            diverged++;
        }
    }
    free(scratch);
    free(support);
    return diverged;
}

int64_t p2l_bt_score(const double *theta, const double *q, int q_per_prompt, const double *rate, int64_t n_prompts,
                     int64_t n_models, int threads, double *score) {
    const batch b = {theta, q, q_per_prompt, rate, n_models, score};
    return p2l_run_ranges(threads, p2l_parts(threads), n_prompts, score_range, &b);
}
