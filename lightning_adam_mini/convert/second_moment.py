"""The second moment of one parameter, as whoever saved it kept it, in other blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_adam_mini.blocks import Blocks
from lightning_adam_mini.convert.moments import block_means, blocks_of_shapes, blocks_of_signature, elements
from lightning_adam_mini.convert.saved import SavedBy, SavedParameter, whole

__all__ = ["second_moment"]


def second_moment(
    source: SavedBy, saved: SavedParameter, name: str, blocks: Blocks, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The second moments of one parameter in its new blocks; no more than it is expanded at a time.

    Args:
        source: What wrote the state.
        saved: The saved parameter.
        name: Its name, for messages.
        blocks: How it is to be cut.
        dtype: Dtype of the result.

    Returns:
        One tensor for each of `blocks.state_shapes`.

    Raises:
        ValueError: The state is not complete, or does not tell how the parameter was cut.
    """
    if source is SavedBy.PACKAGE:
        values = _of_package(saved, name).reshape(blocks.shape)
    else:
        kept = {key: whole(value) for key, value in saved.state.items() if key.startswith("exp_avg_sq")}
        if not kept:
            raise ValueError(f"the optimizer state of {name!r} has no exp_avg_sq: it is not complete")
        old = _saved_blocks(source, saved, name, kept, blocks.shape)
        if old == blocks:
            return {key: kept[key].to(dtype) for key in blocks.state_shapes}
        values = elements(old, [kept[key] for key in old.state_shapes])
    means = block_means(blocks, values, dtype=dtype)
    return {key: mean.contiguous() for key, mean in means.items()}


def _saved_blocks(
    source: SavedBy, saved: SavedParameter, name: str, kept: dict[str, Tensor], shape: tuple[int, ...]
) -> Blocks:
    """How a saved second moment is cut.

    Raises:
        ValueError: Its shapes are not those of the partition that the state names, or it names none.
    """
    shapes = {key: tuple(value.shape) for key, value in kept.items()}
    by_element = Blocks.element(shape)
    if shapes == by_element.state_shapes:  # AdamW's; or of FSDP1, which saves what has the parameter's shape alone
        return by_element
    if source is SavedBy.ADAMW:
        raise ValueError(f"the saved exp_avg_sq of {name!r} has shape {shapes['exp_avg_sq']}, its parameter {shape}")
    if saved.signature is None:
        blocks = blocks_of_shapes(kept, shape)
        if blocks is None:
            raise ValueError(
                f"the optimizer state of {name!r} does not say how it is cut, and its shapes {shapes} for a parameter "
                f"of shape {shape} do not tell; load it into an AdamMini with its own partition, and save it again"
            )
        return blocks
    try:
        blocks = blocks_of_signature(saved.signature, shape)
    except ValueError as error:
        raise ValueError(
            f"the saved cut of {name!r}, {saved.signature!r}, does not fit its shape {shape}: {error}"
        ) from error
    if shapes != blocks.state_shapes:
        raise ValueError(
            f"the saved second moment of {name!r} has the shapes {shapes}, but its cut {saved.signature!r} of a "
            f"parameter of shape {shape} has {blocks.state_shapes}"
        )
    return blocks


def _of_package(saved: SavedParameter, name: str) -> Tensor:
    """The package's second moment, a value an element in the order of the flattened parameter."""
    if "v" in saved.state:
        return whole(saved.state["v"])
    if "vmean" not in saved.state:
        raise ValueError(f"the optimizer state of {name!r} has no vmean: it is not complete")
    # Heads of dim * dim / n_heads consecutive elements, rows, or the whole tensor: each broadcasts against `m`.
    return whole(saved.state["vmean"]).to(torch.float64).expand(whole(saved.state["m"]).shape)
