"""How far squared gradients lie apart within the blocks that share a second moment.

AdamMini replaces each squared gradient of a block by the block's mean. That costs nothing where they are alike, so the
variance of `ln g^2` within blocks, beside that over the whole parameter, tells what a cut leaves out. Pure noise has a
spread of its own: the logarithm of one squared normal number has the variance pi^2 / 2 = 4.93, and that of the mean of
k of them about 2 / k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_adam_mini.blocks import Blocks, Kind

__all__ = ["NUM_SUMS", "Spread", "mean_square_gradients", "spread_from", "spread_sums"]

NUM_SUMS = 6


@dataclass(frozen=True)
class Spread:
    """Variances of `ln g^2`, of elements whose gradient is not zero.

    Args:
        within: Variance within blocks: their squared deviations over elements less blocks. NaN where all blocks have
            one element.
        total: Variance over the parameter.
        zeros: Part of the elements whose gradient is zero, which have no logarithm.
    """

    within: float
    total: float
    zeros: float

    @property
    def explained(self) -> float:
        """Part of the variance that blocks explain; 0 on average where blocks mean nothing, and 1 at most."""
        return 1 - self.within / self.total if self.total > 0 else math.nan


def spread_sums(blocks: Blocks, squares: Tensor) -> Tensor:
    """What the spread is computed from, `(6,)` in float64 on the gradient's device: nothing waits for it.

    Sums of several parameters add up to the spread within the blocks of all, each around its own mean.

    Args:
        blocks: How the parameter is cut.
        squares: Squared gradients of the parameter's shape, or means of them over batches.

    Raises:
        ValueError: A factored second moment, which has no blocks.
    """
    if blocks.kind is Kind.FACTORED:
        raise ValueError("a factored cut has no blocks whose squared gradients share a mean: leave it out")
    values = squares.detach()
    counted = values > 0
    logs = torch.where(counted, values, 1).to(torch.float32).log_()
    num = counted.sum(dtype=torch.float64)
    centred = torch.where(counted, logs - logs.sum(dtype=torch.float64).div(num.clamp(min=1)).to(logs.dtype), 0)
    over_all = centred.square().sum(dtype=torch.float64)
    if blocks.kind is Kind.ELEMENT:
        used, within = num, torch.zeros_like(num)
    else:
        sums, counts = (blocks.block_sums(blocks.row_sums(part, dtype=torch.float64)) for part in (centred, counted))
        used = (counts > 0).sum(dtype=torch.float64)
        within = over_all - (sums.square() / counts.clamp(min=1)).sum()
    elements = torch.full_like(num, values.numel())
    return torch.stack([within, num - used, over_all, (num - 1).clamp(min=0), elements - num, elements])


def spread_from(sums: Tensor) -> Spread:
    """The spread from `spread_sums` of one parameter, or from the sum of those of several; it waits for the device."""
    within, within_freedom, total, total_freedom, zeros, elements = sums.tolist()
    return Spread(_ratio(within, within_freedom), _ratio(total, total_freedom), _ratio(zeros, elements))


def mean_square_gradients(
    model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batches: Iterable[Any]
) -> dict[str, Tensor]:
    """Means over batches of the squared gradients, by parameter; the model keeps its own gradients.

    Args:
        model: In eval mode.
        loss_fn: Takes the model and a batch, returns a scalar.
        batches: At least one.

    Raises:
        ValueError: No batch.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = {name: torch.zeros_like(p, dtype=torch.float64, requires_grad=False) for name, p in parameters.items()}
    count = 0
    for batch in batches:
        count += 1
        with torch.enable_grad():
            loss = loss_fn(model, batch)
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
            found.setdefault(name, torch.zeros_like(parameter, dtype=torch.float64)).addcmul_(
                grad.double(), grad.double()
            )
    if not count:
        raise ValueError("batches is empty: give at least one batch")
    return {name: total.div_(count) for name, total in found.items()}


def _ratio(value: float, freedom: float) -> float:
    return value / freedom if freedom > 0 else math.nan
