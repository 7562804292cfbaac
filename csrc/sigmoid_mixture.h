/* G(x) = sum_a q_a sigmoid(x - theta_a), evaluated with few exponentials and fewer divisions.
 *
 * With e_a = exp(theta_a - shift) and y = exp(x - shift), sigmoid(x - theta_a) = y / (y + e_a): M exponentials serve every
 * x of the same prompt. Four fractions share one division,
 *     q1/(y+e1) + q2/(y+e2) = (q1 (y+e2) + q2 (y+e1)) / ((y+e1) (y+e2)),
 * where every term is positive, so nothing cancels and the relative error stays at a few ulps. Products of four factors
 * stay inside float64 as long as the coefficients of a prompt span less than P2L_SPAN.
 */
#ifndef P2L_SIGMOID_MIXTURE_H
#define P2L_SIGMOID_MIXTURE_H

#include <math.h>
#include <stdint.h>

#define P2L_SPAN 150.0
#define P2L_GROUP 4

/* 1 / (1 + exp(-x)) without overflow for any finite x. */
static inline double p2l_sigmoid(double x) {
    if (x >= 0) return 1.0 / (1.0 + exp(-x));
    const double e = exp(x);
    return e / (1.0 + e);
}

/* exp on [-708, 708] by Cody-Waite reduction and a Taylor polynomial to 1 ulp or so, written so that compilers vectorise
 * it; libm's exp is a call per element. */
static inline double p2l_exp(double x) {
    const double n = floor(x * 1.4426950408889634074 + 0.5);
    const double r = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
    double p = 1.6059043836821613e-10; /* 1/13! */
    p = p * r + 2.0876756987868099e-9;
    p = p * r + 2.5052108385441719e-8;
    p = p * r + 2.7557319223985891e-7;
    p = p * r + 2.7557319223985893e-6;
    p = p * r + 2.4801587301587302e-5;
    p = p * r + 1.9841269841269841e-4;
    p = p * r + 1.3888888888888889e-3;
    p = p * r + 8.3333333333333333e-3;
    p = p * r + 4.1666666666666667e-2;
    p = p * r + 1.6666666666666667e-1;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    union {
        uint64_t bits;
        double value;
    } scale;
    /* Adding 1.5 * 2^52 leaves the integer n in the low bits: a conversion that every instruction set vectorises. */
    scale.value = n + 6755399441055744.0;
    scale.bits = (scale.bits + 1023) << 52;
    return p * scale.value;
}

/* The models that q supports, packed: their weights and coefficients; padded to a multiple of P2L_GROUP with weight 0 and
 * the last coefficient, which changes no sum. Returns the padded length. */
static inline int64_t p2l_pack_support(const double *q, int64_t n_models, int64_t *support, double *weights) {
    int64_t k = 0;
    for (int64_t a = 0; a < n_models; a++)
        if (q[a] > 0) {
            support[k] = a;
            weights[k++] = q[a];
        }
    while (k % P2L_GROUP) {
        support[k] = support[k - 1];
        weights[k++] = 0;
    }
    return k;
}

#endif
