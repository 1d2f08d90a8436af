"""Learning-rate schedules: linear warm-up, then a shape that ends at a floor.

A schedule is a function of the step and the horizon, without state of its own. So a resumed run continues it exactly,
and a run that is resumed with a longer horizon follows the longer schedule from its step on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["Schedule"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate over a run, as a fraction of the peak.

    Args:
        shape: After the warm-up, `cosine` and `linear` fall to the floor at the horizon; `wsd` (warm-up, stable, decay)
            stays at the peak and falls linearly to the floor over the last `decay` steps; `constant` stays at the peak.
        warmup: Steps of linear warm-up; below 1, a fraction of the horizon. The first step already learns: step `s` of
            `w` has `(s + 1) / (w + 1)` of the peak.
        floor: Final learning rate as a fraction of the peak.
        decay: Steps of the final decay of `wsd`; below 1, a fraction of the horizon.
        horizon: Steps of the schedule; None for the length of the run. Later steps stay at the floor.

    Raises:
        ValueError: An option is out of range.
    """

    shape: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup: int | float = 0.01
    floor: float = 0.1
    decay: int | float = 0.2
    horizon: int | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        if self.warmup < 0 or self.decay < 0:
            raise ValueError(f"warmup and decay must not be negative, not {self.warmup} and {self.decay}")
        if not 0.0 <= self.floor <= 1.0:
            raise ValueError(f"floor is a fraction of the peak learning rate in [0, 1], not {self.floor}")
        if self.horizon is not None and self.horizon < 1:
            raise ValueError(f"horizon must be at least one step, not {self.horizon}")

    def scale(self, step: int, total: int) -> float:
        """The learning rate of a step as a fraction of the peak.

        Args:
            step: Number of steps before it, from 0.
            total: Steps of the whole run; the horizon unless `horizon` is set.
        """
        horizon = self.horizon or total
        warmup = _num_steps(self.warmup, horizon)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.shape == "constant":
            return 1.0
        start = horizon - _num_steps(self.decay, horizon) if self.shape == "wsd" else warmup
        progress = min(max((step - start) / max(horizon - start, 1), 0.0), 1.0)
        fall = 0.5 * (1 + math.cos(math.pi * progress)) if self.shape == "cosine" else 1 - progress
        return self.floor + (1 - self.floor) * fall

    def build(self, optimizer: Optimizer, total: int) -> LambdaLR:
        """A scheduler to step once per optimizer step.

        Args:
            optimizer: The optimizer, at its peak learning rate.
            total: Steps of the whole run.
        """
        return _ResumableLR(optimizer, lambda step: self.scale(step, total))


class _ResumableLR(LambdaLR):
    """LambdaLR that loads the step and sets the learning rate that the present schedule has there.

    LambdaLR itself keeps the saved learning rate until after the next step.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        scaled = zip(self.base_lrs, self.lr_lambdas, strict=True)
        self._last_lr = [base * scale(self.last_epoch) for base, scale in scaled]
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr


def _num_steps(value: int | float, horizon: int) -> int:
    """A number of steps, given as such or as a fraction of the horizon below 1."""
    return round(value * horizon) if value < 1 else int(value)
