"""The Triton kernels: one launch updates a whole list of tensors.

Kernels do not get the model's tensors as arguments; they read addresses from a table. Each program takes rows of these
tables, which `triton_plan` builds:

- `addresses`, int64 (tensors, 4): parameter, gradient, first moment, second moment.
- `scalars`, float32 (tensors, 3): the factor of weight decay, the step size, the root of the second bias correction.
- `bands`, int64 (bands, 6): tensor, first element, number of runs, elements per run, first second moment, first
  program.
- `chunks`, int64 (chunks, 4): tensor, first element, elements, second moment.
- `tiles`, int64 (tiles, 7): tensor, first element, elements to the next row, rows, columns, first entry of `columns`,
  index of the tile along its columns.
- `columns`, int32 (columns, 2): second moment, first partial sum.
- `blocks`, int64 (blocks, 5): tensor, second moment, first partial sum, number of partial sums, elements.

Blocks that are contiguous runs of up to 65,536 elements take one launch: sums, second moments and the update. Longer
blocks, and blocks with several runs, take three: partial sums of their chunks, second moments from these sums, and the
update. (A second moment that one launch writes and other programs of it read would be a race.) Blocks that are columns
in memory, as in a weight that is stored transposed, take three too, over tiles that read whole lines: one program per
column would read a few bytes of every row.

Arithmetic is in float32. Partial sums are float64 and are added in a fixed order, so that results do not vary from run
to run; atomic additions would vary. Sums are taken of scaled gradients, so that a mean may be finite although the sum
overflows float32. `is_aligned` promises that runs start at multiples of 16 bytes and have multiples of 8 elements, so
that loads are 128 bits wide.

No `from __future__ import annotations` here: Triton reads annotations as objects, not as strings.
"""

import triton
import triton.language as tl

__all__ = [
    "finish_moments",
    "sum_chunks",
    "sum_columns",
    "update_chunks",
    "update_columns",
    "update_elements",
    "update_long_runs",
    "update_runs",
]


@triton.jit
def pointer_to(
    addresses: tl.tensor,
    tensor: tl.tensor,
    field: tl.constexpr,
    offset: tl.tensor,
    dtype: tl.constexpr,
    is_aligned: tl.constexpr,
) -> tl.tensor:
    """A pointer to element `offset` of a tensor; the hint that it is aligned makes loads wide."""
    pointer = tl.load(addresses + tensor * 4 + field).to(tl.pointer_type(dtype)) + offset
    if is_aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load_floats(pointer: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Elements as float32, with zeros where the mask is false."""
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_scalars(scalars: tl.tensor, tensor: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The factor of weight decay, the step size, and the root of the second bias correction of a tensor."""
    entry = scalars + tensor * 3
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)


@triton.jit
def load_length(values: tl.tensor, is_aligned: tl.constexpr) -> tl.tensor:
    """A small number of elements from a table; masks that are constant over 8 elements keep loads wide."""
    length = tl.load(values).to(tl.int32)
    if is_aligned:
        length = tl.multiple_of(length, 8)
    return length


@triton.jit
def store_update(
    param: tl.tensor,
    exp_avg: tl.tensor,
    mask: tl.tensor,
    p: tl.tensor,
    g: tl.tensor,
    m: tl.tensor,
    decay: tl.tensor,
    factor: tl.tensor,
    weight1: tl.tensor,
) -> None:
    """Store `m + weight1 * (g - m)`, and `decay * p` minus `factor` times it."""
    m = m + weight1 * (g - m)
    tl.store(exp_avg, m.to(exp_avg.dtype.element_ty), mask=mask)
    tl.store(param, (p * decay - factor * m).to(param.dtype.element_ty), mask=mask)


@triton.jit
def step_factor(moment: tl.tensor, step_size: tl.tensor, root: tl.tensor, eps: tl.tensor) -> tl.tensor:
    """The factor of the first moment: the step size over the root of the corrected second moment, plus eps."""
    return step_size / (tl.sqrt(moment) / root + eps)


@triton.jit
def update_runs(
    addresses: tl.tensor,
    scalars: tl.tensor,
    bands: tl.tensor,
    band_of_program: tl.tensor,
    beta2: tl.tensor,
    weight1: tl.tensor,
    weight2: tl.tensor,
    eps: tl.tensor,
    sign: tl.tensor,
    param_type: tl.constexpr,
    grad_type: tl.constexpr,
    exp_avg_type: tl.constexpr,
    num_rows: tl.constexpr,
    block_size: tl.constexpr,
    is_aligned: tl.constexpr,
) -> None:
    """Update runs of at most `block_size` elements, `num_rows` per program, held in registers."""
    program = tl.program_id(0)
    band = bands + tl.load(band_of_program + program) * 6
    tensor = tl.load(band)
    length = load_length(band + 3, is_aligned)
    first = (program - tl.load(band + 5)) * num_rows
    rows = tl.arange(0, num_rows)
    columns = tl.arange(0, block_size)
    is_row = first + rows < tl.load(band + 2)
    mask = is_row[:, None] & (columns < length)[None, :]
    index = rows[:, None] * length + columns[None, :]  # 32-bit offsets save registers
    offset = tl.load(band + 1) + first * length
    grads = pointer_to(addresses, tensor, 1, offset, grad_type, is_aligned) + index
    exp_avgs = pointer_to(addresses, tensor, 2, offset, exp_avg_type, is_aligned) + index
    params = pointer_to(addresses, tensor, 0, offset, param_type, is_aligned) + index
    moments = pointer_to(addresses, tensor, 3, tl.load(band + 4) + first, tl.float32, False) + rows
    moment = tl.load(moments, mask=is_row, other=0.0)
    decay, step_size, root = load_scalars(scalars, tensor)
    g = load_floats(grads, mask)
    m = load_floats(exp_avgs, mask)
    p = load_floats(params, mask)
    scaled = g * (1 / tl.sqrt(length.to(tl.float32)))  # squares add up to the mean; their sum may overflow
    moment = moment * beta2 + tl.sum(scaled * scaled, 1) * weight2
    tl.debug_barrier()  # all warps have read the old moment before one overwrites it
    tl.store(moments, moment, mask=is_row)
    factor = step_factor(moment, step_size, root, eps)[:, None]
    store_update(params, exp_avgs, mask, p, sign * g, m, decay, factor, weight1)


@triton.jit
def update_long_runs(
    addresses: tl.tensor,
    scalars: tl.tensor,
    bands: tl.tensor,
    band_of_program: tl.tensor,
    beta2: tl.tensor,
    weight1: tl.tensor,
    weight2: tl.tensor,
    eps: tl.tensor,
    sign: tl.tensor,
    param_type: tl.constexpr,
    grad_type: tl.constexpr,
    exp_avg_type: tl.constexpr,
    block_size: tl.constexpr,
    is_aligned: tl.constexpr,
) -> None:
    """Update runs that are too long for registers, one per program, which reads the gradient again from the cache."""
    program = tl.program_id(0)
    band = bands + tl.load(band_of_program + program) * 6
    tensor = tl.load(band)
    length = load_length(band + 3, is_aligned)
    row = program - tl.load(band + 5)
    columns = tl.arange(0, block_size)
    offset = tl.load(band + 1) + row * length
    grads = pointer_to(addresses, tensor, 1, offset, grad_type, is_aligned)
    exp_avgs = pointer_to(addresses, tensor, 2, offset, exp_avg_type, is_aligned)
    params = pointer_to(addresses, tensor, 0, offset, param_type, is_aligned)
    moments = pointer_to(addresses, tensor, 3, tl.load(band + 4) + row, tl.float32, False)
    moment = tl.load(moments)
    decay, step_size, root = load_scalars(scalars, tensor)
    squares = tl.zeros((block_size,), tl.float32)
    scale = 1 / tl.sqrt(length.to(tl.float32))  # squares add up to the mean; their sum may overflow
    for start in range(0, length, block_size):
        index = start + columns
        g = tl.load(grads + index, mask=index < length, other=0.0, eviction_policy="evict_last").to(tl.float32)
        squares += (g * scale) * (g * scale)
    moment = moment * beta2 + tl.sum(squares, 0) * weight2
    tl.debug_barrier()  # all warps have read the old moment before one overwrites it
    tl.store(moments, moment)
    factor = step_factor(moment, step_size, root, eps)
    for start in range(0, length, block_size):
        index = start + columns
        mask = index < length
        g = tl.load(grads + index, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        m = load_floats(exp_avgs + index, mask)
        p = load_floats(params + index, mask)
        store_update(params + index, exp_avgs + index, mask, p, sign * g, m, decay, factor, weight1)


@triton.jit
def sum_chunks(
    addresses: tl.tensor,
    chunks: tl.tensor,
    sums: tl.tensor,
    grad_type: tl.constexpr,
    block_size: tl.constexpr,
    is_aligned: tl.constexpr,
) -> None:
    """Store the sum of the squares of each chunk, one per program, to `sums` at the index of the program."""
    program = tl.program_id(0)
    chunk = chunks + program.to(tl.int64) * 4
    columns = tl.arange(0, block_size)
    grads = pointer_to(addresses, tl.load(chunk), 1, tl.load(chunk + 1), grad_type, is_aligned)
    g = load_floats(grads + columns, columns < load_length(chunk + 2, is_aligned))
    g *= block_size**-0.5  # the mean may be finite although the sum is not
    tl.store(sums + program, tl.sum(g * g, 0).to(tl.float64) * block_size)


@triton.jit(do_not_specialize=["num_blocks", "longest"])
def finish_moments(
    addresses: tl.tensor,
    blocks: tl.tensor,
    sums: tl.tensor,
    num_blocks: tl.tensor,
    longest: tl.tensor,
    beta2: tl.tensor,
    weight2: tl.tensor,
    group_size: tl.constexpr,
    num_slots: tl.constexpr,
) -> None:
    """Store new second moments from partial sums: `group_size` per program, each of at most `longest` sums."""
    numbers = tl.program_id(0).to(tl.int64) * group_size + tl.arange(0, group_size)
    is_block = numbers < num_blocks
    block = blocks + numbers * 5
    first = tl.load(block + 2, mask=is_block, other=0)
    count = tl.load(block + 3, mask=is_block, other=0)
    tensor = tl.load(block, mask=is_block, other=0)
    moments = tl.load(addresses + tensor * 4 + 3, mask=is_block, other=0).to(tl.pointer_type(tl.float32))
    moments += tl.load(block + 1, mask=is_block, other=0)
    moment = tl.load(moments, mask=is_block, other=0.0)
    total = tl.zeros((group_size, num_slots), tl.float64)
    for start in range(0, longest, num_slots):
        slots = start + tl.arange(0, num_slots)
        mask = slots[None, :] < count[:, None]
        total += tl.load(sums + first[:, None] + slots[None, :], mask=mask, other=0.0)
    mean = (tl.sum(total, 1) / tl.load(block + 4, mask=is_block, other=1).to(tl.float64)).to(tl.float32)
    tl.debug_barrier()  # all warps have read the old moment before one overwrites it
    tl.store(moments, moment * beta2 + mean * weight2, mask=is_block)


@triton.jit
def update_chunks(
    addresses: tl.tensor,
    scalars: tl.tensor,
    chunks: tl.tensor,
    weight1: tl.tensor,
    eps: tl.tensor,
    sign: tl.tensor,
    param_type: tl.constexpr,
    grad_type: tl.constexpr,
    exp_avg_type: tl.constexpr,
    block_size: tl.constexpr,
    is_aligned: tl.constexpr,
) -> None:
    """Update chunks, each of which has one second moment, already that of this step."""
    chunk = chunks + tl.program_id(0).to(tl.int64) * 4
    tensor, offset = tl.load(chunk), tl.load(chunk + 1)
    columns = tl.arange(0, block_size)
    mask = columns < load_length(chunk + 2, is_aligned)
    grads = pointer_to(addresses, tensor, 1, offset, grad_type, is_aligned) + columns
    exp_avgs = pointer_to(addresses, tensor, 2, offset, exp_avg_type, is_aligned) + columns
    params = pointer_to(addresses, tensor, 0, offset, param_type, is_aligned) + columns
    g = load_floats(grads, mask)
    m = load_floats(exp_avgs, mask)
    p = load_floats(params, mask)
    moment = tl.load(pointer_to(addresses, tensor, 3, tl.load(chunk + 3), tl.float32, False))
    decay, step_size, root = load_scalars(scalars, tensor)
    store_update(params, exp_avgs, mask, p, sign * g, m, decay, step_factor(moment, step_size, root, eps), weight1)


@triton.jit
def update_elements(
    addresses: tl.tensor,
    scalars: tl.tensor,
    chunks: tl.tensor,
    beta2: tl.tensor,
    weight1: tl.tensor,
    weight2: tl.tensor,
    eps: tl.tensor,
    sign: tl.tensor,
    param_type: tl.constexpr,
    grad_type: tl.constexpr,
    exp_avg_type: tl.constexpr,
    block_size: tl.constexpr,
    is_aligned: tl.constexpr,
) -> None:
    """Update chunks with one second moment per element: AdamW."""
    chunk = chunks + tl.program_id(0).to(tl.int64) * 4
    tensor, offset = tl.load(chunk), tl.load(chunk + 1)
    columns = tl.arange(0, block_size)
    mask = columns < load_length(chunk + 2, is_aligned)
    grads = pointer_to(addresses, tensor, 1, offset, grad_type, is_aligned) + columns
    exp_avgs = pointer_to(addresses, tensor, 2, offset, exp_avg_type, is_aligned) + columns
    params = pointer_to(addresses, tensor, 0, offset, param_type, is_aligned) + columns
    moments = pointer_to(addresses, tensor, 3, tl.load(chunk + 3), tl.float32, is_aligned) + columns
    g = load_floats(grads, mask)
    m = load_floats(exp_avgs, mask)
    p = load_floats(params, mask)
    moment = load_floats(moments, mask) * beta2 + g * g * weight2
    tl.store(moments, moment, mask=mask)
    decay, step_size, root = load_scalars(scalars, tensor)
    store_update(params, exp_avgs, mask, p, sign * g, m, decay, step_factor(moment, step_size, root, eps), weight1)


@triton.jit
def sum_columns(
    addresses: tl.tensor,
    tiles: tl.tensor,
    columns: tl.tensor,
    sums: tl.tensor,
    grad_type: tl.constexpr,
    num_rows: tl.constexpr,
    block_size: tl.constexpr,
    is_aligned: tl.constexpr,
) -> None:
    """Store the sums of the squares of each tile's columns, read `num_rows` rows at a time."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 7
    pitch, width, height = (
        load_length(tile + 2, is_aligned),
        load_length(tile + 4, is_aligned),
        load_length(tile + 3, False),
    )
    grads = pointer_to(addresses, tl.load(tile), 1, tl.load(tile + 1), grad_type, is_aligned)
    across = tl.arange(0, block_size)
    down = tl.arange(0, num_rows)
    index = down[:, None] * pitch + across[None, :]  # 32-bit offsets save registers
    squares = tl.zeros((num_rows, block_size), tl.float32)
    scale = 1 / tl.sqrt(height.to(tl.float32))  # the mean of a tile may be finite although its sum is not
    for start in range(0, height, num_rows):
        mask = (start + down < height)[:, None] & (across < width)[None, :]
        line = start * pitch
        g = load_floats(grads + line + index, mask)
        squares += (g * scale) * (g * scale)
    slots = tl.load(columns + (tl.load(tile + 5) + across) * 2 + 1, mask=across < width, other=0)
    tl.store(sums + slots + tl.load(tile + 6), tl.sum(squares, 0).to(tl.float64) * height, mask=across < width)


@triton.jit
def update_columns(
    addresses: tl.tensor,
    scalars: tl.tensor,
    tiles: tl.tensor,
    columns: tl.tensor,
    weight1: tl.tensor,
    eps: tl.tensor,
    sign: tl.tensor,
    param_type: tl.constexpr,
    grad_type: tl.constexpr,
    exp_avg_type: tl.constexpr,
    num_rows: tl.constexpr,
    block_size: tl.constexpr,
    is_aligned: tl.constexpr,
) -> None:
    """Update tiles with one second moment per column, already that of this step."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 7
    tensor, offset = tl.load(tile), tl.load(tile + 1)
    pitch, width, height = (
        load_length(tile + 2, is_aligned),
        load_length(tile + 4, is_aligned),
        load_length(tile + 3, False),
    )
    across = tl.arange(0, block_size)
    down = tl.arange(0, num_rows)
    numbers = tl.load(columns + (tl.load(tile + 5) + across) * 2, mask=across < width, other=0)
    moment = tl.load(pointer_to(addresses, tensor, 3, 0, tl.float32, False) + numbers, mask=across < width, other=0.0)
    decay, step_size, root = load_scalars(scalars, tensor)
    factor = step_factor(moment, step_size, root, eps)[None, :]
    grads = pointer_to(addresses, tensor, 1, offset, grad_type, is_aligned)
    exp_avgs = pointer_to(addresses, tensor, 2, offset, exp_avg_type, is_aligned)
    params = pointer_to(addresses, tensor, 0, offset, param_type, is_aligned)
    index = down[:, None] * pitch + across[None, :]
    for start in range(0, height, num_rows):
        mask = (start + down < height)[:, None] & (across < width)[None, :]
        line = start * pitch
        g = load_floats(grads + line + index, mask)
        m = load_floats(exp_avgs + line + index, mask)
        p = load_floats(params + line + index, mask)
        store_update(params + line + index, exp_avgs + line + index, mask, p, sign * g, m, decay, factor, weight1)
