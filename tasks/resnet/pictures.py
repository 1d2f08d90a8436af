"""Pictures of a classifier: its accuracy over training, and which classes it takes for which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..run_files import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

__all__ = ["draw_accuracy", "draw_confusion"]


def draw_accuracy(metrics: dict[str, dict[int, float]], path: Path) -> None:
    """Top-1 and top-5 validation accuracy in percent by optimizer step, as PNG.

    Args:
        metrics: Name to step to value.
        path: The file.
    """
    figure = _figure(7, 4.2)
    axes = figure.subplots()
    for name, label in (("val_top1", "top-1"), ("val_top5", "top-5")):
        if values := metrics.get(name):
            axes.plot(list(values), [100 * value for value in values.values()], marker="o", markersize=4, label=label)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("validation accuracy, %")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    save_figure(figure, path)


def draw_confusion(confusion: Tensor, class_names: Sequence[str], path: Path) -> None:
    """A confusion matrix in percent of each true class, as PNG.

    Args:
        confusion: Counts `(classes, classes)`, true class by predicted class.
        class_names: Names of the classes.
        path: The file.
    """
    number = len(confusion)
    share = (100 * confusion.double() / confusion.sum(dim=1, keepdim=True).clamp(min=1)).tolist()
    side = max(4.0, 2.0 + 0.42 * number)
    figure = _figure(side, side)
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(number), class_names, rotation=90)
    axes.set_yticks(range(number), class_names)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title("% of the true class")
    if number <= 20:
        for row, values in enumerate(share):
            for column, value in enumerate(values):
                if value >= 0.05:
                    color = "white" if value > 50 else "black"
                    axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=7, color=color)
    save_figure(figure, path)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
