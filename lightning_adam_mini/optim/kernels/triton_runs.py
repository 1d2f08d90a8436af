"""Blocks that are contiguous runs of elements: sums, second moments and the update in one launch."""

import triton
import triton.language as tl

from lightning_adam_mini.optim.kernels.triton_math import (
    load_floats,
    load_length,
    load_scalars,
    pointer_to,
    step_factor,
    store_update,
)

__all__ = ["update_long_runs", "update_runs"]


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
    """Blocks that are runs of at most `block_size` elements, `num_rows` a program, held in registers."""
    program = tl.program_id(0)
    band = bands + tl.load(band_of_program + program) * 6
    tensor = tl.load(band)
    length = load_length(band + 3, is_aligned)
    first = (program - tl.load(band + 5)) * num_rows
    rows = tl.arange(0, num_rows)
    columns = tl.arange(0, block_size)
    is_row = first + rows < tl.load(band + 2)
    mask = is_row[:, None] & (columns < length)[None, :]
    index = rows[:, None] * length + columns[None, :]  # 32 bits wide, which saves registers
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
    scaled = g * (1 / tl.sqrt(length.to(tl.float32)))  # squares add up to the mean, finite wherever that is
    moment = moment * beta2 + tl.sum(scaled * scaled, 1) * weight2
    tl.debug_barrier()  # every warp has read the old one
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
    """Blocks that are runs too long for registers, one a program: the gradient is read again, from the cache."""
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
    scale = 1 / tl.sqrt(length.to(tl.float32))  # squares add up to the mean, finite wherever that is
    for start in range(0, length, block_size):
        index = start + columns
        g = tl.load(grads + index, mask=index < length, other=0.0, eviction_policy="evict_last").to(tl.float32)
        squares += (g * scale) * (g * scale)
    moment = moment * beta2 + tl.sum(squares, 0) * weight2
    tl.debug_barrier()  # every warp has read the old one
    tl.store(moments, moment)
    factor = step_factor(moment, step_size, root, eps)
    for start in range(0, length, block_size):
        index = start + columns
        mask = index < length
        g = tl.load(grads + index, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        m = load_floats(exp_avgs + index, mask)
        p = load_floats(params + index, mask)
        store_update(params + index, exp_avgs + index, mask, p, sign * g, m, decay, factor, weight1)
