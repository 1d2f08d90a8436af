/* Sums and updates of blocks that have one second moment each. */
#ifndef ADAM_MINI_BLOCKS_H
#define ADAM_MINI_BLOCKS_H

#include "formats.h"

static float next_moment(const Work *w, float moment, double sum, double count) {
    return moment * w->beta2 + w->rest2 * (float)(sum / count);
}

/* What multiplies m in a block, once its sum is known. */
static float factor_of(const Work *w, int64_t block, double sum, double count) {
    float *v = w->t->moment + block;
    if (w->t->mode == SUM) { /* which has doubles there */
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

/* `count` short blocks of `length` elements each, which follow each other. */
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

#endif
