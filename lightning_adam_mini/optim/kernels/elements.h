/* Loops over elements that lie one after the other, in float32 or bfloat16. */
#ifndef ADAM_MINI_ELEMENTS_H
#define ADAM_MINI_ELEMENTS_H

#include <float.h>
#include <math.h>
#include <string.h>

#include "types.h"

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE float of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE float load(const void *data, int64_t i, int bf16) {
    if (!bf16) return ((const float *)data)[i];
    return of_bits((uint32_t)((const uint16_t *)data)[i] << 16);
}

INLINE void store(void *data, int64_t i, float value, int bf16) {
    if (!bf16) {
        ((float *)data)[i] = value;
        return;
    }
    uint32_t bits = bits_of(value);
    uint32_t nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    ((uint16_t *)data)[i] = value != value ? (uint16_t)0x7fc0 : (uint16_t)nearest_even;
}

INLINE void *at(const void *data, int64_t i, int64_t bf16) { return (char *)data + i * (bf16 ? 2 : 4); }

/* a * b + c with one rounding, as torch's operators have it, unless it would be the call of a function. */
INLINE float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
    return fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

/* m + (1 - beta1) (g - m), from the end that is nearer, as torch's lerp: beta1 = 0 gives g itself. */
INLINE float moved(float m, float g, float from_m, float weight) {
    return fused(weight, g - m, from_m != 0 ? m : g);
}

/* The same sums in double, where those in float32 are infinite: squares may overflow whose mean does not. */
static double wide_sum(const void *g, int64_t n, int64_t stride, int p16) {
    double total = 0;
    for (int64_t i = 0; i < n; i++) {
        double x = load(g, i * stride, p16);
        total += x * x;
    }
    return total;
}

INLINE int overflows(double sum) { return sum > DBL_MAX; } /* as its parts did; a NaN stays one */

/* Sums of squares by lanes: so few adds in float32 one after the other that no rounding piles up. Where there are
 * `sums`, sums[j] += g[j]^2 too. */
INLINE double sum_lanes(const void *restrict g, int64_t n, float *restrict sums, int p16) {
    double total = 0;
    for (int64_t start = 0; start < n; start += SUM_LENGTH) {
        int64_t i = start, end = MIN(start + SUM_LENGTH, n);
        float lanes[LANES] = {0};
        double sum = 0;
        for (; i + LANES <= end; i += LANES) {
#pragma omp simd
            for (int64_t l = 0; l < LANES; l++) {
                float x = load(g, i + l, p16), square = x * x;
                lanes[l] += square;
                if (sums) sums[i + l] += square;
            }
        }
        for (int64_t l = 0; i + l < end; l++) {
            float x = load(g, i + l, p16), square = x * x;
            lanes[l] += square;
            if (sums) sums[i + l] += square;
        }
#pragma omp simd reduction(+ : sum)
        for (int64_t l = 0; l < LANES; l++) sum += lanes[l];
        total += sum;
    }
    return overflows(total) ? wide_sum(g, n, 1, p16) : total;
}

/* sums[j] += sum over i of g[i][j]^2, for a few thousand rows. Eight at a time: memory is quicker at many streams. */
INLINE void sum_rows_of(const void *restrict g, int64_t stride, int64_t height, int64_t width, float *restrict sums,
                        int p16) {
    int64_t i = 0;
    for (; i + 8 <= height; i += 8) {
        const void *restrict rows = at(g, i * stride, p16);
#pragma omp simd
        for (int64_t j = 0; j < width; j++) {
            float a = load(rows, j, p16), b = load(rows, j + stride, p16), c = load(rows, j + 2 * stride, p16);
            float d = load(rows, j + 3 * stride, p16), e = load(rows, j + 4 * stride, p16);
            float f = load(rows, j + 5 * stride, p16), h = load(rows, j + 6 * stride, p16);
            float k = load(rows, j + 7 * stride, p16);
            sums[j] += ((a * a + b * b) + (c * c + d * d)) + ((e * e + f * f) + (h * h + k * k));
        }
    }
    for (; i < height; i++) {
        const void *restrict row = at(g, i * stride, p16);
#pragma omp simd
        for (int64_t j = 0; j < width; j++) {
            float x = load(row, j, p16);
            sums[j] += x * x;
        }
    }
}

INLINE void update_run_of(void *restrict p, const void *restrict g, void *restrict m, int64_t n, const Work *w,
                          float factor, int p16, int m16) {
    float decay = w->decay, sign = w->sign, from_m = w->from_m, weight = w->weight;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float x = moved(load(m, i, m16), sign * load(g, i, p16), from_m, weight);
        store(m, i, x, m16);
        store(p, i, load(p, i, p16) * decay - factor * x, p16);
    }
}

INLINE void update_columns_of(void *restrict p, const void *restrict g, void *restrict m, int64_t n, const Work *w,
                              const float *restrict factors, int p16, int m16) {
    float decay = w->decay, sign = w->sign, from_m = w->from_m, weight = w->weight;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float x = moved(load(m, i, m16), sign * load(g, i, p16), from_m, weight);
        store(m, i, x, m16);
        store(p, i, load(p, i, p16) * decay - factors[i] * x, p16);
    }
}

INLINE void update_elements_of(void *restrict p, const void *restrict g, void *restrict m, int64_t n, const Work *w,
                               float *restrict v, int p16, int m16) {
    float decay = w->decay, sign = w->sign, from_m = w->from_m, weight = w->weight;
    float beta2 = w->beta2, rest2 = w->rest2, root = w->root, eps = w->eps, step_size = w->step_size;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float y = load(g, i, p16), x = moved(load(m, i, m16), sign * y, from_m, weight);
        float moment = fused(rest2 * y, y, v[i] * beta2);
        v[i] = moment;
        store(m, i, x, m16);
        store(p, i, load(p, i, p16) * decay - step_size * x / (sqrtf(moment) / root + eps), p16);
    }
}

INLINE void update_factored_of(void *restrict p, const void *restrict g, void *restrict m, int64_t n, const Work *w,
                               float along, const float *restrict across, int p16, int m16) {
    float decay = w->decay, sign = w->sign, from_m = w->from_m, weight = w->weight;
    float root = w->root, eps = w->eps, step_size = w->step_size;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float x = moved(load(m, i, m16), sign * load(g, i, p16), from_m, weight);
        store(m, i, x, m16);
        store(p, i, load(p, i, p16) * decay - step_size * x / (along * across[i] / root + eps), p16);
    }
}

#endif
