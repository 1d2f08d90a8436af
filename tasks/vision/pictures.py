"""Pictures of a classifier: its accuracy over training, and which classes it takes for which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..plots import draw_curves, save_figure

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["draw_accuracy", "draw_confusion"]


def draw_accuracy(metrics: dict[str, dict[int, float]], path: Path) -> None:
    """Top-1 and top-5 validation accuracy in percent by optimizer step, as PNG.

    Args:
        metrics: Name to step to value.
        path: The file.
    """
    style = {"marker": "o", "markersize": 4}
    curves = [("val_top1", "top-1", style), ("val_top5", "top-5", style)]
    draw_curves(path, metrics, curves, ylabel="validation accuracy, %", scale=100)


def draw_confusion(confusion: Tensor, class_names: Sequence[str], path: Path) -> None:
    """A confusion matrix in percent of each true class, as PNG.

    Args:
        confusion: Counts `(classes, classes)`, true class by predicted class.
        class_names: Names of the classes.
        path: The file.
    """
    from matplotlib.figure import Figure

    number = len(confusion)
    share = (100 * confusion.double() / confusion.sum(dim=1, keepdim=True).clamp(min=1)).tolist()
    side = max(4.0, 2.0 + 0.42 * number)
    figure = Figure(figsize=(side, side), layout="constrained")
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
