"""Learning-rate schedules: warm-up, a shape, and a floor.

A schedule is a function of the step and the horizon. It keeps no state of its own, so a resumed run continues it
exactly, and a run that is resumed with a longer horizon follows the longer schedule from its step on.
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
    """Scale of the peak learning rate over a run.

    Args:
        shape: After the warm-up: `cosine` or `linear` to the floor at the horizon; `wsd` (warm-up, stable, decay) stays
            at the peak and falls linearly to the floor over the last `decay`; `constant` stays.
        warmup: Steps of linear warm-up, or below 1 a fraction of the horizon. The first step already learns: step `s`
            of `w` has `(s + 1) / (w + 1)` of the peak.
        floor: Final learning rate as a fraction of the peak.
        decay: Steps of the final decay of `wsd`, or below 1 a fraction of the horizon.
        horizon: Steps over which the schedule runs; None for the length of training. Beyond it, the floor holds.
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
        """Fraction of the peak learning rate in a step.

        Args:
            step: Steps taken before it, from 0.
            total: Steps of the whole run, where `horizon` does not say otherwise.
        """
        horizon = self.horizon or total
        warmup = _steps(self.warmup, horizon)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.shape == "constant":
            return 1.0
        start = horizon - _steps(self.decay, horizon) if self.shape == "wsd" else warmup
        progress = min(max((step - start) / max(horizon - start, 1), 0.0), 1.0)
        fall = 0.5 * (1 + math.cos(math.pi * progress)) if self.shape == "cosine" else 1 - progress
        return self.floor + (1 - self.floor) * fall

    def build(self, optimizer: Optimizer, total: int) -> LambdaLR:
        """A scheduler that is stepped once an optimizer step.

        Args:
            optimizer: The optimizer, at its peak learning rate.
            total: Steps of the whole run.
        """
        return _ResumableLR(optimizer, lambda step: self.scale(step, total))


class _ResumableLR(LambdaLR):
    """LambdaLR that takes the step from a state dict, and the learning rate from the schedule that it has now.

    LambdaLR itself leaves the optimizer with the learning rate that was saved until the next step is over.
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


def _steps(value: int | float, horizon: int) -> int:
    """A number of steps from steps, or from a fraction of the horizon below 1."""
    return round(value * horizon) if value < 1 else int(value)
