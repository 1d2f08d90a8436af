/* What the caller says of tensors, and what a step keeps of them. */
#ifndef ADAM_MINI_TYPES_H
#define ADAM_MINI_TYPES_H

#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

enum {
    LANES = 64,            /* partial sums of a run */
    SUM_LENGTH = 2048,     /* elements whose squares are added in float32: 32 a lane */
    SUM_HEIGHT = 256,      /* the same down a column, eight at a time */
    FEW_LINES = 16,        /* the same one at a time, and then as many of these sums */
    TASK_LENGTH = 1 << 16, /* elements of a task */
    LARGE_BLOCK = 1 << 18, /* elements of a block that several threads share */
    SHORT_RUN = 48,        /* shorter runs go through vectors that hold several of them */
    LONG_RUN = 1024,       /* runs that two passes take one by one */
    PACK_LENGTH = 2048,    /* elements of short runs that are taken at once */
    COLUMN_SUMS = 16,      /* partial sums of a column */
    GROUP_LENGTH = 128,    /* codes that share a scale; elements that are converted at once */
};

/* Rows of consecutive blocks of one size. Rank one: the rows of a segment in one repeat, and its number. */
typedef struct {
    int64_t row, rows_of_block, count, block;
} Span;

/* First moments in 8 bits: the numbers of the codes, and how to find the code of a number. */
typedef struct {
    float values[256];    /* increasing */
    float middles[256];   /* between a value and the next; infinity last */
    int32_t first[65536]; /* by the upper half of a number's bits, the least code; one middle at most lies between */
} Codebook;

/* What the caller says of a tensor: words of eight bytes. */
typedef struct {
    void *param;
    const void *grad;
    void *exp_avg;
    float *moment;        /* a value a block, or an element, as the mode says; of sums, doubles */
    float *column_moment; /* FACTORED; else the same */
    float *step;
    int64_t mode, param_bf16, exp_avg_dtype;
    int64_t batches, outer, rows, inner; /* A, C1, R, C2 */
    const Span *spans; /* in the order of rows, which they cover */
    int64_t num_spans, num_blocks;
    int64_t in_pieces; /* whether a block has rows in more than one place */
    float *scales;     /* of codes: one for each GROUP_LENGTH elements of a slice, and what is left of it */
    const Codebook *codebook;
    int64_t slice;  /* elements of a slice */
    int64_t rounds; /* whether what is stored in bfloat16 is rounded stochastically, by this seed */
    int64_t seed;
    int64_t first; /* number of the first element in the whole parameter */
} Tensor;

enum { FLOAT32, BFLOAT16, CODES }; /* dtypes of first moments */

enum {
    MEAN,                /* a second moment a block */
    ELEMENT,             /* a second moment an element */
    FACTORED,            /* a row mean times a column mean over the mean of the rows */
    DENOMINATOR,         /* `moment` has a denominator a block, which is only read */
    SUM,                 /* write sums of squares a block to `moment`, as doubles, and change nothing else */
};

/* A tensor during a step; or a batch of one, where its columns are summed. */
typedef struct {
    const Tensor *t;
    const Span *spans;
    int64_t num_spans;
    float decay, from_m, weight, sign, step_size, root, eps, beta2, rest2;
    int64_t first_task, num_sums, sums_left, is_ready;
    uint32_t hash; /* of the seed and the step: `a` of the random bits */
    double *totals; /* sums of chunks, blocks and columns, as the way through the tensor needs them */
    float *columns; /* a sum a chunk and column */
    float *factors; /* what multiplies m, a block or a column; FACTORED: roots of the rows, then of the columns */
} Work;

enum { BLOCKS, PACK, ELEMENTS, CHUNK_SUM, CHUNK_UPDATE, LINES_SUM, LINES_UPDATE, FACTORED_SUM, FACTORED_UPDATE };

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
