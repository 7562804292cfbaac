/* What attention_task.h multiplies, for ITEM elements of a lane: a float32, or two bfloat16 in a float's 32 bits. Included
 * there once for each instruction set.
 */
#if ITEM == 1
INLINED vec OF(plus_product)(vec sum, float x, vec y) { return sum + x * y; }

/* `size` elements of x, from the first, as items. */
INLINED void OF(copy)(const void *restrict x, int64_t first, float *restrict to, int64_t size, int bf16) {
    if (bf16) {
#pragma omp simd
        for (int64_t i = 0; i < size; i++) to[i] = widened(((const uint16_t *)x)[first + i]);
    } else {
#pragma omp simd
        for (int64_t i = 0; i < size; i++) to[i] = ((const float *)x)[first + i];
    }
}

/* The same of `count` rows, `width` apart, as lines of ITEM rows each, `padded` items long. */
INLINED void OF(copy_lines)(const void *x, int64_t first, int64_t width, int64_t count, float *to, int64_t size, int64_t padded,
                            int bf16) {
    for (int64_t i = 0; i < count; i++) OF(copy)(x, first + i * width, to + i * padded, size, bf16);
}

/* The weights of ITEM keys as items; adds them to the sum as they are after rounding. */
INLINED vec OF(items)(const vec *weights, vec *sum) {
    *sum += weights[0];
    return weights[0];
}
#else
INLINED vec OF(plus_product)(vec sum, float x, vec y) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(x), (__m512bh)y);
}

INLINED __mmask16 OF(first_lanes)(int64_t count) { return count < 16 ? (1 << count) - 1 : 0xffff; }

/* Those 16 elements of x, from the first, that are in the mask, as bfloat16; others are 0. */
INLINED __m256i OF(sixteen)(const void *x, int64_t first, __mmask16 some, int bf16) {
    return bf16 ? _mm256_maskz_loadu_epi16(some, (const uint16_t *)x + first)
                : (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(some, (const float *)x + first));
}

/* The first of each lane's two in the lower half. */
INLINED __m512i OF(pairs)(__m256i first, __m256i second) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}

INLINED void OF(copy)(const void *restrict x, int64_t first, float *restrict to, int64_t size, int bf16) {
    int64_t i = 0; /* not masked throughout: loads wait for a masked store to reach the cache */
    for (; i + 16 <= size; i += 16) _mm256_storeu_si256((__m256i *)(to + i / 2), OF(sixteen)(x, first + i, 0xffff, bf16));
    const int64_t left = size - i;
    if (left) /* a zero behind an odd number */
        _mm256_mask_storeu_epi16(to + i / 2, OF(first_lanes)(left + left % 2),
                                 OF(sixteen)(x, first + i, OF(first_lanes)(left), bf16));
}

INLINED void OF(copy_lines)(const void *x, int64_t first, int64_t width, int64_t count, float *to, int64_t size, int64_t padded,
                            int bf16) {
    for (int64_t row = 0; row < count; row += 2) /* zeros behind an odd number */
        for (int64_t i = 0; i < size; i += 16) {
            const __mmask16 some = OF(first_lanes)(size - i), others = row + 1 < count ? some : 0;
            const int64_t from = first + row * width + i, next = row + 1 < count ? from + width : from;
            _mm512_storeu_si512(to + row / 2 * padded + i,
                                OF(pairs)(OF(sixteen)(x, from, some, bf16), OF(sixteen)(x, next, others, bf16)));
        }
}

INLINED vec OF(items)(const vec *weights, vec *sum) {
    const __m256i first = (__m256i)_mm512_cvtneps_pbh((__m512)weights[0]);
    const __m256i second = (__m256i)_mm512_cvtneps_pbh((__m512)weights[1]);
    const __m512i both = OF(pairs)(first, second);
    *sum += (vec)_mm512_slli_epi32(both, 16) + (vec)_mm512_and_si512(both, _mm512_set1_epi32(-65536));
    return (vec)both;
}
#endif
