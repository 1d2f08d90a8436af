"""Principal blocks of a Hessian: a parameter, or the elements of one that a head, a row or an expert owns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_adam_mini.blocks import Blocks

__all__ = ["ParameterBlock", "block_of", "blocks_of", "parameter_blocks"]


@dataclass(frozen=True, eq=False)
class ParameterBlock:
    """A principal block of the Hessian: the rows and columns that belong to elements of one parameter.

    Args:
        name: Name of the block, unique among those that are used together.
        parameter: Name of the parameter, as in `named_parameters()` of the model without wrappers such as DDP.
        index: Positions of the elements in the flattened parameter, an int64 tensor `(b,)` without repeats; None for
            all of them in order.

    Raises:
        ValueError: `index` is not a one-dimensional int64 tensor, is empty, or names an element twice.
    """

    name: str
    parameter: str
    index: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the index; whether it fits the parameter is checked where the parameter is known."""
        if self.index is None:
            return
        if self.index.dtype is not torch.int64 or self.index.dim() != 1 or not self.index.numel():
            raise ValueError(f"{self.name}: index must be a non-empty int64 tensor (b,) of flat positions")
        if self.index.unique().numel() != self.index.numel():
            raise ValueError(f"{self.name}: index names an element twice; a principal block has each element once")

    def size(self, parameter: Tensor) -> int:
        """Number of rows of the block, from its whole parameter."""
        return parameter.numel() if self.index is None else self.index.numel()


def parameter_blocks(model: nn.Module) -> list[ParameterBlock]:
    """A block for each parameter that takes a gradient; tied parameters are one, under their first name."""
    return [ParameterBlock(name, name) for name, tensor in model.named_parameters() if tensor.requires_grad]


def block_of(parameter: str, blocks: Blocks, number: int, *, name: str | None = None) -> ParameterBlock:
    """Block `number` of a parameter that is cut by a `Blocks`.

    Args:
        parameter: Name of the parameter.
        blocks: How it is cut.
        number: In the order of the flattened `exp_avg_sq`, as `Blocks.block_index` counts.
        name: Of the block; `parameter[number]` by default.

    Raises:
        ValueError: The cut has no such block, or is a factored second moment, which has none.
    """
    index = blocks.block_index()
    if not 0 <= number < blocks.num_values:
        raise ValueError(f"{parameter} has blocks 0 to {blocks.num_values - 1}: there is no block {number}")
    positions = (index == number).flatten().nonzero().squeeze(1)
    return ParameterBlock(name or f"{parameter}[{number}]", parameter, positions)


def blocks_of(parameter: str, blocks: Blocks) -> Iterator[ParameterBlock]:
    """All blocks of a parameter that is cut by a `Blocks`, named `parameter[0]`, `parameter[1]`, ..."""
    numbers = blocks.block_index().flatten()
    order = numbers.argsort(stable=True)
    counts = numbers.bincount(minlength=blocks.num_values)
    for number, positions in enumerate(order.split(counts.tolist())):
        yield ParameterBlock(f"{parameter}[{number}]", parameter, positions)
