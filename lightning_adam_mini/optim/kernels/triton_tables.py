"""Tables of work for the Triton kernels: which elements of which tensor each program takes.

The tables are described in `triton_math`. Here they are rows of int64 tensors on the CPU, made from layouts without a
loop over blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_adam_mini.optim.kernels.layout import Layout

__all__ = ["Work", "contiguous_work", "elementwise_work", "tiled_work"]

CHUNK = 4096
"""Elements that a program takes of a long block, or of a tensor that shares nothing: 16 a thread of eight warps."""
IN_CACHE = 65536
"""The longest run that one program updates: its gradient is read twice, the second time from the cache."""
TILE_ROWS, TILE_COLUMNS = 256, 128
"""Rows and columns of a tile: lines of at least 256 bytes, and a partial sum for 256 elements."""
VECTOR = 8
"""Elements that starts and lengths must be multiples of for loads of 128 bits, whatever the dtype."""


@dataclass(frozen=True)
class Work:
    """What is to do for one tensor or rectangle, in rows of the tables, without the number of the tensor.

    Args:
        bands: (n, 4): first element, number of runs, elements a run, first second moment.
        chunks: (n, 3): first element, elements, second moment; those of one block follow each other.
        elements: (n, 3): the same of a tensor with a second moment an element.
        tiles: (n, 6): first element, elements to the next row, rows, columns, first entry of `columns`, number of the
            tile along its columns.
        columns: (n, 2): second moment, first partial sum.
        blocks: (n, 4): second moment, first partial sum, number of partial sums, elements; empty where the second
            moments are known before.
        num_sums: Number of partial sums.
        is_even: Whether starts and lengths of chunks, elements and tiles are multiples of `VECTOR`.
    """

    bands: Tensor
    chunks: Tensor
    elements: Tensor
    tiles: Tensor
    columns: Tensor
    blocks: Tensor
    num_sums: int = 0
    is_even: bool = True


def _empty(width: int) -> Tensor:
    return torch.empty(0, width, dtype=torch.int64, device="cpu")


def _is_even(*values: Tensor | int) -> bool:
    return all(not (torch.as_tensor(value, device="cpu") % VECTOR).any() for value in values)


def _split(runs: Tensor) -> Tensor:
    """Runs (start, length, number) in pieces of at most `CHUNK` elements, in their order."""
    start, length, number = runs.unbind(1)
    counts = (length + CHUNK - 1) // CHUNK
    run = torch.repeat_interleave(counts)
    shift = (torch.arange(len(run), device="cpu") - (counts.cumsum(0) - counts)[run]) * CHUNK
    return torch.stack([start[run] + shift, (length[run] - shift).clamp_max(CHUNK), number[run]], 1)


def elementwise_work(offset: int, numel: int) -> Work:
    """A tensor whose second moments are as many as its elements, in the same order."""
    pieces = _split(torch.tensor([[offset, numel, 0]], device="cpu"))
    pieces[:, 2] = pieces[:, 0] - offset
    return Work(_empty(4), _empty(3), pieces, _empty(6), _empty(2), _empty(4), is_even=_is_even(offset, numel))


def contiguous_work(layout: Layout, offset: int, *, is_summed: bool) -> Work:
    """A tensor whose rows are contiguous.

    Args:
        layout: Its layout.
        offset: Elements before it in the tensor that addresses point to.
        is_summed: Whether the second moments of this step are known before.
    """
    runs = layout.runs()
    runs = torch.stack([offset + runs[:, 0] * layout.row_length, runs[:, 1] * layout.row_length, runs[:, 2]], 1)
    is_one_pass = torch.zeros(len(runs), dtype=torch.bool, device="cpu")
    if not is_summed:
        is_one_pass = (runs[:, 1] <= IN_CACHE) & (torch.bincount(runs[:, 2])[runs[:, 2]] == 1)
    rest = runs[~is_one_pass]
    rest = rest[rest[:, 2].argsort(stable=True)]
    chunks = _split(rest)
    blocks, num_sums = _empty(4), 0
    if not is_summed:
        numbers, counts = chunks[:, 2].unique_consecutive(return_counts=True)
        block = torch.repeat_interleave(counts)
        sizes = torch.zeros_like(numbers).index_add_(0, block, chunks[:, 1])
        blocks, num_sums = torch.stack([numbers, counts.cumsum(0) - counts, counts, sizes], 1), len(chunks)
    bands, is_even = _bands(runs[is_one_pass]), _is_even(rest[:, :2])
    return Work(bands, chunks, _empty(3), _empty(6), _empty(2), blocks, num_sums, is_even)


def _bands(runs: Tensor) -> Tensor:
    """Runs (start, length, number) of one length that follow each other in memory and in number, as one row each."""
    if not len(runs):
        return _empty(4)
    start, length, number = runs.unbind(1)
    follows = (length.diff() == 0) & (number.diff() == 1) & (start.diff() == length[:-1])
    starts = torch.nonzero(~follows).flatten() + 1
    first = torch.cat([starts.new_zeros(1), starts])
    counts = torch.cat([first, first.new_full((1,), len(runs))]).diff()
    return torch.stack([start[first], counts, length[first], number[first]], 1)


def tiled_work(layout: Layout, offset: int, *, is_summed: bool) -> Work:
    """A tensor whose rows are columns in memory; arguments as in `contiguous_work`.

    `(A, C1, R, C2)` is taken as `A` matrices of `C1` rows and `R * C2` columns. Columns have their partial sums in the
    order of their blocks, so that those of a block follow each other.
    """
    outer, height, num_rows, inner = layout.sizes
    width = num_rows * inner
    numbers = torch.arange(layout.num_rows, device="cpu") if layout.block_of_row is None else layout.block_of_row
    numbers = numbers.repeat_interleave(inner)
    num_down, num_across = -(-height // TILE_ROWS), -(-width // TILE_COLUMNS)
    order = numbers.argsort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device="cpu")
    batch, down, across = torch.meshgrid(
        *(torch.arange(count, device="cpu") for count in (outer, num_down, num_across)), indexing="ij"
    )
    top, left = down * TILE_ROWS, across * TILE_COLUMNS
    fields = [
        offset + (batch * height + top) * width + left,
        torch.full_like(top, width),
        (height - top).clamp_max(TILE_ROWS),
        (width - left).clamp_max(TILE_COLUMNS),
        batch * width + left,
        down,
    ]
    tiles = torch.stack([field.flatten() for field in fields], 1)
    columns = torch.stack([numbers, rank * num_down], 1)
    blocks, num_sums = _empty(4), 0
    if not is_summed:
        found, counts = numbers[order].unique_consecutive(return_counts=True)
        first = (counts.cumsum(0) - counts) * num_down
        blocks, num_sums = torch.stack([found, first, counts * num_down, counts * height], 1), len(order) * num_down
    return Work(_empty(4), _empty(3), _empty(3), tiles, columns, blocks, num_sums, _is_even(offset, width))
