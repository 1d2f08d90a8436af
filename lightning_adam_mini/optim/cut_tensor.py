"""A parameter with all that a step needs of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_adam_mini.blocks import Blocks, Kind
from lightning_adam_mini.optim.shards import Shard
from lightning_adam_mini.optim.stochastic_rounding import Rounding

__all__ = ["CutTensor"]


@dataclass
class CutTensor:
    """A parameter, or this rank's part of it, with its gradient, its blocks and its state.

    Args:
        param: The parameter.
        grad: Its gradient, of the same shape; None where this rank has none.
        shard: How it is cut; for a whole parameter, `Shard(blocks)`.
        step: Steps taken, a float32 tensor without dimensions.
        exp_avg: First moment, of the parameter's shape; codes where there are scales.
        moments: Second moments, one tensor for each of the state shapes of `shard.frame`.
        exact: Sum squares themselves, as `Blocks.square_sums` says, and not squared norms.
        square_sums: Sums of squares of the gradient over all ranks, where blocks are split between ranks.
        exp_avg_scale: Scales of a first moment in 8 bits, as `momentum_8bit` says.
        rounding: The random bits of what is stored in bfloat16; None where it is rounded to nearest.
    """

    param: Tensor
    grad: Tensor | None
    shard: Shard
    step: Tensor
    exp_avg: Tensor
    moments: tuple[Tensor, ...]
    exact: bool = False
    square_sums: tuple[Tensor, ...] | None = None
    exp_avg_scale: Tensor | None = None
    rounding: Rounding | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the state is numbers that tensor operations update in place; else the update goes through slices."""
        return self.exp_avg_scale is None and self.rounding is None

    @property
    def blocks(self) -> Blocks:
        """How the part is cut that the second moments of this rank belong to."""
        return self.shard.frame

    @property
    def is_whole(self) -> bool:
        """Whether the second moments, once expanded, broadcast against the parameter as it is."""
        return self.shard.boxes is None

    def local_square_sums(self) -> tuple[Tensor, ...]:
        """Sums of squares over this rank's part, in the dtype of the second moments."""
        if self.grad is None:
            return tuple(torch.zeros_like(moment) for moment in self.moments)
        return self.shard.square_sums(self.grad, dtype=self.moments[0].dtype, exact=self.exact)

    def mean_square(self) -> tuple[Tensor, ...]:
        """Means of the squares of the gradient over the blocks, whole on this rank or not."""
        return self.blocks.means(*(self.square_sums or self.local_square_sums()))

    def pieces(self, scale: float | Tensor, eps: float) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Pieces of the parameter and of its first moment with their denominators `root / scale + eps`."""
        if self.is_whole or self.blocks.kind is not Kind.ROW_COLUMN:
            denom = self.blocks.root_second_moment(*self.moments).div_(scale).add_(eps)
            yield from self.split(denom)
            return
        for box, root in self.shard.rank_one_roots(self.moments):
            yield box.view(self.param), box.view(self.exp_avg), root.div_(scale).add_(eps)

    def split(self, denom: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Pieces of the parameter and of its first moment with what broadcasts against them of `denom`."""
        if self.shard.boxes is None:
            yield self.param, self.exp_avg, denom
            return
        for box in self.shard.boxes:
            yield box.view(self.param), box.view(self.exp_avg), box.within(denom)
