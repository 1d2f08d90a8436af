"""Rectangles of local tensors, cut into slices of which a float32 copy stays in the cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lightning_adam_mini.blocks import SLICE_ELEMENTS
from lightning_adam_mini.optim.shards import Box

__all__ = ["intersect", "split", "whole_box"]


def whole_box(shape: Sequence[int]) -> Box:
    """All of a tensor of `shape`."""
    corner = (0,) * len(shape)
    return Box(corner, tuple(shape), corner)


def split(box: Box, *, multiple: int = 1) -> Iterator[Box]:
    """Cut a rectangle into slices of about `SLICE_ELEMENTS`, along its first axis, or if that is long along two.

    Args:
        box: The rectangle.
        multiple: A cut of the second axis leaves whole multiples of so many elements before it, in each slice of the
            first axis.
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
    """What two rectangles of one local tensor have in common, counted within `box`; None where they have nothing.

    Args:
        box: A rectangle of the local tensor.
        other: Another, whose place in the frame the result keeps.
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
