/* Loops over contiguous elements, in every storage format: float32 and bfloat16 in place; 8-bit codes and
 * stochastically rounded numbers through small buffers of float32.
 *
 * A loop takes its formats as constants (`p16`, `m16`) and is inlined once per combination, so that the compiler
 * vectorizes each without branches. */
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
    /* To nearest even, as torch rounds. The carry would turn some NaN into infinity, so NaN is written apart. */
    uint32_t nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    ((uint16_t *)data)[i] = value != value ? (uint16_t)0x7fc0 : (uint16_t)nearest_even;
}

INLINE void *at(const void *data, int64_t i, int64_t bf16) { return (char *)data + i * (bf16 ? 2 : 4); }

/* a * b + c with one rounding, as in torch's vectorized lerp and addcmul. Without an instruction for it, `fmaf` is a
 * slow library call, and two roundings do. */
INLINE float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
    return fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

/* m + (1 - beta1) (g - m), computed from the nearer end as in torch's lerp, so that beta1 = 0 gives exactly g. */
INLINE float moved(float m, float g, float from_m, float weight) {
    return fused(weight, g - m, from_m != 0 ? m : g);
}

/* A sum of squares in double, for when that in float32 is infinite: a sum or a square may overflow where the mean does
 * not. */
static double wide_sum(const void *g, int64_t n, int64_t stride, int p16) {
    double total = 0;
    for (int64_t i = 0; i < n; i++) {
        double x = load(g, i * stride, p16);
        total += x * x;
    }
    return total;
}

INLINE int overflows(double sum) { return sum > DBL_MAX; } /* false for NaN, which stays one */

/* The sum of squares of a run: in float32 by lanes, for speed, but with so few additions in a row that rounding errors
 * do not accumulate; then in double. With `sums`, also sums[j] += g[j]^2. */
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

/* sums[j] += sum over i of g[i][j]^2, for at most SUM_HEIGHT rows. Eight rows at a time: the prefetcher follows eight
 * streams, and each load and store of `sums` serves eight squares. */
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

/* The root of a factored second moment is `along.factor * across[i]`, and at least a share of the smaller one of
 * `along.bound` and `bounds[i]`: floored_root in blocks.py, with what belongs to a line in memory and to its elements. */
INLINE void update_factored_of(void *restrict p, const void *restrict g, void *restrict m, int64_t n, const Work *w,
                               Along along, const float *restrict across, const float *restrict bounds, int p16,
                              int m16) {
    float decay = w->decay, sign = w->sign, from_m = w->from_m, weight = w->weight;
    float root = w->root, eps = w->eps, step_size = w->step_size, floor_of_roots = w->floor_of_roots;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float x = moved(load(m, i, m16), sign * load(g, i, p16), from_m, weight);
        float product = along.factor * across[i], least = floor_of_roots * MIN(along.bound, bounds[i]);
        store(m, i, x, m16);
        store(p, i, load(p, i, p16) * decay - step_size * x / ((product < least ? least : product) / root + eps), p16);
    }
}

/* Random bits: a hash of the parameter's seed, the step and the element's index, modulo 2^32 throughout. The formula is
 * in stochastic_rounding.py, whose bits these must equal. */

INLINE uint32_t mix(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

INLINE uint32_t hash_of_step(int64_t seed, float step) { return mix(mix((uint32_t)seed + 0x9e3779b9u) ^ (uint32_t)step); }

/* To bfloat16, away from zero if the dropped bits plus the lower half of the noise carry. */
INLINE uint16_t rounded(float value, uint32_t noise) {
    return value != value ? (uint16_t)0x7fc0 : (uint16_t)((bits_of(value) + (noise & 0xffffu)) >> 16);
}

/* A few elements as float32: pointers into the tensor if a loop may work in place, else to the buffers. */
typedef struct {
    void *p;
    const void *g;
    void *m;
    int64_t n, at; /* how many, and the position of the first within the whole loop */
    int64_t offset;
    float param[GROUP_LENGTH], grad[GROUP_LENGTH], exp_avg[GROUP_LENGTH];
} Stage;

INLINE int is_staged(const Tensor *t) { return t->exp_avg_dtype == CODES || t->rounds; }

static float *scale_at(const Tensor *t, int64_t offset) {
    int64_t groups = (t->slice + GROUP_LENGTH - 1) / GROUP_LENGTH;
    return t->scales + offset / t->slice * groups + offset % t->slice / GROUP_LENGTH;
}

/* How many of the `left` elements from `offset` on fit: at most one group. The caller starts at a group's bound. */
INLINE int64_t stage_length(const Tensor *t, int64_t offset, int64_t left) {
    int64_t n = MIN(left, GROUP_LENGTH);
    if (t->exp_avg_dtype == CODES) n = MIN(n, t->slice - offset % t->slice);
    return n;
}

static void fill_stage(Stage *s, const Tensor *t) {
    s->p = at(t->param, s->offset, t->param_bf16);
    s->g = at(t->grad, s->offset, t->param_bf16);
    s->m = at(t->exp_avg, s->offset, 0);
    if (t->param_bf16) {
        for (int64_t i = 0; i < s->n; i++) s->param[i] = load(s->p, i, 1);
        for (int64_t i = 0; i < s->n; i++) s->grad[i] = load(s->g, i, 1);
        s->p = s->param;
        s->g = s->grad;
    }
    if (t->exp_avg_dtype == FLOAT32) return;
    if (t->exp_avg_dtype == BFLOAT16) {
        const void *m = at(t->exp_avg, s->offset, 1);
        for (int64_t i = 0; i < s->n; i++) s->exp_avg[i] = load(m, i, 1);
    } else {
        const uint8_t *codes = (const uint8_t *)t->exp_avg + s->offset;
        const float *values = t->codebook->values;
        float scale = *scale_at(t, s->offset);
        for (int64_t i = 0; i < s->n; i++) s->exp_avg[i] = values[codes[i]] * scale;
    }
    s->m = s->exp_avg;
}

/* An element that is not finite makes the scale not finite, so that the whole group decodes to NaN. */
static void store_codes(const Tensor *t, const Stage *s) {
    uint8_t *codes = (uint8_t *)t->exp_avg + s->offset;
    const Codebook *book = t->codebook;
    uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < s->n; i++) {
        uint32_t magnitude = bits_of(s->exp_avg[i]) & 0x7fffffffu; /* ordered like the magnitudes, with NaN last */
        largest = MAX(largest, magnitude);
    }
    float scale = of_bits(largest), divisor = largest ? scale : 1;
    *scale_at(t, s->offset) = scale;
    int32_t found[GROUP_LENGTH];
#pragma omp simd
    for (int64_t i = 0; i < s->n; i++) {
        float x = s->exp_avg[i] / divisor;
        int32_t code = book->first[bits_of(x) >> 16];
        found[i] = code + (x > book->middles[code]);
    }
    for (int64_t i = 0; i < s->n; i++) codes[i] = (uint8_t)found[i];
}

static void empty_stage(const Stage *s, const Work *w) {
    const Tensor *t = w->t;
    if (t->exp_avg_dtype == CODES) store_codes(t, s);
    if (!t->param_bf16 && t->exp_avg_dtype != BFLOAT16) return;
    uint16_t *param = at(t->param, s->offset, 1), *exp_avg = at(t->exp_avg, s->offset, 1);
    if (!t->rounds) {
        for (int64_t i = 0; i < s->n; i++) store(param, i, s->param[i], 1);
        return;
    }
    int64_t index = t->first + s->offset;
    uint32_t lower = (uint32_t)index, upper = (uint32_t)(index >> 32), hash = w->hash;
    uint32_t key = mix(hash + upper), next_key = mix(hash + upper + 1); /* after the lower half wraps around */
    uint32_t noise[GROUP_LENGTH];
#pragma omp simd
    for (uint32_t i = 0; i < (uint32_t)s->n; i++) {
        uint32_t x = lower + i;
        noise[i] = mix(mix(x ^ (x < lower ? next_key : key)) + hash);
    }
    if (t->param_bf16)
        for (int64_t i = 0; i < s->n; i++) param[i] = rounded(s->param[i], noise[i]);
    if (t->exp_avg_dtype == BFLOAT16)
        for (int64_t i = 0; i < s->n; i++) exp_avg[i] = rounded(s->exp_avg[i], noise[i] >> 16);
}

/* Run a loop for the tensor's dtypes on all elements at once, or through a stage on a few at a time. The arguments
 * may use `STAGE.at`, the position of the first element. */
#define UPDATE(w, start, length, loop, ...)                                                             \
    do {                                                                                                \
        const Tensor *t = (w)->t;                                                                       \
        Stage STAGE;                                                                                    \
        STAGE.at = 0;                                                                                   \
        if (is_staged(t)) {                                                                             \
            for (; STAGE.at < (length); STAGE.at += STAGE.n) {                                          \
                STAGE.offset = (start) + STAGE.at;                                                      \
                STAGE.n = stage_length(t, STAGE.offset, (length) - STAGE.at);                           \
                fill_stage(&STAGE, t);                                                                  \
                loop(STAGE.p, STAGE.g, STAGE.m, STAGE.n, w, __VA_ARGS__, 0, 0);                         \
                empty_stage(&STAGE, w);                                                                 \
            }                                                                                           \
            break;                                                                                      \
        }                                                                                               \
        int64_t m16 = t->exp_avg_dtype == BFLOAT16;                                                     \
        void *p = at(t->param, start, t->param_bf16), *m = at(t->exp_avg, start, m16);                  \
        const void *g = at(t->grad, start, t->param_bf16);                                              \
        if (!t->param_bf16 && !m16) loop(p, g, m, length, w, __VA_ARGS__, 0, 0);                        \
        else if (!t->param_bf16) loop(p, g, m, length, w, __VA_ARGS__, 0, 1);                           \
        else if (!m16) loop(p, g, m, length, w, __VA_ARGS__, 1, 0);                                     \
        else loop(p, g, m, length, w, __VA_ARGS__, 1, 1);                                               \
    } while (0)

static void update_run(const Work *w, int64_t offset, int64_t n, float factor) {
    UPDATE(w, offset, n, update_run_of, factor);
}

static void update_columns(const Work *w, int64_t offset, int64_t n, const float *factors) {
    UPDATE(w, offset, n, update_columns_of, factors + STAGE.at);
}

static void update_elements(const Work *w, int64_t offset, int64_t n) {
    UPDATE(w, offset, n, update_elements_of, w->t->moment + offset + STAGE.at);
}

static void update_factored(const Work *w, int64_t offset, int64_t n, Along along, const float *across,
                            const float *bounds) {
    UPDATE(w, offset, n, update_factored_of, along, across + STAGE.at, bounds + STAGE.at);
}

/* Sums of squares, which read the gradient only. */

static double sum_run(const Tensor *t, int64_t offset, int64_t n) {
    const void *g = at(t->grad, offset, t->param_bf16);
    return t->param_bf16 ? sum_lanes(g, n, NULL, 1) : sum_lanes(g, n, NULL, 0);
}

static double sum_line(const Tensor *t, int64_t offset, int64_t n, float *sums) {
    const void *g = at(t->grad, offset, t->param_bf16);
    return t->param_bf16 ? sum_lanes(g, n, sums, 1) : sum_lanes(g, n, sums, 0);
}

/* `sum`, a sum of `n` squares in float32; taken again in double if it has overflowed. */
static double checked_sum(const Tensor *t, int64_t offset, int64_t n, int64_t stride, double sum) {
    return overflows(sum) ? wide_sum(at(t->grad, offset, t->param_bf16), n, stride, (int)t->param_bf16) : sum;
}

static void sum_rows(const Tensor *t, int64_t offset, int64_t stride, int64_t height, int64_t width, float *sums) {
    const void *g = at(t->grad, offset, t->param_bf16);
    if (t->param_bf16) sum_rows_of(g, stride, height, width, sums, 1);
    else sum_rows_of(g, stride, height, width, sums, 0);
}

#endif
