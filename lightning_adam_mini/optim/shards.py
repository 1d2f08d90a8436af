"""Shards: what one rank computes of a parameter that is sharded over several.

A parameter is split into local tensors in many ways: along a dimension, evenly or not; along two at once; in strides;
or as a range of its flattened elements. Each local tensor consists of a few rectangles (`Box`) of the whole, and the
update needs to know nothing else. The second moments of a rank belong to the *local blocks*: the tensor's `Blocks`,
restricted to this rank's part of each axis on which the second moment is sharded with the parameter. Along all other
axes each rank keeps the whole second moment, which is small, and the ranks add up their sums of squares.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_adam_mini.blocks import SLICE_ELEMENTS, Blocks, Kind, floored_root, sum_square, wide_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Box", "Shard", "flat_boxes", "grid_boxes", "intersect", "split", "whole_box"]


@dataclass(frozen=True)
class Box:
    """A rectangle of a tensor that this rank holds.

    Args:
        start: Where it starts in the local blocks, one number per dimension.
        sizes: Its shape.
        local: Where it starts in the local tensor, one number per dimension.
        flat: For a one-dimensional local tensor, the offset and the shape of the range that `local` counts in.
    """

    start: tuple[int, ...]
    sizes: tuple[int, ...]
    local: tuple[int, ...]
    flat: tuple[int, tuple[int, ...]] | None = None

    def view(self, tensor: Tensor) -> Tensor:
        """The rectangle as a view of a local tensor."""
        if self.flat is not None:
            offset, shape = self.flat
            tensor = tensor.narrow(0, offset, math.prod(shape)).view(shape)
        for dim, (start, size) in enumerate(zip(self.local, self.sizes, strict=True)):
            tensor = tensor.narrow(dim, start, size)
        return tensor

    def lies_in(self, shape: Sequence[int]) -> bool:
        """Whether the rectangle fits into a local tensor of `shape`."""
        if self.flat is not None:
            offset, ranged = self.flat
            return len(shape) == 1 and offset + math.prod(ranged) <= shape[0]
        ends = (start + size for start, size in zip(self.local, self.sizes, strict=True))
        return len(shape) == len(self.sizes) and all(end <= size for end, size in zip(ends, shape, strict=True))

    def within(self, kept: Tensor) -> Tensor:
        """The part of a tensor over the local blocks, of size 1 on some axes, that broadcasts against the rectangle."""
        for dim, (start, size) in enumerate(zip(self.start, self.sizes, strict=True)):
            if kept.shape[dim] != 1:
                kept = kept.narrow(dim, start, size)
        return kept


@dataclass(frozen=True)
class Shard:
    """A rank's part of a parameter.

    Args:
        local_blocks: The block structure of the part whose second moments this rank keeps.
        boxes: The rectangles of the local tensor; None where it covers all rows of the local blocks.
        groups: Process groups that share blocks: sums of squares are reduced over one after the other.
        device_type: Type of device that these groups communicate on.
    """

    local_blocks: Blocks
    boxes: tuple[Box, ...] | None = None
    groups: tuple[ProcessGroup, ...] = ()
    device_type: str | None = None
    _segments: tuple[int, ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        """Split the boxes of a factored second moment by segment, since each segment has its own columns."""
        if self.boxes is None or self.local_blocks.kind is not Kind.FACTORED:
            return
        assert self.local_blocks.axis is not None
        pieces = [piece for box in self.boxes for piece in _split_by_segment(box, self.local_blocks)]
        object.__setattr__(self, "boxes", tuple(box for box, _ in pieces))
        object.__setattr__(self, "_segments", tuple(segment for _, segment in pieces))

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a local tensor of `shape` can have this shard."""
        blocks = self.local_blocks
        if self.boxes is not None:
            return all(box.lies_in(shape) for box in self.boxes)
        if blocks.kind is Kind.ELEMENT:
            return tuple(shape) == blocks.shape
        kept = (blocks.axis, *blocks.batch_axes)  # along the others, a rank may have a part of each row
        return len(shape) == len(blocks.shape) and all(
            size == whole if axis in kept else size <= whole
            for axis, (size, whole) in enumerate(zip(shape, blocks.shape, strict=True))
        )

    def square_sums(self, grad: Tensor, *, exact: bool = False) -> tuple[Tensor, ...]:
        """Sums of squares over this rank's part, in the shapes of `local_blocks.state_shapes` and in `wide_dtype`."""
        blocks, dtype = self.local_blocks, wide_dtype(grad.device)
        if self.boxes is None:
            return blocks.square_sums(grad, exact=exact)
        rows = torch.zeros(blocks.row_shape, dtype=dtype, device=grad.device)
        for box in self.boxes:
            box.within(rows).add_(blocks.row_square_sums(box.view(grad), exact=exact))
        if blocks.kind is Kind.MEAN:
            return (blocks.block_sums(rows),)
        assert blocks.axis is not None
        columns = torch.zeros(blocks.state_shapes["exp_avg_sq_col"], dtype=dtype, device=grad.device)
        for box, segment in zip(self.boxes, self._segments, strict=True):
            part = box.within(columns.narrow(blocks.axis, segment, 1))
            part.add_(sum_square(box.view(grad), (blocks.axis,), exact=exact))
        return rows, columns

    def expand(self, key: str, moment: Tensor, number: int) -> Tensor:
        """A second moment, or any tensor of its shape, as it broadcasts on the blocks for the rectangle `number`."""
        if self.local_blocks.kind is Kind.MEAN:
            return self.local_blocks.expand_rows(moment)
        if key == "exp_avg_sq_row":
            return moment
        assert self.local_blocks.axis is not None
        return moment.narrow(self.local_blocks.axis, self._segments[number], 1)

    def factored_roots(self, moments: Sequence[Tensor]) -> Iterator[tuple[Box, Tensor]]:
        """Square roots of a factored second moment, rectangle by rectangle, as new tensors."""
        assert self.boxes is not None
        assert self.local_blocks.axis is not None
        normalised, columns, rows = (factor.sqrt() for factor in self.local_blocks.factors(*moments))
        for box, segment in zip(self.boxes, self._segments, strict=True):
            own = box.within(columns.narrow(self.local_blocks.axis, segment, 1))
            yield box, floored_root(box.within(normalised), own, box.within(rows))


def grid_boxes(runs: Sequence[Sequence[tuple[int, int, int]]]) -> tuple[Box, ...]:
    """The rectangles of a local tensor that has a few runs of consecutive positions along each dimension.

    Args:
        runs: For each dimension, runs as (start in the blocks, start in the local tensor, length).
    """
    boxes = []
    for combination in product(*runs):
        start, local, sizes = zip(*combination, strict=True) if combination else ((), (), ())
        if all(sizes):
            boxes.append(Box(tuple(start), tuple(sizes), tuple(local)))
    return tuple(boxes)


def flat_boxes(shape: Sequence[int], start: int, stop: int) -> tuple[Box, ...]:
    """The rectangles of the elements `start` to `stop` of a flattened tensor, whose local tensor is one-dimensional."""
    boxes, offset = [], 0
    for corner, sizes in _rectangles(tuple(shape), start, stop):
        boxes.append(Box(corner, sizes, (0,) * len(sizes), (offset, sizes)))
        offset += math.prod(sizes)
    return tuple(boxes)


def _rectangles(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Corners and sizes, in the order of the elements: at most two for each dimension but the first."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    inner = math.prod(shape[1:])
    while start < stop:
        row, column = divmod(start, inner)
        if column == 0 and stop - start >= inner:  # whole slices
            count = (stop - start) // inner
            yield (row, *[0] * (len(shape) - 1)), (count, *shape[1:])
            start += count * inner
        else:
            end = min(stop, (row + 1) * inner)
            for corner, sizes in _rectangles(shape[1:], column, column + end - start):
                yield (row, *corner), (1, *sizes)
            start = end


def _split_by_segment(box: Box, local_blocks: Blocks) -> Iterator[tuple[Box, int]]:
    """Split a box where another segment of the block axis begins; each part comes with the number of its segment."""
    axis = local_blocks.axis
    assert axis is not None
    if len(local_blocks.segments) == 1:
        yield box, 0
        return
    begin, end = box.start[axis], box.start[axis] + box.sizes[axis]
    position = 0
    for number in range(local_blocks.repeats * len(local_blocks.segments)):
        segment = number % len(local_blocks.segments)
        low, high = max(begin, position), min(end, position + local_blocks.segments[segment].length)
        position += local_blocks.segments[segment].length
        if low >= high:
            continue
        start = (*box.start[:axis], low, *box.start[axis + 1 :])
        sizes = (*box.sizes[:axis], high - low, *box.sizes[axis + 1 :])
        local = (*box.local[:axis], box.local[axis] + low - begin, *box.local[axis + 1 :])
        yield Box(start, sizes, local, box.flat), segment


def whole_box(shape: Sequence[int]) -> Box:
    """All of a tensor of `shape`."""
    corner = (0,) * len(shape)
    return Box(corner, tuple(shape), corner)


def split(box: Box, *, multiple: int = 1) -> Iterator[Box]:
    """Split a rectangle into slices of about `SLICE_ELEMENTS`, of which a float32 copy stays in the cache.

    It is split along its first axis and, where one row is longer than a slice, along the second.

    Args:
        box: The rectangle.
        multiple: A split of the second axis has a multiple of this many elements before it, in each slice of the first
            axis.
    """
    if not math.prod(box.sizes):
        return
    if not box.sizes:
        yield box
        return
    width = math.prod(box.sizes[1:])
    for rows in _split_axis(box, 0, max(1, SLICE_ELEMENTS // width)):
        if width <= SLICE_ELEMENTS:
            yield rows
        else:
            inner = math.prod(box.sizes[2:])
            unit = multiple // math.gcd(multiple, inner)
            yield from _split_axis(rows, 1, max(1, SLICE_ELEMENTS // (inner * unit)) * unit)


def intersect(box: Box, other: Box) -> Box | None:
    """The intersection of two rectangles of one local tensor, with `local` counted within `box`; None if it is empty.

    Args:
        box: A rectangle of the local tensor.
        other: Another, whose place in the blocks the result keeps.
    """
    lows = [max(a, b) for a, b in zip(box.local, other.local, strict=True)]
    highs = [min(a + s, b + t) for a, s, b, t in zip(box.local, box.sizes, other.local, other.sizes, strict=True)]
    if any(low >= high for low, high in zip(lows, highs, strict=True)):
        return None
    start = tuple(s + low - b for s, low, b in zip(other.start, lows, other.local, strict=True))
    sizes = tuple(high - low for low, high in zip(lows, highs, strict=True))
    return Box(start, sizes, tuple(low - a for low, a in zip(lows, box.local, strict=True)))


def _split_axis(box: Box, axis: int, length: int) -> Iterator[Box]:
    for offset in range(0, box.sizes[axis], length):
        start = (*box.start[:axis], box.start[axis] + offset, *box.start[axis + 1 :])
        local = (*box.local[:axis], box.local[axis] + offset, *box.local[axis + 1 :])
        size = min(length, box.sizes[axis] - offset)
        yield Box(start, (*box.sizes[:axis], size, *box.sizes[axis + 1 :]), local, box.flat)
