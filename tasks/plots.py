"""Plots of a run, as PNG files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .atomic_files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_curves", "save_figure"]


def draw_curves(
    path: Path,
    metrics: dict[str, dict[int, float]],
    curves: Iterable[tuple[str, str, dict[str, Any]]],
    *,
    ylabel: str,
    scale: float = 1.0,
) -> None:
    """Draw metrics over optimizer steps; metrics that were not logged are left out.

    Args:
        path: The file.
        metrics: Values by step, by name.
        curves: Name, label and matplotlib's options of each line.
        ylabel: What the values are, with their unit.
        scale: Factor of the values: 100 for percent.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, label, style in curves:
        if values := metrics.get(name):
            axes.plot(list(values), [scale * value for value in values.values()], label=label, **style)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Save a figure of matplotlib, replacing an older file."""
    with replacing(path) as new:
        figure.savefig(new, dpi=120, format="png")
