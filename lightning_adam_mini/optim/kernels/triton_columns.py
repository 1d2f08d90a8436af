"""Blocks that are columns in memory, as where a weight is stored transposed: tiles of rows and columns.

Programs that each had a column would read a few bytes of every row. A tile reads whole lines, and its sums are finished
as those of chunks are.
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

__all__ = ["sum_columns", "update_columns"]


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
    """The sums of the squares of the columns of each tile, `num_rows` rows at a time."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 7
    pitch, width, height = (
        load_length(tile + 2, is_aligned),
        load_length(tile + 4, is_aligned),
        load_length(tile + 3, False),
    )
    grads = pointer_to(addresses, tl.load(tile), 1, tl.load(tile + 1), grad_type, is_aligned)
    across = tl.arange(0, block_size)
    down = tl.arange(0, num_rows)
    index = down[:, None] * pitch + across[None, :]  # 32 bits wide, which saves registers
    squares = tl.zeros((num_rows, block_size), tl.float32)
    scale = 1 / tl.sqrt(height.to(tl.float32))  # the mean of a tile may be finite where its sum is not
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
    """The update of tiles whose second moments, one a column, are those of this step already."""
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
