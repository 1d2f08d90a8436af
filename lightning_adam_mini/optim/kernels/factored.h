/* Sums and updates of factored second moments. */
#ifndef ADAM_MINI_FACTORED_H
#define ADAM_MINI_FACTORED_H

#include "blocks.h"

/* A batch is a matrix in memory; its lines are the rows if C1 = 1, and the columns otherwise. */
static int lines_are_rows(const Tensor *t) { return t->outer == 1; }

static int64_t num_lines(const Tensor *t) { return lines_are_rows(t) ? t->rows : t->outer; }

static int64_t line_length(const Tensor *t) { return lines_are_rows(t) ? t->inner : t->rows; }

/* The sums of a few lines to those of all, so that no rounding piles up. */
static void add_few(float *restrict few, float *restrict down, int64_t n) {
#pragma omp simd
    for (int64_t c = 0; c < n; c++) {
        down[c] += few[c];
        few[c] = 0;
    }
}

/* `count` lines from `offset` on in batch `block`; they are of segment `length` if they are rows. */
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

/* What is summed down the lines of a batch at `c`, in double; lines that are rows have a sum for each segment. */
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

static void combine_factored(Work *w, const Task *tasks) {
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
        for (int64_t c = 0; c < num_down; c++)
            if (overflows(down[c])) down[c] = wide_sum_down(w, tasks, a, c);
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

static void do_factored_update(const Work *w, const Task *task) {
    const Tensor *t = w->t;
    int64_t n = line_length(t), segments = t->num_blocks;
    const float *roots = w->factors + task->block * t->rows;
    const float *column_roots = w->factors + t->batches * t->rows + task->block * segments * t->outer * t->inner;
    for (int64_t line = task->offset; line < task->offset + task->count; line++) {
        int64_t offset = (task->block * num_lines(t) + line) * n;
        if (lines_are_rows(t)) {
            update_factored(w, offset, n, roots[line], column_roots + task->length * n);
            continue;
        }
        for (const Span *span = t->spans; span < t->spans + t->num_spans; span++)
            update_factored(w, offset + span->row, span->rows_of_block, column_roots[line * segments + span->block],
                            roots + span->row);
    }
}

#endif
