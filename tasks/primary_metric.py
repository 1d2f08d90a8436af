"""The figure that runs of a task are compared by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["PrimaryMetric"]


@dataclass(frozen=True, kw_only=True)
class PrimaryMetric:
    """What a comparison of runs, and the choice of the best checkpoint, look at.

    Args:
        metric: Name of the figure that a run ends with, as it is logged.
        mode: Whether a small or a large one is good.
        label: The figure in words, with its unit.
        validated: Metric of each validation, drawn over the steps; the best checkpoint has its best. `metric` where it
            is not given.
        validated_label: The same in words.
        selected_by: Metric whose last value chooses hyperparameters, where `metric` is a test figure, which must not.
    """

    metric: str = "val_loss"
    mode: Literal["min", "max"] = "min"
    label: str = "validation loss"
    validated: str | None = None
    validated_label: str | None = None
    selected_by: str | None = None

    @property
    def curve(self) -> str:
        """The metric of each validation."""
        return self.validated or self.metric

    @property
    def curve_label(self) -> str:
        """The metric of each validation, in words."""
        return self.validated_label or self.label

    @property
    def selection(self) -> str:
        """The metric that chooses hyperparameters, good in the same direction."""
        return self.selected_by or self.metric
