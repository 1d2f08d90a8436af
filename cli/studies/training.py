"""One short training: fixed batches, a cosine schedule, and an error where the loss is no longer finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adam_mini.schedule import Schedule

__all__ = ["DivergedError", "Training", "best_rate", "train"]

SCHEDULE = Schedule(shape="cosine", warmup=0.05, floor=0.0)


class DivergedError(ValueError):
    """Training that ended since the loss or a weight is not finite."""


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
) -> None:
    """Train in place.

    Args:
        model: The network.
        optimizers: At their peak learning rates; each has parameters of its own.
        loss_of: The loss of the batch of a step.
        training: Length and clipping.
        observe: Called with the number of steps taken, at first 0.

    Raises:
        DivergedError: The loss of a step, or a weight after the last one, is not finite.
    """
    schedulers = [SCHEDULE.build(optimizer, training.steps) for optimizer in optimizers]
    for step in range(training.steps):
        if observe is not None:
            observe(step)
        model.zero_grad(set_to_none=True)
        loss = loss_of(step)
        if not math.isfinite(value := float(loss.detach())):
            raise DivergedError(f"training diverges: the loss after {step} steps is {value}; set a smaller rate")
        loss.backward()
        if training.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        raise DivergedError(
            f"training diverges: a weight after {training.steps} steps is not finite; set a smaller rate"
        )
    if observe is not None:
        observe(training.steps)


def best_rate(figures: dict[float, float], *, larger_is_better: bool = False) -> tuple[float, bool]:
    """The learning rate of the best figure, and whether it lies within the rates tried and not at their end.

    Args:
        figures: A finite figure for each rate, that of chance where training diverged.
        larger_is_better: As of an accuracy.
    """
    best = (max if larger_is_better else min)(figures, key=figures.__getitem__)
    return best, min(figures) < best < max(figures)
