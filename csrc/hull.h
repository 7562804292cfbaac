/* The upper concave hull of one prompt's models in the plane of cost and win rate. */
#ifndef P2L_HULL_H
#define P2L_HULL_H

#include <stdint.h>

/* order [M]: the models by rising cost, equal costs by rising index; scratch [M]. */
void p2l_sort_models(int32_t *order, int32_t *scratch, const double *costs, int64_t n_models);

/* The hull's vertices by rising cost and rising v, from the best of the cheapest models to the cheapest of the best ones, among
 * the allowed models (NULL: all). Returns their number; 0 when none is allowed. */
int64_t p2l_upper_hull(const double *costs, const double *v, const uint8_t *allowed, const int32_t *order, int64_t n_models,
                       int32_t *hull);

#endif
