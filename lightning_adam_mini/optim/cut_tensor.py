"""A parameter with all that a step needs of it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lightning_adam_mini.blocks import Blocks

__all__ = ["CutTensor"]


class CutTensor(NamedTuple):
    """A parameter with its gradient, its blocks and its state.

    Args:
        param: The parameter.
        grad: Its gradient, of the same shape.
        blocks: How it is cut.
        step: Steps taken, a float32 tensor without dimensions.
        exp_avg: First moment, of the parameter's shape.
        moments: Second moments, one tensor for each of `blocks.state_shapes`.
    """

    param: Tensor
    grad: Tensor
    blocks: Blocks
    step: Tensor
    exp_avg: Tensor
    moments: tuple[Tensor, ...]
