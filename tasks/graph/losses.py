"""Losses of labelled nodes."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Loss", "node_losses"]

Loss = Literal["cross_entropy", "log_cross_entropy"]

_EPSILON = 1 - math.log(2)


def node_losses(logits: Tensor, labels: Tensor, loss: Loss) -> Tensor:
    r"""Loss of each node, `(n,)`.

    `log_cross_entropy` is :math:`\log(\epsilon + CE) - \log \epsilon` with :math:`\epsilon = 1 - \ln 2`: as the
    cross-entropy near 0, and slow where a label is far off, so that wrong labels pull less (Wang et al. 2021, "Bag of
    Tricks for Node Classification with Graph Neural Networks", arXiv 2103.13355, section 4).

    Args:
        logits: `(n, C)`.
        labels: `(n,)`.
        loss: Which one.
    """
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    return losses if loss == "cross_entropy" else torch.log(_EPSILON + losses) - math.log(_EPSILON)
