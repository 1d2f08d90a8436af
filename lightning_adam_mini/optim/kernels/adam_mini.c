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
 * it. No more than 32 squares are added in float32 one after the other, and these sums in double; a sum that overflows
 * float32 is taken again in double, so that a second moment is finite wherever it can be.
 *
 * Threads draw tasks from one list. An update that needs the sums of other tasks waits for them; those stand before it
 * in the list, so another thread already works on them.
 */
#include <sched.h>

#include "plan.h"

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
    if (__atomic_sub_fetch(&w->sums_left, 1, __ATOMIC_ACQ_REL)) return; /* the last one adds them up */
    if (task->kind == CHUNK_SUM) combine_chunks(w, tasks);
    else if (task->kind == LINES_SUM) combine_lines(w, tasks);
    else combine_factored(w, tasks);
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
        w->hash = hash_of_step(w->t->seed, *w->t->step);
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
