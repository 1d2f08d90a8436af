/* The list of tasks of a step. */
#ifndef ADAM_MINI_PLAN_H
#define ADAM_MINI_PLAN_H

#include <stdlib.h>

#include "factored.h"

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

/* Elements of a piece of a run: of codes, whole slices, or a part of a slice that is cut between groups. */
static int64_t chunk_length(const Tensor *t) {
    if (t->exp_avg_dtype != CODES || t->slice > TASK_LENGTH) return TASK_LENGTH;
    return TASK_LENGTH / t->slice * t->slice;
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
                for (; offset < end; offset += chunk_length(t))
                    add_task(plan, CHUNK_SUM, offset, MIN(chunk_length(t), end - offset), 1, span->block + j);
            }
    add_updates(plan, w, CHUNK_UPDATE);
    w->totals = reserve(plan, w->num_sums + 2 * t->num_blocks, sizeof(double));
    w->factors = reserve(plan, t->num_blocks, sizeof(float));
}

static void plan_lines(Plan *plan, const Tensor *t) {
    int64_t width = columns_of(t), batch = t->outer * width;
    int64_t height = (MAX(TASK_LENGTH / width, (t->outer + COLUMN_SUMS - 1) / COLUMN_SUMS) + 7) / 8 * 8;
    height = MIN(height, SUM_HEIGHT);
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

static void plan_factored(Plan *plan, const Tensor *t) {
    Work *w = add_work(plan, t);
    int64_t n = line_length(t), lines = num_lines(t), segments = t->num_blocks, others = t->outer * t->inner;
    int64_t most = MIN(FEW_LINES * FEW_LINES, MAX(1, TASK_LENGTH / n));
    for (int64_t a = 0; a < t->batches; a++) {
        if (!lines_are_rows(t)) {
            for (int64_t i = 0; i < lines; i += most) add_task(plan, FACTORED_SUM, i, 0, MIN(most, lines - i), a);
            continue;
        }
        for (const Span *span = t->spans; span < t->spans + t->num_spans; span++)
            for (int64_t i = 0; i < span->rows_of_block; i += most)
                add_task(plan, FACTORED_SUM, span->row + i, span->block, MIN(most, span->rows_of_block - i), a);
    }
    add_updates(plan, w, FACTORED_UPDATE);
    w->totals = reserve(plan, (t->batches * lines + n + 2) * segments, sizeof(double));
    w->columns = reserve(plan, 2 * w->num_sums * n, sizeof(float));
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
        for (int64_t i = 0; i < size; i += chunk_length(t))
            add_task(plan, ELEMENTS, i, MIN(chunk_length(t), size - i), 1, 0);
        return;
    }
    for (const Span *span = t->spans; span < t->spans + t->num_spans; span++) {
        longest = MAX(longest, span->rows_of_block * t->inner);
        shortest = MIN(shortest, span->rows_of_block * t->inner);
    }
    if (t->mode == FACTORED) plan_factored(plan, t);
    else if (!t->in_pieces && t->outer == 1 && longest <= LARGE_BLOCK) plan_runs(plan, t);
    else if (t->outer == 1 || (shortest >= LONG_RUN && t->exp_avg_dtype != CODES)) plan_chunks(plan, t);
    else plan_lines(plan, t);
}

#endif
