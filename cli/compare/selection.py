"""The best learning rates, which the final runs and the report share."""

from __future__ import annotations

from pathlib import Path

from .grid import Grid, Run
from .results import selection_value, task_primary_metric
from .stats import best_of, estimate

__all__ = ["best_learning_rates"]


def best_learning_rates(grid: Grid, out: Path) -> dict[tuple[str, str], float]:
    """The best learning rate of each recipe and label on the tuning seeds; none where no run came to its end.

    The figure that chooses is one of validation, also where the primary metric is one of a test.

    Args:
        grid: The grid.
        out: Folder of the comparison.
    """
    best = {}
    for (recipe, label), lrs in grid.lrs.items():
        folders = {
            lr: [out / grid.folder(Run(recipe, label, lr, seed)) for seed in grid.plan.tuning_seeds] for lr in lrs
        }
        tuning = {lr: estimate(_known(own)) for lr, own in folders.items()}
        mode = task_primary_metric(folder for own in folders.values() for folder in own).mode
        if (chosen := best_of(tuning, mode)) is not None:
            best[recipe, label] = chosen
    return best


def _known(folders: list[Path]) -> list[float]:
    return [value for folder in folders if (value := selection_value(folder)) is not None]
