/* The loss of votes at their prompts' coefficients, and its first derivatives: each exponential is taken once for a prompt and
 * model, so that a vote costs a logarithm and a few divisions. Formulas: p2l_engine/feedback/formulas.py. */
#include "p2l_native.h"
#include "pool.h"

#include <math.h>

typedef struct {
    const double *t, *e, *ground, *excess;
    const int64_t *bounds, *a, *b, *outcome;
    const double *weight;
    int64_t outcomes, n_models;
    int half_ties;
    double *loss, *slope, *by_excess;
} votes;

/* One prompt's exp(theta), times exp(-shift): t = theta - shift, e = exp(t), g = ground exp(-shift). */
typedef struct {
    const double *t, *e;
    double g, excess, lambda;
    double *slope;
    double loss, by_excess;
} prompt;

/* P(x beats y) = x / (x + lambda y + g) */
static inline void won(prompt *p, int64_t x, int64_t y, double w) {
    const double beats = p->e[x] + p->lambda * p->e[y] + p->g, other = p->lambda * p->e[y];
    p->loss += w * (log(beats) - p->t[x]);
    p->slope[x] -= w * (other + p->g) / beats;
    p->slope[y] += w * other / beats;
    p->by_excess += w * p->e[y] / beats;
}

/* Of four outcomes: (lambda - 1) x y (2 g + (lambda + 1)(x + y)) / ((x + lambda y + g)(y + lambda x + g)(x + y + g)) */
static inline void tied_well(prompt *p, int64_t a, int64_t b, double w) {
    const double x = p->e[a], y = p->e[b], l = p->lambda, sum = x + y;
    const double beats = x + l * y + p->g, loses = y + l * x + p->g, number = 2 * p->g + (l + 1) * sum, bad = sum + p->g;
    p->loss -= w * (log(p->excess * (number / bad) / (beats * loses)) + p->t[a] + p->t[b]);
    const double each = (l + 1) / number - 1 / bad;
    p->slope[a] -= w * ((l * y + p->g) / beats - l * x / loses + x * each);
    p->slope[b] -= w * ((l * x + p->g) / loses - l * y / beats + y * each);
    p->by_excess -= w * (1 / p->excess + sum / number - y / beats - x / loses);
}

/* Of three outcomes: ((lambda^2 - 1) x y + g (lambda (x + y) + g)) / ((x + lambda y + g)(y + lambda x + g)) */
static inline void tied(prompt *p, int64_t a, int64_t b, double w) {
    const double x = p->e[a], y = p->e[b], l = p->lambda, sum = x + y;
    const double beats = x + l * y + p->g, loses = y + l * x + p->g, both = p->excess * (l + 1) * x * y;
    const double number = both + p->g * (l * sum + p->g);
    p->loss -= w * log(number / (beats * loses));
    p->slope[a] -= w * ((both + p->g * l * x) / number - x / beats - l * x / loses);
    p->slope[b] -= w * ((both + p->g * l * y) / number - l * y / beats - y / loses);
    p->by_excess -= w * ((2 * l * x * y + p->g * sum) / number - y / beats - x / loses);
}

/* g / (x + y + g) */
static inline void both_bad(prompt *p, int64_t a, int64_t b, double w) {
    const double x = p->e[a], y = p->e[b], bad = x + y + p->g;
    p->loss += w * (log(bad) - log(p->g));
    p->slope[a] += w * x / bad;
    p->slope[b] += w * y / bad;
}

static int64_t votes_range(const void *work, int64_t first, int64_t last, int64_t task) {
    const votes *v = work;
    (void)task;
    for (int64_t n = first; n < last; n++) {
        const int64_t row = n * v->n_models;
        const double excess = v->excess ? v->excess[n] : 0;
        prompt p = {v->t + row, v->e + row, v->ground ? v->ground[n] : 0, excess, 1 + excess, v->slope + row, 0, 0};
        for (int64_t i = v->bounds[n]; i < v->bounds[n + 1]; i++) {
            const int64_t a = v->a[i], b = v->b[i], outcome = v->outcome[i];
            const double w = v->weight[i];
            if (outcome == 0)
                won(&p, a, b, w);
            else if (outcome == 1)
                won(&p, b, a, w);
            else if (v->half_ties) {
                won(&p, a, b, w / 2);
                won(&p, b, a, w / 2);
            } else if (v->outcomes == 3)
                tied(&p, a, b, w);
            else if (outcome == 2)
                tied_well(&p, a, b, w);
            else
                both_bad(&p, a, b, w);
        }
        v->loss[n] = p.loss;
        v->by_excess[n] = p.by_excess;
    }
    return 0;
}

void p2l_votes_loss(const double *t, const double *e, const double *ground, const double *excess, const int64_t *bounds,
                    const int64_t *a, const int64_t *b, const int64_t *outcome, const double *weight, int64_t outcomes,
                    int half_ties, int64_t n_prompts, int64_t n_models, int threads, double *loss, double *slope,
                    double *by_excess) {
    const votes v = {t,      e,        ground,   excess,    bounds, a,     b,        outcome,
                     weight, outcomes, n_models, half_ties, loss,   slope, by_excess};
    p2l_run_ranges(threads, p2l_parts(threads), n_prompts, votes_range, &v);
}
