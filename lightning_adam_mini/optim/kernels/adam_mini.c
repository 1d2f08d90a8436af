/* One step of Adam-mini on many tensors, on the CPU.
 *
 * A dense tensor lies in memory as a contiguous array (A, C1, R, C2): A x R rows, numbered in this order, belong to
 * blocks; C1 and C2 are reduced. Three ways lead through it:
 *
 *   runs     C1 = 1, so a block is one contiguous run. Its squares are summed, then it is updated while it is in the
 *            cache: five streams of memory (read p, g, m; write p, m).
 *   columns  C1 > 1, as in a matrix stored as (in, out): a pass over g sums the squares down the columns, a second one
 *            updates. Both read whole lines, in the order of the memory: strips of columns, however small for a cache,
 *            break the streams that the memory is quick at. What g is small enough for the last cache is read from
 *            there the second time.
 *   chunks   blocks that are large, or lie in several places: the same two passes over runs, with a sum a chunk.
 *
 * Every sum is taken over the same chunks in the same order whatever the number of threads, so results do not depend on
 * it. Squares are added in float32 over a few thousand elements, and these sums in double.
 *
 * Threads draw tasks from one list. An update that needs the sums of other tasks waits for them; those stand before it
 * in the list, so another thread already works on them.
 */
#include <float.h>
#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

enum {
    SUM_LENGTH = 4096,     /* elements whose squares are added in float32 */
    SUM_HEIGHT = 256,      /* the same down a column */
    TASK_LENGTH = 1 << 16, /* elements of a task */
    LARGE_BLOCK = 1 << 18, /* elements of a block that several threads share */
    SHORT_RUN = 48,        /* shorter runs go through vectors that hold several of them */
    LONG_RUN = 1024,       /* runs that two passes take one by one */
    PACK_LENGTH = 2048,    /* elements of short runs that are taken at once */
    COLUMN_SUMS = 16,      /* partial sums of a column */
};

/* Rows of consecutive blocks of one size. Rank one: the rows of a segment in one repeat, and its number. */
typedef struct {
    int64_t row, rows_of_block, count, block;
} Span;

/* What the caller says of a tensor: 17 words of eight bytes. */
typedef struct {
    void *param;
    const void *grad;
    void *exp_avg;
    float *moment;        /* a value a block, or an element, as the mode says */
    float *column_moment; /* RANK_ONE; else the same */
    float *step;
    int64_t mode, param_bf16, exp_avg_bf16;
    int64_t batches, outer, rows, inner; /* A, C1, R, C2 */
    const Span *spans; /* in the order of rows, which they cover */
    int64_t num_spans, num_blocks;
    int64_t in_pieces; /* whether a block has rows in more than one place */
} Tensor;

enum {
    MEAN,                /* a second moment a block */
    ELEMENT,             /* a second moment an element */
    RANK_ONE,            /* a row mean times a column mean over the mean of the rows */
    DENOMINATOR,         /* `moment` has a denominator a block, which is only read */
    SUM,                 /* write sums of squares a block to `moment`, and change nothing else */
};

/* A tensor during a step; or a batch of one, where its columns are summed. */
typedef struct {
    const Tensor *t;
    const Span *spans;
    int64_t num_spans;
    float decay, from_m, weight, sign, step_size, root, eps, beta2, rest2;
    int64_t first_task, num_sums, sums_left, is_ready;
    double *totals; /* sums of chunks, blocks and columns, as the way through the tensor needs them */
    float *columns; /* a sum a chunk and column */
    float *factors; /* what multiplies m, a block or a column; RANK_ONE: roots of the rows, then of the columns */
} Work;

enum { BLOCKS, PACK, ELEMENTS, CHUNK_SUM, CHUNK_UPDATE, LINES_SUM, LINES_UPDATE, RANK_ONE_SUM, RANK_ONE_UPDATE };

typedef struct {
    int32_t work, kind;
    int64_t offset, length, count, block;
} Task;

typedef struct {
    Work *works;
    Task *tasks;
    int64_t num_works, works_capacity, num_tasks, tasks_capacity, scratch, next_task;
    int out_of_memory;
} Plan;

/* Elements, in float32 or bfloat16. */

INLINE float load(const void *data, int64_t i, int bf16) {
    if (!bf16) return ((const float *)data)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)data)[i] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE void store(void *data, int64_t i, float value, int bf16) {
    if (!bf16) {
        ((float *)data)[i] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, 4);
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

/* Loops over elements. */

INLINE double sum_run_of(const void *restrict g, int64_t n, int p16) {
    double total = 0;
    for (int64_t start = 0; start < n; start += SUM_LENGTH) {
        int64_t end = MIN(start + SUM_LENGTH, n);
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = start; i < end; i++) {
            float x = load(g, i, p16);
            sum += x * x;
        }
        total += sum;
    }
    return total;
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

INLINE void update_elements_of(void *restrict p, const void *restrict g, void *restrict m, float *restrict v, int64_t n,
                               const Work *w, int p16, int m16) {
    float decay = w->decay, sign = w->sign, from_m = w->from_m, weight = w->weight, beta2 = w->beta2, rest2 = w->rest2, root = w->root, eps = w->eps;
    float step_size = w->step_size;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float y = load(g, i, p16), x = moved(load(m, i, m16), sign * y, from_m, weight);
        float moment = fused(rest2 * y, y, v[i] * beta2);
        v[i] = moment;
        store(m, i, x, m16);
        store(p, i, load(p, i, p16) * decay - step_size * x / (sqrtf(moment) / root + eps), p16);
    }
}

INLINE void update_rank_one_of(void *restrict p, const void *restrict g, void *restrict m, int64_t n, const Work *w,
                               float along, const float *restrict across, int p16, int m16) {
    float decay = w->decay, sign = w->sign, from_m = w->from_m, weight = w->weight, root = w->root, eps = w->eps, step_size = w->step_size;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float x = moved(load(m, i, m16), sign * load(g, i, p16), from_m, weight);
        store(m, i, x, m16);
        store(p, i, load(p, i, p16) * decay - step_size * x / (along * across[i] / root + eps), p16);
    }
}

/* One loop for each pair of dtypes. */
#define BY_DTYPES(t, loop, ...)                                                 \
    do {                                                                        \
        if (!(t)->param_bf16 && !(t)->exp_avg_bf16) loop(__VA_ARGS__, 0, 0);    \
        else if (!(t)->param_bf16) loop(__VA_ARGS__, 0, 1);                     \
        else if (!(t)->exp_avg_bf16) loop(__VA_ARGS__, 1, 0);                   \
        else loop(__VA_ARGS__, 1, 1);                                           \
    } while (0)

static double sum_run(const Work *w, int64_t offset, int64_t n) {
    const Tensor *t = w->t;
    const void *g = at(t->grad, offset, t->param_bf16);
    return t->param_bf16 ? sum_run_of(g, n, 1) : sum_run_of(g, n, 0);
}

static void sum_rows(const Tensor *t, int64_t offset, int64_t stride, int64_t height, int64_t width, float *sums) {
    const void *g = at(t->grad, offset, t->param_bf16);
    if (t->param_bf16) sum_rows_of(g, stride, height, width, sums, 1);
    else sum_rows_of(g, stride, height, width, sums, 0);
}

#define POINTERS(t, offset)                                                                      \
    void *p = at((t)->param, offset, (t)->param_bf16), *m = at((t)->exp_avg, offset, (t)->exp_avg_bf16); \
    const void *g = at((t)->grad, offset, (t)->param_bf16)

static void update_run(const Work *w, int64_t offset, int64_t n, float factor) {
    POINTERS(w->t, offset);
    BY_DTYPES(w->t, update_run_of, p, g, m, n, w, factor);
}

static void update_columns(const Work *w, int64_t offset, int64_t n, const float *factors) {
    POINTERS(w->t, offset);
    BY_DTYPES(w->t, update_columns_of, p, g, m, n, w, factors);
}

static void update_elements(const Work *w, int64_t offset, int64_t n) {
    POINTERS(w->t, offset);
    float *v = w->t->moment + offset;
    BY_DTYPES(w->t, update_elements_of, p, g, m, v, n, w);
}

static void update_rank_one(const Work *w, int64_t offset, int64_t n, float along, const float *across) {
    POINTERS(w->t, offset);
    BY_DTYPES(w->t, update_rank_one_of, p, g, m, n, w, along, across);
}

/* Second moments. */

static float next_moment(const Work *w, float moment, double sum, double count) {
    return moment * w->beta2 + w->rest2 * (float)(sum / count);
}

/* What multiplies m in a block, once its sum is known. */
static float factor_of(const Work *w, int64_t block, double sum, double count) {
    float *v = w->t->moment + block;
    if (w->t->mode == SUM) {
        *v = (float)sum;
        return 0;
    }
    if (w->t->mode == DENOMINATOR) return w->step_size / *v;
    *v = next_moment(w, *v, sum, count);
    return w->step_size / (sqrtf(*v) / w->root + w->eps);
}

static int has_denominators(const Work *w) { return w->t->mode == DENOMINATOR; }
static int updates(const Work *w) { return w->t->mode != SUM; }

/* Tasks. */

static void do_blocks(const Work *w, const Task *task) {
    for (int64_t b = 0; b < task->count; b++) {
        int64_t offset = task->offset + b * task->length;
        double sum = has_denominators(w) ? 0 : sum_run(w, offset, task->length);
        float factor = factor_of(w, task->block + b, sum, (double)task->length);
        if (updates(w)) update_run(w, offset, task->length, factor);
    }
}

/* `count` short blocks of `length` elements each, which follow each other. */
static void do_pack(const Work *w, const Task *task) {
    int64_t n = task->length * task->count;
    float squares[PACK_LENGTH], factors[PACK_LENGTH];
    memset(squares, 0, n * sizeof(float));
    if (!has_denominators(w)) sum_rows(w->t, task->offset, n, 1, n, squares);
    for (int64_t b = 0; b < task->count; b++) {
        double sum = 0;
        for (int64_t j = b * task->length; j < (b + 1) * task->length; j++) sum += squares[j];
        float factor = factor_of(w, task->block + b, sum, (double)task->length);
        for (int64_t j = b * task->length; j < (b + 1) * task->length; j++) factors[j] = factor;
    }
    if (updates(w)) update_columns(w, task->offset, n, factors);
}

/* Rows of a batch: C1 = 1 leaves no batches, since their rows follow each other. */
static int64_t columns_of(const Tensor *t) { return t->rows * t->inner; }

static int64_t size_of(const Tensor *t) { return t->batches * t->outer * columns_of(t); }

static int64_t offset_of_row(const Tensor *t, int64_t row) {
    return row / t->rows * t->outer * columns_of(t) + row % t->rows * t->inner;
}

/* The totals of blocks to factors; `rows` is room for the numbers of rows of the blocks. */
static void factors_of_blocks(Work *w, const double *totals, double *rows, float *factors) {
    const Tensor *t = w->t;
    const Span *first = w->spans, *last = first + w->num_spans;
    for (int64_t b = 0; b < t->num_blocks; b++) rows[b] = 0;
    for (const Span *span = first; span < last; span++)
        for (int64_t j = 0; j < span->count; j++) rows[span->block + j] += (double)span->rows_of_block;
    for (int64_t b = 0; b < t->num_blocks; b++) /* a rectangle of a tensor need not meet every block */
        if (rows[b] > 0) factors[b] = factor_of(w, b, totals[b], rows[b] * (double)(t->outer * t->inner));
}

static void combine_chunks(Work *w, const Task *tasks) {
    double *totals = w->totals + w->num_sums, *rows = totals + w->t->num_blocks;
    for (int64_t b = 0; b < w->t->num_blocks; b++) totals[b] = 0;
    for (int64_t i = 0; i < w->num_sums; i++) totals[tasks[i].block] += w->totals[i];
    factors_of_blocks(w, totals, rows, w->factors);
}

/* The columns of one batch. */
static void combine_lines(Work *w) {
    const Tensor *t = w->t;
    int64_t width = columns_of(t);
    double *column_totals = w->totals, *totals = column_totals + width, *rows = totals + t->num_blocks;
    float *factors = w->factors + width;
    for (int64_t c = 0; c < width; c++) column_totals[c] = 0;
    for (int64_t i = 0; i < w->num_sums; i++)
        for (int64_t c = 0; c < width; c++) column_totals[c] += w->columns[i * width + c];
    for (int64_t b = 0; b < t->num_blocks; b++) totals[b] = 0;
    for (int has_factors = 0; has_factors < 2; has_factors++) {
        for (const Span *span = w->spans; span < w->spans + w->num_spans; span++) {
            int64_t c = (span->row - w->spans->row) * t->inner;
            for (int64_t j = 0; j < span->count; j++) {
                for (int64_t end = c + span->rows_of_block * t->inner; c < end; c++) {
                    if (has_factors) w->factors[c] = factors[span->block + j];
                    else totals[span->block + j] += column_totals[c];
                }
            }
        }
        if (!has_factors) factors_of_blocks(w, totals, rows, factors);
    }
}

/* RANK_ONE. A batch is a matrix in memory; its lines are the rows if C1 = 1, and the columns otherwise. */
static int lines_are_rows(const Tensor *t) { return t->outer == 1; }

static int64_t num_lines(const Tensor *t) { return lines_are_rows(t) ? t->rows : t->outer; }

static int64_t line_length(const Tensor *t) { return lines_are_rows(t) ? t->inner : t->rows; }

/* `count` lines from `offset` on in batch `block`; they are of segment `length` if they are rows. */
static void do_rank_one_sum(Work *w, const Task *task, int64_t number) {
    const Tensor *t = w->t;
    int64_t n = line_length(t);
    float *down = w->columns + number * n;
    memset(down, 0, n * sizeof(float));
    for (int64_t i = 0; i < task->count; i++) {
        int64_t line = task->block * num_lines(t) + task->offset + i, offset = line * n;
        sum_rows(t, offset, n, 1, n, down);
        if (lines_are_rows(t)) {
            w->totals[line] = sum_run(w, offset, n);
            continue;
        }
        for (int64_t s = 0; s < t->num_blocks; s++) w->totals[line * t->num_blocks + s] = 0;
        for (const Span *span = t->spans; span < t->spans + t->num_spans; span++)
            w->totals[line * t->num_blocks + span->block] += sum_run(w, offset + span->row, span->rows_of_block);
    }
}

static void combine_rank_one(Work *w, const Task *tasks) {
    const Tensor *t = w->t;
    int64_t n = line_length(t), segments = t->num_blocks, others = t->outer * t->inner;
    int by_rows = lines_are_rows(t);
    double *rows_of_segment = w->totals + t->batches * num_lines(t) * (by_rows ? 1 : segments);
    double *means = rows_of_segment + segments, *down = means + segments;
    float *roots = w->factors, *column_roots = w->factors + t->batches * t->rows;
    for (int64_t s = 0; s < segments; s++) rows_of_segment[s] = 0;
    for (const Span *span = t->spans; span < t->spans + t->num_spans; span++)
        rows_of_segment[span->block] += (double)span->rows_of_block;
    for (int64_t a = 0; a < t->batches; a++) {
        float *row_moment = t->moment + a * t->rows, *column_moment = t->column_moment + a * segments * others;
        int64_t num_down = by_rows ? segments * n : n;
        for (int64_t c = 0; c < num_down; c++) down[c] = 0;
        for (int64_t i = 0; i < w->num_sums; i++) {
            if (tasks[i].block != a) continue;
            double *target = down + (by_rows ? tasks[i].length * n : 0);
            for (int64_t c = 0; c < n; c++) target[c] += w->columns[i * n + c];
        }
        const double *along = w->totals + a * num_lines(t) * (by_rows ? 1 : segments);
        const double *row_sums = by_rows ? along : down;
        const double *column_sums = by_rows ? down : along; /* (segments, C2), or (C1, segments) */
        for (int64_t s = 0; s < segments; s++) means[s] = 0;
        for (const Span *span = t->spans; span < t->spans + t->num_spans; span++) {
            for (int64_t r = span->row; r < span->row + span->rows_of_block; r++) {
                row_moment[r] = next_moment(w, row_moment[r], row_sums[r], (double)others);
                means[span->block] += row_moment[r];
            }
        }
        for (const Span *span = t->spans; span < t->spans + t->num_spans; span++) {
            float mean = (float)(means[span->block] / rows_of_segment[span->block]);
            if (mean < FLT_MIN) mean = FLT_MIN;
            for (int64_t r = span->row; r < span->row + span->rows_of_block; r++)
                roots[a * t->rows + r] = sqrtf(row_moment[r] / mean);
        }
        for (int64_t c = 0; c < segments * others; c++) {
            int64_t segment = by_rows ? c / others : c % segments;
            column_moment[c] = next_moment(w, column_moment[c], column_sums[c], rows_of_segment[segment]);
            column_roots[a * segments * others + c] = sqrtf(column_moment[c]);
        }
    }
}

static void do_rank_one_update(const Work *w, const Task *task) {
    const Tensor *t = w->t;
    int64_t n = line_length(t), segments = t->num_blocks;
    const float *roots = w->factors + task->block * t->rows;
    const float *column_roots = w->factors + t->batches * t->rows + task->block * segments * t->outer * t->inner;
    for (int64_t line = task->offset; line < task->offset + task->count; line++) {
        int64_t offset = (task->block * num_lines(t) + line) * n;
        if (lines_are_rows(t)) {
            update_rank_one(w, offset, n, roots[line], column_roots + task->length * n);
            continue;
        }
        for (const Span *span = t->spans; span < t->spans + t->num_spans; span++)
            update_rank_one(w, offset + span->row, span->rows_of_block, column_roots[line * segments + span->block],
                            roots + span->row);
    }
}

/* The list of tasks. */

static int grow(void **items, int64_t count, int64_t *capacity, size_t size) {
    if (count < *capacity) return 1;
    int64_t larger = MAX(32, 2 * *capacity);
    void *memory = realloc(*items, larger * size);
    if (!memory) return 0;
    *items = memory;
    *capacity = larger;
    return 1;
}

static void add_task(Plan *plan, int kind, int64_t offset, int64_t length, int64_t count, int64_t block) {
    if (!grow((void **)&plan->tasks, plan->num_tasks, &plan->tasks_capacity, sizeof(Task))) plan->out_of_memory = 1;
    else plan->tasks[plan->num_tasks++] = (Task){(int32_t)(plan->num_works - 1), kind, offset, length, count, block};
}

/* The last work; the pointer holds until another is added. */
static Work *add_work(Plan *plan, const Tensor *t) {
    static Work spare; /* without memory nothing is done with it */
    if (!grow((void **)&plan->works, plan->num_works, &plan->works_capacity, sizeof(Work))) {
        plan->out_of_memory = 1;
        return &spare;
    }
    Work *w = plan->works + plan->num_works++;
    *w = (Work){.t = t, .spans = t->spans, .num_spans = t->num_spans, .first_task = plan->num_tasks};
    return w;
}

/* Scratch memory is one piece, whose address is added once its size is known. */
static void *reserve(Plan *plan, int64_t count, size_t size) {
    void *offset = (void *)plan->scratch;
    plan->scratch += (count * size + 63) / 64 * 64;
    return offset;
}

/* After the sums of a work: the updates that wait for them. */
static void add_updates(Plan *plan, Work *w, int kind) {
    int64_t first = w->first_task, count = plan->num_tasks - first;
    if (updates(w)) {
        for (int64_t i = first; i < first + count && !plan->out_of_memory; i++) {
            Task task = plan->tasks[i];
            add_task(plan, kind, task.offset, task.length, task.count, task.block);
        }
    }
    w->num_sums = w->sums_left = count;
}

static void plan_runs(Plan *plan, const Tensor *t) {
    add_work(plan, t);
    for (const Span *span = t->spans; span < t->spans + t->num_spans; span++) {
        int64_t length = span->rows_of_block * t->inner, is_short = length < SHORT_RUN;
        int64_t most = is_short ? PACK_LENGTH / length : MAX(1, TASK_LENGTH / length);
        for (int64_t j = 0; j < span->count; j += most)
            add_task(plan, is_short ? PACK : BLOCKS, offset_of_row(t, span->row) + j * length, length,
                     MIN(most, span->count - j), span->block + j);
    }
}

static void plan_chunks(Plan *plan, const Tensor *t) {
    Work *w = add_work(plan, t);
    for (const Span *span = t->spans; span < t->spans + t->num_spans; span++)
        for (int64_t j = 0; j < span->count; j++)
            for (int64_t outer = 0; outer < t->outer; outer++) {
                int64_t offset = offset_of_row(t, span->row + j * span->rows_of_block) + outer * columns_of(t);
                int64_t end = offset + span->rows_of_block * t->inner;
                for (; offset < end; offset += TASK_LENGTH)
                    add_task(plan, CHUNK_SUM, offset, MIN(TASK_LENGTH, end - offset), 1, span->block + j);
            }
    add_updates(plan, w, CHUNK_UPDATE);
    w->totals = reserve(plan, w->num_sums + 2 * t->num_blocks, sizeof(double));
    w->factors = reserve(plan, t->num_blocks, sizeof(float));
}

static void plan_lines(Plan *plan, const Tensor *t) {
    int64_t width = columns_of(t), batch = t->outer * width;
    int64_t height = (MAX(TASK_LENGTH / width, (t->outer + COLUMN_SUMS - 1) / COLUMN_SUMS) + 7) / 8 * 8;
    const Span *span = t->spans;
    for (int64_t a = 0; a < t->batches; a++) {
        Work *w = add_work(plan, t);
        w->spans = span;
        while (span < t->spans + t->num_spans && span->row < (a + 1) * t->rows) span++;
        w->num_spans = span - w->spans;
        for (int64_t i = 0; i < t->outer; i += height)
            add_task(plan, LINES_SUM, a * batch + i * width, width, MIN(height, t->outer - i), 0);
        add_updates(plan, w, LINES_UPDATE);
        w->totals = reserve(plan, width + 2 * t->num_blocks, sizeof(double));
        w->columns = reserve(plan, w->num_sums * width, sizeof(float));
        w->factors = reserve(plan, width + t->num_blocks, sizeof(float));
    }
}

static void plan_rank_one(Plan *plan, const Tensor *t) {
    Work *w = add_work(plan, t);
    int64_t n = line_length(t), lines = num_lines(t), segments = t->num_blocks, others = t->outer * t->inner;
    int64_t most = MIN(SUM_HEIGHT, MAX(1, TASK_LENGTH / n));
    for (int64_t a = 0; a < t->batches; a++) {
        if (!lines_are_rows(t)) {
            for (int64_t i = 0; i < lines; i += most) add_task(plan, RANK_ONE_SUM, i, 0, MIN(most, lines - i), a);
            continue;
        }
        for (const Span *span = t->spans; span < t->spans + t->num_spans; span++)
            for (int64_t i = 0; i < span->rows_of_block; i += most)
                add_task(plan, RANK_ONE_SUM, span->row + i, span->block, MIN(most, span->rows_of_block - i), a);
    }
    add_updates(plan, w, RANK_ONE_UPDATE);
    w->totals = reserve(plan, (t->batches * lines + n + 2) * segments, sizeof(double));
    w->columns = reserve(plan, w->num_sums * n, sizeof(float));
    w->factors = reserve(plan, t->batches * (t->rows + segments * others), sizeof(float));
}

static void plan_tensor(Plan *plan, const Tensor *t) {
    int64_t size = size_of(t), longest = 0, shortest = INT64_MAX;
    if (!size) {
        add_work(plan, t); /* which counts its step */
        return;
    }
    if (t->mode == ELEMENT) {
        add_work(plan, t);
        for (int64_t i = 0; i < size; i += TASK_LENGTH) add_task(plan, ELEMENTS, i, MIN(TASK_LENGTH, size - i), 1, 0);
        return;
    }
    for (const Span *span = t->spans; span < t->spans + t->num_spans; span++) {
        longest = MAX(longest, span->rows_of_block * t->inner);
        shortest = MIN(shortest, span->rows_of_block * t->inner);
    }
    if (t->mode == RANK_ONE) plan_rank_one(plan, t);
    else if (!t->in_pieces && t->outer == 1 && longest <= LARGE_BLOCK) plan_runs(plan, t);
    else if (t->outer == 1 || shortest >= LONG_RUN) plan_chunks(plan, t);
    else plan_lines(plan, t);
}

/* Threads. */

static void do_sum(Plan *plan, Work *w, const Task *task) {
    const Task *tasks = plan->tasks + w->first_task;
    int64_t number = task - tasks;
    if (has_denominators(w)) {
        if (task->kind == CHUNK_SUM) w->totals[number] = 0;
        else memset(w->columns + number * task->length, 0, task->length * sizeof(float));
    } else if (task->kind == CHUNK_SUM) {
        w->totals[number] = sum_run(w, task->offset, task->length);
    } else if (task->kind == LINES_SUM) {
        float *sums = w->columns + number * task->length;
        memset(sums, 0, task->length * sizeof(float));
        sum_rows(w->t, task->offset, task->length, task->count, task->length, sums);
    } else {
        do_rank_one_sum(w, task, number);
    }
    if (__atomic_sub_fetch(&w->sums_left, 1, __ATOMIC_ACQ_REL)) return; /* the last one adds them up */
    if (task->kind == CHUNK_SUM) combine_chunks(w, tasks);
    else if (task->kind == LINES_SUM) combine_lines(w);
    else combine_rank_one(w, tasks);
    __atomic_store_n(&w->is_ready, 1, __ATOMIC_RELEASE);
}

static void do_update(const Work *w, const Task *task) {
    for (int spins = 0; !__atomic_load_n(&w->is_ready, __ATOMIC_ACQUIRE); spins++)
        if (spins > 1000) sched_yield(); /* more threads than cores: let the one run that this one waits for */
    if (task->kind == CHUNK_UPDATE) {
        update_run(w, task->offset, task->length, w->factors[task->block]);
    } else if (task->kind == LINES_UPDATE) {
        for (int64_t i = 0; i < task->count; i++)
            update_columns(w, task->offset + i * task->length, task->length, w->factors);
    } else {
        do_rank_one_update(w, task);
    }
}

static void do_tasks(Plan *plan) {
    for (;;) {
        int64_t i = __atomic_fetch_add(&plan->next_task, 1, __ATOMIC_RELAXED);
        if (i >= plan->num_tasks) return;
        const Task *task = plan->tasks + i;
        Work *w = plan->works + task->work;
        switch (task->kind) {
            case BLOCKS: do_blocks(w, task); break;
            case PACK: do_pack(w, task); break;
            case ELEMENTS: update_elements(w, task->offset, task->length); break;
            case CHUNK_SUM: case LINES_SUM: case RANK_ONE_SUM: do_sum(plan, w, task); break;
            default: do_update(w, task);
        }
    }
}

/* One step on `count` tensors. Returns 0; or 1 where memory ran out, before anything was changed. */
int adam_mini_step(const Tensor *tensors, int64_t count, double lr, double beta1, double beta2, double eps,
                   double weight_decay, int maximize, int threads) {
    Plan plan = {0};
    int64_t size = 0;
    for (const Tensor *t = tensors; t < tensors + count; t++) {
        plan_tensor(&plan, t);
        size += size_of(t);
    }
    char *scratch = malloc(MAX(plan.scratch, 1));
    if (!scratch || plan.out_of_memory) goto end;

    double last_step = -1, correction1 = 0, correction2 = 0;
    for (int64_t i = 0; i < plan.num_works; i++) {
        Work *w = plan.works + i;
        w->totals = (double *)(scratch + (intptr_t)w->totals);
        w->columns = (float *)(scratch + (intptr_t)w->columns);
        w->factors = (float *)(scratch + (intptr_t)w->factors);
        if (w->t->mode == SUM) continue;
        /* Once a tensor; and not where the caller has divided denominators by a correction, and so has counted. */
        if (!has_denominators(w) && (i == 0 || plan.works[i - 1].t != w->t)) *w->t->step += 1;
        double step = *w->t->step;
        if (step != last_step) { /* most tensors have taken the same number of steps */
            correction1 = 1 - pow(beta1, step);
            correction2 = sqrt(1 - pow(beta2, step));
            last_step = step;
        }
        w->decay = (float)(1 - lr * weight_decay);
        w->from_m = beta1 > 0.5;
        w->weight = (float)(beta1 > 0.5 ? 1 - beta1 : -beta1);
        w->sign = maximize ? -1 : 1;
        w->step_size = (float)(lr / correction1);
        w->root = (float)correction2;
        w->eps = (float)eps;
        w->beta2 = (float)beta2;
        w->rest2 = (float)(1 - beta2);
    }
    /* No parallel region for one thread: after a fork, starting one may wait for threads that are gone. */
#ifdef _OPENMP
    threads = (int)MIN(threads, 1 + size / TASK_LENGTH);
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        do_tasks(&plan);
        goto end;
    }
#endif
    do_tasks(&plan);
end:
    free(plan.works);
    free(plan.tasks);
    free(scratch);
    return !scratch || plan.out_of_memory;
}
