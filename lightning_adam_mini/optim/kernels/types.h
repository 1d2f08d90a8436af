/* Constants, the structs that the caller fills (cpu_plan.py), and what a step keeps in memory. */
#ifndef ADAM_MINI_TYPES_H
#define ADAM_MINI_TYPES_H

#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

enum {
    /* Accuracy: at most 32 squares are added in float32 one after the other, so that a sum is right to 1e-6. */
    LANES = 64,        /* partial sums of a run: four AVX-512 or eight AVX2 vectors */
    SUM_LENGTH = 2048, /* elements of a run that are summed in float32: 32 per lane */
    SUM_HEIGHT = 256,  /* rows of a column that are summed in float32: 32 times eight rows */
    FEW_LINES = 16,    /* lines that are summed in float32 one at a time; then as many of these sums */
    /* Speed. */
    TASK_LENGTH = 1 << 16, /* elements per task: 256 KiB each of p, g and m in float32 */
    LARGE_BLOCK = 1 << 18, /* elements of the largest block that one thread updates alone */
    SHORT_RUN = 48,        /* shorter runs are packed, several into one vector loop */
    LONG_RUN = 1024,       /* runs that are long enough for a task of their own in the two-pass form */
    PACK_LENGTH = 2048,    /* elements of a pack of short runs, whose factors are on the stack */
    COLUMN_SUMS = 16,      /* most partial sums per column, unless SUM_HEIGHT asks for more */
    GROUP_LENGTH = 128,    /* codes that share a scale; elements that are converted at once */
};

/* Rows of consecutive blocks of equal size. FACTORED: the rows of a segment in one repeat, and its index. */
typedef struct {
    int64_t row, rows_of_block, count, block;
} Span;

/* 8-bit first moments: the value of each code, and how to find the code of a value. */
typedef struct {
    float values[256];    /* increasing */
    float middles[256];   /* between each value and the next; infinity last */
    int32_t first[65536]; /* by the upper 16 bits of a float32, the smallest code; with at most one middle in between */
} Codebook;

/* One tensor, as words of eight bytes. */
typedef struct {
    void *param;
    const void *grad;
    void *exp_avg;
    float *moment;        /* one per block or per element, as the mode says; doubles for SUM */
    float *column_moment; /* for FACTORED; else the same as `moment` */
    float *step;
    int64_t mode, param_bf16, exp_avg_dtype;
    int64_t batches, outer, rows, inner; /* A, C1, R, C2 */
    const Span *spans; /* in row order; they cover all rows */
    int64_t num_spans, num_blocks;
    int64_t in_pieces; /* whether a block has rows in more than one place */
    float *scales;     /* of 8-bit codes: one per GROUP_LENGTH elements of a slice, and one for its rest */
    const Codebook *codebook;
    int64_t slice;  /* elements of a slice along axis 0 */
    int64_t rounds; /* whether bfloat16 is rounded stochastically, with this seed */
    int64_t seed;
    int64_t first; /* index of the first element in the whole parameter */
} Tensor;
_Static_assert(sizeof(Tensor) == 23 * 8, "cpu_plan.py writes this struct as 23 words");

#define FLOOR 0.3 /* of blocks.py */

enum { FLOAT32, BFLOAT16, CODES }; /* dtypes of first moments */

enum {
    MEAN,        /* one second moment per block */
    ELEMENT,     /* one second moment per element */
    FACTORED,    /* row mean times column mean over the mean of the rows */
    DENOMINATOR, /* `moment` holds one denominator per block, which is only read */
    SUM,         /* write each block's sum of squares to `moment`, as doubles, and change nothing else */
};

/* A tensor during a step; or one batch of it, if its columns are summed. */
typedef struct {
    const Tensor *t;
    const Span *spans;
    int64_t num_spans;
    float decay, from_m, weight, sign, step_size, root, eps, beta2, rest2, floor_of_roots;
    int64_t first_task, num_sums, sums_left, is_ready;
    uint32_t hash; /* of the seed and the step: `a` of the random bits */
    double *totals; /* sums of chunks, blocks and columns, whichever the traversal needs */
    float *columns; /* one sum per chunk and column */
    float *factors; /* multiplies m, per block or column; FACTORED: roots of the rows over their mean, of the columns, of the rows */
} Work;

enum { BLOCKS, PACK, ELEMENTS, CHUNK_SUM, CHUNK_UPDATE, LINES_SUM, LINES_UPDATE, FACTORED_SUM, FACTORED_UPDATE };

/* FACTORED: the roots that belong to a line in memory. */
typedef struct {
    float factor, bound;
} Along;

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

#endif
