"""Contiguous chunks of blocks that one program does not hold, or of a tensor that shares nothing.

Long blocks take three launches: partial sums of their chunks, the second moments from these, and the update. A second
moment that is written in the same launch as it is read would be a race.
"""

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

__all__ = ["finish_moments", "sum_chunks", "update_chunks", "update_elements"]


@triton.jit
def sum_chunks(
    addresses: tl.tensor,
    chunks: tl.tensor,
    sums: tl.tensor,
    grad_type: tl.constexpr,
    block_size: tl.constexpr,
    is_aligned: tl.constexpr,
) -> None:
    """The sum of the squares of each chunk of a block, one a program, at the number of the program in `sums`."""
    program = tl.program_id(0)
    chunk = chunks + program.to(tl.int64) * 4
    columns = tl.arange(0, block_size)
    grads = pointer_to(addresses, tl.load(chunk), 1, tl.load(chunk + 1), grad_type, is_aligned)
    g = load_floats(grads + columns, columns < load_length(chunk + 2, is_aligned))
    g *= block_size**-0.5  # the mean may be finite where the sum is not
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
    """The new second moments from partial sums: `group_size` of them a program, each of at most `longest` sums."""
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
    tl.debug_barrier()  # every warp has read the old one
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
    """The update of chunks whose second moment, one each, is that of this step already."""
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
    """Chunks whose elements each have a second moment: AdamW."""
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
