"""Real optimizers on a quadratic, whose second moments follow the gradients: `AdamMini` and torch's AdamW."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adam_mini import AdamMini
from lightning_adam_mini.schedule import Schedule

from .quadratics import BlockQuadratic

__all__ = ["ADAMW", "ADAM_MINI", "train_at_best_rate"]

ADAM_MINI, ADAMW = "AdamMini", "torch AdamW"


def train_at_best_rate(
    problem: BlockQuadratic, rates: Sequence[float], betas: tuple[float, float], iterations: int
) -> dict[str, tuple[float, Tensor]]:
    """For each optimizer, the learning rate of the least final loss and the losses with it, `(iterations + 1,)`.

    Args:
        problem: The quadratic; each of its blocks is a parameter.
        rates: Peaks of a cosine to 0 that both optimizers try.
        betas: Of both.
        iterations: Steps.
    """
    found = {}
    for method in (ADAM_MINI, ADAMW):
        tried = {rate: _train(method, problem, rate, betas, iterations) for rate in rates}
        best = min(tried, key=lambda rate: float(tried[rate][-1]))
        found[method] = best, tried[best]
    return found


def _train(method: str, problem: BlockQuadratic, rate: float, betas: tuple[float, float], iterations: int) -> Tensor:
    """The loss before the first step and after each, infinite where it is not finite."""
    module = nn.ParameterList(problem.start.clone().split(problem.sizes))
    optimizer: Optimizer
    if method == ADAM_MINI:
        optimizer = AdamMini(module, lr=rate, betas=betas, weight_decay=0.0, partition="default")
    else:
        optimizer = torch.optim.AdamW(module.parameters(), lr=rate, betas=betas, weight_decay=0.0)
    scheduler = Schedule(shape="cosine", warmup=0, floor=0.0).build(optimizer, iterations)
    parts = [block.hessian for block in problem.blocks()]
    losses = []
    for step in range(iterations + 1):
        with torch.no_grad():
            for parameter, hessian in zip(module, parts, strict=True):
                parameter.grad = hessian @ parameter
            losses.append(sum((p @ p.grad for p in module), torch.zeros(())) / 2)
        if step < iterations:
            optimizer.step()
            scheduler.step()
    return torch.stack(losses).nan_to_num(nan=torch.inf, posinf=torch.inf)
