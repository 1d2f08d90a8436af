"""The figure that runs of a task are compared by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Headline"]


@dataclass(frozen=True, kw_only=True)
class Headline:
    """What a comparison of runs, and the choice of the best checkpoint, look at.

    Args:
        metric: Name of the figure that a run ends with, as it is logged.
        mode: Whether a small or a large one is good.
        label: The figure in words, with its unit.
        validated: Metric of each validation, drawn over the steps; the best checkpoint has its best. `metric` where it
            is not given.
    """

    metric: str = "val_loss"
    mode: Literal["min", "max"] = "min"
    label: str = "validation loss"
    validated: str | None = None

    @property
    def curve(self) -> str:
        """The metric of each validation."""
        return self.validated or self.metric
