"""Sums over an evaluation, exact for any batches and ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..metrics import ExactMetric

__all__ = ["LARGEST_CONFUSION", "ClassificationSums"]

LARGEST_CONFUSION = 50
"""Above so many classes a confusion matrix is neither kept nor drawn."""


class ClassificationSums(ExactMetric):
    """Counts what a classifier gets right, over all batches of all ranks.

    Counts are whole numbers, so that no order of batches and no number of ranks changes an accuracy.

    Args:
        num_classes: Number of classes.
    """

    loss: Tensor
    count: Tensor
    top1: Tensor
    top5: Tensor
    confusion: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state("loss", torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")
        for name in ("count", "top1", "top5"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        size = num_classes if num_classes <= LARGEST_CONFUSION else 0
        self.add_state("confusion", torch.zeros(size, size, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            logits: `(B, num_classes)`; B may be 0.
            labels: `(B,)`, int64.
        """
        logits = logits.float()
        self.loss += F.cross_entropy(logits, labels, reduction="sum")
        self.count += len(labels)
        best = logits.topk(min(5, self.num_classes)).indices
        hits = best == labels[:, None]
        self.top1 += hits[:, 0].sum()
        self.top5 += hits.sum()
        if size := len(self.confusion):
            pairs = labels * size + best[:, 0]
            self.confusion += pairs.bincount(minlength=size**2).view(size, size)

    def compute(self) -> dict[str, Tensor]:
        """Means over all images: `loss` in nats, `top1`, and `top5` where there are more than five classes.

        Where there are few classes, also `confusion`: how often a class (row) was taken for another (column).
        """
        means = {"loss": self.loss / self.count, "top1": self.top1 / self.count}
        if self.num_classes > 5:
            means["top5"] = self.top5 / self.count
        if len(self.confusion):
            means["confusion"] = self.confusion
        return means
