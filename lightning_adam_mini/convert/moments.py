"""Second moments of one parameter: from elements to blocks, and from blocks to elements.

Sums are float64, so that blocks that were expanded give back what they were to the last bit of float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_adam_mini.blocks import Blocks, Kind, Segment

__all__ = ["block_means", "blocks_of_shapes", "blocks_of_signature", "elements"]


def block_means(blocks: Blocks, values: Tensor, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """Means of values over blocks; for a factored second moment, over rows and over columns.

    Args:
        blocks: How the tensor is cut.
        values: A value an element, of the tensor's shape.
        dtype: Dtype of the result.

    Returns:
        One tensor for each of `blocks.state_shapes`.
    """
    keys = blocks.state_shapes
    if blocks.kind is Kind.ELEMENT:
        return dict.fromkeys(keys, values.to(dtype))
    wide = values.to(torch.float64)
    rows = wide.sum_to_size(blocks.row_shape)
    if blocks.kind is Kind.MEAN:
        sums: tuple[Tensor, ...] = (blocks.block_sums(rows),)
    else:
        sums = (rows, _column_sums(blocks, wide))
    return {key: mean.to(dtype) for key, mean in zip(keys, blocks.means(*sums), strict=True)}


def elements(blocks: Blocks, moments: Sequence[Tensor]) -> Tensor:
    """A float64 value for each element, from one tensor for each of `blocks.state_shapes`; maybe an expanded view."""
    return blocks.second_moment(*(moment.to(torch.float64) for moment in moments)).expand(blocks.shape)


def blocks_of_signature(signature: str, shape: Sequence[int]) -> Blocks:
    """The cut that `Blocks.signature` told, of a tensor of `shape`.

    Raises:
        ValueError: No signature, or one of a tensor of another shape.
    """
    kind, *words = signature.split()
    if kind == Kind.ELEMENT:
        return Blocks.element(tuple(shape))
    axis, repeats = None, 1
    batch_axes: list[int] = []
    segments: list[Segment] = []
    for word in words:
        if "/" in word:
            length, _, block_size = word.partition("/")
            segments.append(Segment(int(length), int(block_size)))
        elif word[0] == "b":
            batch_axes.append(int(word[1:]))
        elif word[0] == "a":
            axis = int(word[1:])
        else:
            repeats = int(word.removeprefix("x"))
    return Blocks(tuple(shape), Kind(kind), axis, tuple(batch_axes), tuple(segments), repeats)


def blocks_of_shapes(state: Mapping[str, Tensor], shape: Sequence[int]) -> Blocks | None:
    """The cut of a state that names none, where shapes leave no doubt: a value an element, a row or a tensor."""
    saved = state.get("exp_avg_sq")
    if saved is None:
        return None
    if saved.shape == torch.Size(shape):
        return Blocks.element(tuple(shape))
    if math.prod(saved.shape) == 1:
        return Blocks.whole(tuple(shape))
    for axis in range(len(shape)):
        rows = Blocks.rows(tuple(shape), axis=axis)
        if saved.shape == torch.Size(rows.row_shape):
            return rows
    return None


def _column_sums(blocks: Blocks, values: Tensor) -> Tensor:
    """Sums along the cut axis, one for each segment, over all its repeats."""
    axis = blocks.axis
    assert axis is not None
    folded = values.unflatten(axis, (blocks.repeats, -1))
    parts = folded.split([segment.length for segment in blocks.segments], axis + 1)
    return torch.cat([part.sum((axis, axis + 1)).unsqueeze(axis) for part in parts], axis)
