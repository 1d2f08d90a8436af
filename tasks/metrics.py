"""Metrics that add up over batches and ranks, in a precision of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["ExactMetric", "MeanLoss"]


class ExactMetric(Metric):
    """A metric whose states keep their dtype where a trainer converts the whole task (`bf16-true`, `16-true`).

    A sum in bfloat16 stops growing after a few hundred equal batches, and one in float16 overflows.
    """

    full_state_update = False

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:
        return super()._apply(lambda tensor: fn(tensor).to(tensor.dtype), exclude_state)


class MeanLoss(ExactMetric):
    """Sum of losses over their number, over all batches of all ranks; not a number where there were none.

    A loss that is not a number shows, which torchmetrics' own mean would leave out.
    """

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: Tensor | int) -> None:
        """Add a batch.

        Args:
            total: Sum of its losses.
            count: How many there are; 0 for a batch of padding.
        """
        self.total += total.to(self.total.dtype)
        self.count += count

    def compute(self) -> Tensor:
        """The mean, float32."""
        return self.total / self.count
