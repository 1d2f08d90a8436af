"""Convert second moments of one parameter between blocks: from elements to blocks, and from blocks to elements.

Sums are float64, so that expanded blocks average to the same float32 values, bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_adam_mini.blocks import Blocks, Kind, Segment
from lightning_adam_mini.convert.saved_states import SavedBy, SavedParameter, whole

__all__ = ["block_means", "blocks_of_shapes", "blocks_of_signature", "elements", "second_moment"]


def block_means(blocks: Blocks, values: Tensor, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """Means of values over blocks; for a factored second moment, over rows and over columns.

    Args:
        blocks: The blocks of the tensor.
        values: One value for each element, in the tensor's shape.
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
    """A float64 value for each element, from one tensor for each of `blocks.state_shapes`; may be an expanded view."""
    return blocks.second_moment(*(moment.to(torch.float64) for moment in moments)).expand(blocks.shape)


def blocks_of_signature(signature: str, shape: Sequence[int]) -> Blocks:
    """The blocks with a signature (`Blocks.signature`), of a tensor of `shape`.

    Raises:
        ValueError: No signature, or one that does not fit the shape.
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
    """The blocks of a state that names none, if its shapes are unambiguous: a value an element, a row or a tensor."""
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
    """Sums along the axis of the blocks, one for each segment, over all its repeats."""
    axis = blocks.axis
    assert axis is not None
    folded = values.unflatten(axis, (blocks.repeats, -1))
    parts = folded.split([segment.length for segment in blocks.segments], axis + 1)
    return torch.cat([part.sum((axis, axis + 1)).unsqueeze(axis) for part in parts], axis)


def second_moment(
    source: SavedBy, saved: SavedParameter, name: str, blocks: Blocks, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The second moments of one parameter in its new blocks; at most one tensor of its size is expanded.

    Args:
        source: What saved the state.
        saved: The saved parameter.
        name: Its name, for messages.
        blocks: Its new blocks.
        dtype: Dtype of the result.

    Returns:
        One tensor for each of `blocks.state_shapes`.

    Raises:
        ValueError: The state is incomplete, or does not say which blocks the parameter had.
    """
    if source is SavedBy.PACKAGE:
        values = _of_package(saved, name).reshape(blocks.shape)
    else:
        kept = {key: whole(value) for key, value in saved.state.items() if key.startswith("exp_avg_sq")}
        if not kept:
            raise ValueError(f"the optimizer state of {name!r} has no exp_avg_sq: it is incomplete")
        old = _saved_blocks(source, saved, name, kept, blocks.shape)
        if old == blocks:
            return {key: kept[key].to(dtype) for key in blocks.state_shapes}
        values = elements(old, [kept[key] for key in old.state_shapes])
    means = block_means(blocks, values, dtype=dtype)
    return {key: mean.contiguous() for key, mean in means.items()}


def _saved_blocks(
    source: SavedBy, saved: SavedParameter, name: str, kept: dict[str, Tensor], shape: tuple[int, ...]
) -> Blocks:
    """The blocks of a saved second moment.

    Raises:
        ValueError: Its shapes do not fit the partition that the state names, or it names none and they are ambiguous.
    """
    shapes = {key: tuple(value.shape) for key, value in kept.items()}
    by_element = Blocks.element(shape)
    if shapes == by_element.state_shapes:  # AdamW's; or FSDP1's, which expands all states to the parameter's shape
        return by_element
    if source is SavedBy.ADAMW:
        raise ValueError(f"the saved exp_avg_sq of {name!r} has shape {shapes['exp_avg_sq']}, its parameter {shape}")
    if saved.signature is None:
        blocks = blocks_of_shapes(kept, shape)
        if blocks is None:
            raise ValueError(
                f"the optimizer state of {name!r} does not name its blocks, and its shapes {shapes} for a parameter of "
                f"shape {shape} are ambiguous; load it into an AdamMini with its own partition, and save it again"
            )
        return blocks
    try:
        blocks = blocks_of_signature(saved.signature, shape)
    except ValueError as error:
        raise ValueError(
            f"the saved blocks of {name!r}, {saved.signature!r}, do not fit its shape {shape}: {error}"
        ) from error
    if shapes != blocks.state_shapes:
        raise ValueError(
            f"the saved second moment of {name!r} has the shapes {shapes}, but its blocks {saved.signature!r} of a "
            f"parameter of shape {shape} need {blocks.state_shapes}"
        )
    return blocks


def _of_package(saved: SavedParameter, name: str) -> Tensor:
    """The package's second moment, one value for each element of the flattened parameter."""
    if "v" in saved.state:
        return whole(saved.state["v"])
    if "vmean" not in saved.state:
        raise ValueError(f"the optimizer state of {name!r} has no vmean: it is incomplete")
    # One value a head (dim * dim / n_heads consecutive elements), a row or the tensor: each broadcasts against `m`.
    return whole(saved.state["vmean"]).to(torch.float64).expand(whole(saved.state["m"]).shape)
