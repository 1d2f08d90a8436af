/* From sums of squares to second moments and updates: of blocks with one second moment each, and of factored ones. */
#ifndef ADAM_MINI_BLOCKS_H
#define ADAM_MINI_BLOCKS_H

#include "elements.h"

static float next_moment(const Work *w, float moment, double sum, double count) {
    return moment * w->beta2 + w->rest2 * (float)(sum / count);
}

/* The factor of m in a block, given the block's sum of squares. */
static float factor_of(const Work *w, int64_t block, double sum, double count) {
    float *v = w->t->moment + block;
    if (w->t->mode == SUM) { /* where `moment` points to doubles */
        ((double *)w->t->moment)[block] = sum;
        return 0;
    }
    if (w->t->mode == DENOMINATOR) return w->step_size / *v;
    *v = next_moment(w, *v, sum, count);
    return w->step_size / (sqrtf(*v) / w->root + w->eps);
}

static int has_denominators(const Work *w) { return w->t->mode == DENOMINATOR; }
static int updates(const Work *w) { return w->t->mode != SUM; }

static void do_blocks(const Work *w, const Task *task) {
    for (int64_t b = 0; b < task->count; b++) {
        int64_t offset = task->offset + b * task->length;
        double sum = has_denominators(w) ? 0 : sum_run(w->t, offset, task->length);
        float factor = factor_of(w, task->block + b, sum, (double)task->length);
        if (updates(w)) update_run(w, offset, task->length, factor);
    }
}

/* `count` consecutive short blocks of `length` elements each. */
static void do_pack(const Work *w, const Task *task) {
    int64_t n = task->length * task->count;
    float squares[PACK_LENGTH], factors[PACK_LENGTH];
    memset(squares, 0, n * sizeof(float));
    if (!has_denominators(w)) sum_rows(w->t, task->offset, n, 1, n, squares);
    for (int64_t b = 0; b < task->count; b++) {
        double sum = 0;
        for (int64_t j = b * task->length; j < (b + 1) * task->length; j++) sum += squares[j];
        sum = checked_sum(w->t, task->offset + b * task->length, task->length, 1, sum);
        float factor = factor_of(w, task->block + b, sum, (double)task->length);
        for (int64_t j = b * task->length; j < (b + 1) * task->length; j++) factors[j] = factor;
    }
    if (updates(w)) update_columns(w, task->offset, n, factors);
}

/* Columns of a batch, as the matrix (C1, R * C2). */
static int64_t columns_of(const Tensor *t) { return t->rows * t->inner; }

static int64_t size_of(const Tensor *t) { return t->batches * t->outer * columns_of(t); }

static int64_t offset_of_row(const Tensor *t, int64_t row) {
    return row / t->rows * t->outer * columns_of(t) + row % t->rows * t->inner;
}

/* The factor of each block from its total; `rows` is scratch memory for the number of rows of each block. */
static void factors_of_blocks(Work *w, const double *totals, double *rows, float *factors) {
    const Tensor *t = w->t;
    const Span *first = w->spans, *last = first + w->num_spans;
    for (int64_t b = 0; b < t->num_blocks; b++) rows[b] = 0;
    for (const Span *span = first; span < last; span++)
        for (int64_t j = 0; j < span->count; j++) rows[span->block + j] += (double)span->rows_of_block;
    for (int64_t b = 0; b < t->num_blocks; b++) /* a part of a sharded tensor need not contain every block */
        if (rows[b] > 0) factors[b] = factor_of(w, b, totals[b], rows[b] * (double)(t->outer * t->inner));
}

static void combine_chunks(Work *w, const Task *tasks) {
    double *totals = w->totals + w->num_sums, *rows = totals + w->t->num_blocks;
    for (int64_t b = 0; b < w->t->num_blocks; b++) totals[b] = 0;
    for (int64_t i = 0; i < w->num_sums; i++) totals[tasks[i].block] += w->totals[i];
    factors_of_blocks(w, totals, rows, w->factors);
}

/* Column sums of one batch: first to totals of blocks, then the blocks' factors back to columns. */
static void combine_lines(Work *w, const Task *tasks) {
    const Tensor *t = w->t;
    int64_t width = columns_of(t);
    double *column_totals = w->totals, *totals = column_totals + width, *rows = totals + t->num_blocks;
    float *factors = w->factors + width;
    for (int64_t c = 0; c < width; c++) column_totals[c] = 0;
    for (int64_t i = 0; i < w->num_sums; i++)
        for (int64_t c = 0; c < width; c++) column_totals[c] += w->columns[i * width + c];
    for (int64_t c = 0; c < width; c++)
        column_totals[c] = checked_sum(t, tasks->offset + c, t->outer, width, column_totals[c]);
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

/* Factored second moments. A batch is a matrix in memory, whose contiguous lines are the rows if C1 = 1, and the
 * columns otherwise. */
static int lines_are_rows(const Tensor *t) { return t->outer == 1; }

static int64_t num_lines(const Tensor *t) { return lines_are_rows(t) ? t->rows : t->outer; }

static int64_t line_length(const Tensor *t) { return lines_are_rows(t) ? t->inner : t->rows; }

/* Add the sums of a few lines to the sums of all: two levels, so that rounding errors do not accumulate. */
static void add_few(float *restrict few, float *restrict down, int64_t n) {
#pragma omp simd
    for (int64_t c = 0; c < n; c++) {
        down[c] += few[c];
        few[c] = 0;
    }
}

/* `count` lines of batch `block`, starting with line `offset`; if lines are rows, `length` is their segment. */
static void do_factored_sum(Work *w, const Task *task, int64_t number) {
    const Tensor *t = w->t;
    int64_t n = line_length(t);
    float *down = w->columns + number * n, *few = w->columns + (w->num_sums + number) * n;
    memset(down, 0, n * sizeof(float));
    memset(few, 0, n * sizeof(float));
    for (int64_t i = 0; i < task->count; i++) {
        if (i && i % FEW_LINES == 0) add_few(few, down, n);
        int64_t line = task->block * num_lines(t) + task->offset + i, offset = line * n;
        if (lines_are_rows(t)) {
            w->totals[line] = sum_line(t, offset, n, few);
            continue;
        }
        for (int64_t s = 0; s < t->num_blocks; s++) w->totals[line * t->num_blocks + s] = 0;
        for (const Span *span = t->spans; span < t->spans + t->num_spans; span++)
            w->totals[line * t->num_blocks + span->block] +=
                sum_line(t, offset + span->row, span->rows_of_block, few + span->row);
    }
    add_few(few, down, n);
}

/* The sum across the lines of a batch at position `c`, in double; if lines are rows, there is one per segment. */
static double wide_sum_down(const Work *w, const Task *tasks, int64_t batch, int64_t c) {
    const Tensor *t = w->t;
    int64_t n = line_length(t);
    double total = 0;
    for (const Task *task = tasks; task < tasks + w->num_sums; task++) {
        if (task->block != batch || (lines_are_rows(t) && task->length != c / n)) continue;
        int64_t offset = (batch * num_lines(t) + task->offset) * n + c % n;
        total += wide_sum(at(t->grad, offset, t->param_bf16), task->count, n, (int)t->param_bf16);
    }
    return total;
}

/* Finite: an infinite mean of the rows would make all of them NaN. */
static float next_finite(const Work *w, float moment, double sum, double count) {
    float next = next_moment(w, moment, sum, count);
    return next > FLT_MAX ? FLT_MAX : next;
}

static int64_t others_of(const Tensor *t) { return t->outer * t->inner; }

/* Roots in `factors`: of the rows over their mean, of the rows, of the columns. */
static float *row_roots(const Work *w) { return w->factors + w->t->batches * w->t->rows; }

static float *column_roots(const Work *w) { return row_roots(w) + w->t->batches * w->t->rows; }

static void combine_factored(Work *w, const Task *tasks) {
    const Tensor *t = w->t;
    int64_t n = line_length(t), segments = t->num_blocks, others = others_of(t);
    int by_rows = lines_are_rows(t);
    double *rows_of_segment = w->totals + t->batches * num_lines(t) * (by_rows ? 1 : segments);
    double *means = rows_of_segment + segments, *down = means + segments;
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
        for (int64_t c = 0; c < num_down; c++)
            if (overflows(down[c])) down[c] = wide_sum_down(w, tasks, a, c);
        const double *along = w->totals + a * num_lines(t) * (by_rows ? 1 : segments);
        const double *row_sums = by_rows ? along : down;
        const double *column_sums = by_rows ? down : along; /* (segments, C2), or (C1, segments) */
        for (int64_t s = 0; s < segments; s++) means[s] = 0;
        for (const Span *span = t->spans; span < t->spans + t->num_spans; span++) {
            for (int64_t r = span->row; r < span->row + span->rows_of_block; r++) {
                row_moment[r] = next_finite(w, row_moment[r], row_sums[r], (double)others);
                means[span->block] += row_moment[r];
            }
        }
        for (const Span *span = t->spans; span < t->spans + t->num_spans; span++) {
            float mean = (float)(means[span->block] / rows_of_segment[span->block]);
            if (mean < FLT_MIN) mean = FLT_MIN;
            for (int64_t r = span->row; r < span->row + span->rows_of_block; r++) {
                w->factors[a * t->rows + r] = sqrtf(row_moment[r] / mean);
                row_roots(w)[a * t->rows + r] = sqrtf(row_moment[r]);
            }
        }
        for (int64_t c = 0; c < segments * others; c++) {
            int64_t segment = by_rows ? c / others : c % segments;
            column_moment[c] = next_finite(w, column_moment[c], column_sums[c], rows_of_segment[segment]);
            column_roots(w)[a * segments * others + c] = sqrtf(column_moment[c]);
        }
    }
}

static void do_factored_update(const Work *w, const Task *task) {
    const Tensor *t = w->t;
    int64_t n = line_length(t), segments = t->num_blocks;
    const float *normalised = w->factors + task->block * t->rows, *rows = row_roots(w) + task->block * t->rows;
    const float *columns = column_roots(w) + task->block * segments * others_of(t);
    for (int64_t line = task->offset; line < task->offset + task->count; line++) {
        int64_t offset = (task->block * num_lines(t) + line) * n;
        if (lines_are_rows(t)) {
            const float *own = columns + task->length * n;
            update_factored(w, offset, n, (Along){normalised[line], rows[line]}, own, own);
            continue;
        }
        for (const Span *span = t->spans; span < t->spans + t->num_spans; span++) {
            float column = columns[line * segments + span->block];
            update_factored(w, offset + span->row, span->rows_of_block, (Along){column, column},
                            normalised + span->row, rows + span->row);
        }
    }
}

#endif
