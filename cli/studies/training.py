"""One short training: fixed batches, a cosine schedule, and an end where the loss is no longer finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adam_mini.schedule import Schedule

__all__ = ["Training", "best_rate", "train"]

SCHEDULE = Schedule(shape="cosine", warmup=0.05, floor=0.0)


@dataclass(frozen=True)
class Training:
    """What a training has in common with all others of a study.

    Args:
        steps: Optimizer steps, over which the learning rate falls to 0 after 5 % of warm-up.
        clip: Largest norm of a gradient; None for no clipping.
    """

    steps: int
    clip: float | None


def train(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    loss_of: Callable[[int], Tensor],
    training: Training,
    observe: Callable[[int], None] | None = None,
) -> bool:
    """Train in place.

    Args:
        model: The network.
        optimizers: At their peak learning rates; each has parameters of its own.
        loss_of: The loss of the batch of a step.
        training: Length and clipping.
        observe: Called with the number of steps taken, at first 0.

    Returns:
        Whether all losses were finite; training ends at the first that is not.
    """
    schedulers = [SCHEDULE.build(optimizer, training.steps) for optimizer in optimizers]
    for step in range(training.steps):
        if observe is not None:
            observe(step)
        model.zero_grad(set_to_none=True)
        loss = loss_of(step)
        if not math.isfinite(float(loss.detach())):
            return False
        loss.backward()
        if training.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
    if observe is not None:
        observe(training.steps)
    return all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def best_rate(figures: dict[float, float], *, larger_is_better: bool = False) -> tuple[float, bool]:
    """The learning rate of the best figure, and whether it lies within the rates tried and not at their end.

    Args:
        figures: A figure for each rate; what is not finite counts as the worst.
        larger_is_better: As of an accuracy.

    Raises:
        ValueError: No figure is finite.
    """
    finite = {rate: figure for rate, figure in figures.items() if math.isfinite(figure)}
    if not finite:
        raise ValueError(f"training diverges at every learning rate tried, from {min(figures):g} on: try smaller ones")
    best = (max if larger_is_better else min)(finite, key=finite.__getitem__)
    return best, min(figures) < best < max(figures)
