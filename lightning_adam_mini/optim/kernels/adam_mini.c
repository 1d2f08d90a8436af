/* One step of Adam-mini on many tensors, on the CPU.
 *
 * A dense tensor is a contiguous array (A, C1, R, C2) in memory: its A x R rows, numbered in this order, belong to
 * blocks; C1 and C2 are reduced. The kernel traverses it in one of three ways:
 *
 *   runs     C1 = 1, so a block is one contiguous run. The kernel sums its squares and then updates it while it is in
 *            the cache: five streams of memory traffic (read p, g, m; write p, m).
 *   columns  C1 > 1, as in a matrix stored as (in, out): one pass over g sums the squares of the columns, a second pass
 *            updates. Both read whole lines in memory order. Strips of columns that fit in the cache would read g from
 *            memory once, but measured slower: they break up the long sequential streams. A g that fits in the
 *            last-level cache is read from there in the second pass.
 *   chunks   large blocks, and blocks with rows in several places: the same two passes over runs, with one sum per
 *            chunk, so that several threads share a block.
 *
 * Sums do not depend on the number of threads: they are taken over the same chunks in the same order. At most 32
 * squares are added in float32 one after the other, and the sums of these in double, which keeps the mean of a block of
 * any size right to 1e-6. A sum that overflows float32 is taken again in double, so that a second moment is finite
 * whenever float32 can hold it.
 *
 * Threads take tasks from one list. An update that needs the sums of other tasks waits for them. Those tasks come
 * before it in the list, so other threads are already working on them, and nothing can deadlock.
 */
#include <sched.h>
#include <stdlib.h>

#include "blocks.h"

/* The list of tasks of a step. */

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

/* A new work; the pointer is valid until the next one is added. */
static Work *add_work(Plan *plan, const Tensor *t) {
    static Work spare; /* returned when memory runs out, and never executed */
    if (!grow((void **)&plan->works, plan->num_works, &plan->works_capacity, sizeof(Work))) {
        plan->out_of_memory = 1;
        return &spare;
    }
    Work *w = plan->works + plan->num_works++;
    *w = (Work){.t = t, .spans = t->spans, .num_spans = t->num_spans, .first_task = plan->num_tasks};
    return w;
}

/* Scratch memory is one allocation: this returns an offset, to which its address is added once the size is known. */
static void *reserve(Plan *plan, int64_t count, size_t size) {
    void *offset = (void *)plan->scratch;
    plan->scratch += (count * size + 63) / 64 * 64;
    return offset;
}

/* After the sums of a work, the updates that wait for them: the same pieces again. */
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

/* Elements of a piece of a run. With 8-bit codes, a piece must not split a group: it is a number of whole slices, or
 * part of one slice. */
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
    /* Lines per task: few partial sums per column, no more rows than float32 may sum, and a multiple of eight. */
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
    int64_t n = line_length(t), lines = num_lines(t), segments = t->num_blocks;
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
    w->factors = reserve(plan, t->batches * (2 * t->rows + segments * others_of(t)), sizeof(float));
}

static void plan_tensor(Plan *plan, const Tensor *t) {
    int64_t size = size_of(t), longest = 0, shortest = INT64_MAX;
    if (!size) {
        add_work(plan, t); /* only to count its step */
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
    /* Columns whose runs are long go run by run; not with 8-bit codes, whose groups may reach across runs of a line. */
    if (t->mode == FACTORED) plan_factored(plan, t);
    else if (!t->in_pieces && t->outer == 1 && longest <= LARGE_BLOCK) plan_runs(plan, t);
    else if (t->outer == 1 || (shortest >= LONG_RUN && t->exp_avg_dtype != CODES)) plan_chunks(plan, t);
    else plan_lines(plan, t);
}

static void do_sum(Plan *plan, Work *w, const Task *task) {
    const Task *tasks = plan->tasks + w->first_task;
    int64_t number = task - tasks;
    if (has_denominators(w)) {
        if (task->kind == CHUNK_SUM) w->totals[number] = 0;
        else memset(w->columns + number * task->length, 0, task->length * sizeof(float));
    } else if (task->kind == CHUNK_SUM) {
        w->totals[number] = sum_run(w->t, task->offset, task->length);
    } else if (task->kind == LINES_SUM) {
        float *sums = w->columns + number * task->length;
        memset(sums, 0, task->length * sizeof(float));
        sum_rows(w->t, task->offset, task->length, task->count, task->length, sums);
    } else {
        do_factored_sum(w, task, number);
    }
    if (__atomic_sub_fetch(&w->sums_left, 1, __ATOMIC_ACQ_REL)) return; /* the last to finish combines the sums */
    if (task->kind == CHUNK_SUM) combine_chunks(w, tasks);
    else if (task->kind == LINES_SUM) combine_lines(w, tasks);
    else combine_factored(w, tasks);
    __atomic_store_n(&w->is_ready, 1, __ATOMIC_RELEASE);
}

static void do_update(const Work *w, const Task *task) {
    for (int spins = 0; !__atomic_load_n(&w->is_ready, __ATOMIC_ACQUIRE); spins++)
        if (spins > 1000) sched_yield(); /* with more threads than cores, let the one run that this one waits for */
    if (task->kind == CHUNK_UPDATE) {
        update_run(w, task->offset, task->length, w->factors[task->block]);
    } else if (task->kind == LINES_UPDATE) {
        for (int64_t i = 0; i < task->count; i++)
            update_columns(w, task->offset + i * task->length, task->length, w->factors);
    } else {
        do_factored_update(w, task);
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
            case CHUNK_SUM: case LINES_SUM: case FACTORED_SUM: do_sum(plan, w, task); break;
            default: do_update(w, task);
        }
    }
}

/* One step on `count` tensors. Returns 0, or 1 if memory ran out, before anything has changed. */
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
        /* Count the step once per tensor. With denominators the caller has done so, for their bias correction. */
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
        w->floor_of_roots = (float)sqrt(FLOOR);
        w->eps = (float)eps;
        w->beta2 = (float)beta2;
        w->rest2 = (float)(1 - beta2);
        w->hash = hash_of_step(w->t->seed, *w->t->step);
    }
    /* No parallel region for one thread: after a fork it might wait for the parent's threads, which are gone here. */
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
