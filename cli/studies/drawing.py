"""What pictures of studies share: medians with the range of seeds, and heat maps with numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["heat_map", "lines_with_range"]


def lines_with_range(
    axes: Axes,
    series: Sequence[Sequence[float]],
    label: str,
    *,
    at: Sequence[float] | None = None,
    band: bool = True,
    **style: Any,
) -> None:
    """The median of several runs as a line, and from the least to the largest as a band.

    Args:
        axes: Where.
        series: One run each, of equal length.
        label: In the legend.
        at: Positions; 0, 1, ... by default.
        band: Whether to draw the range.
        style: Of the line.
    """
    columns = [
        [value for value in column if math.isfinite(value)] or [math.nan] for column in zip(*series, strict=True)
    ]
    places = list(at) if at is not None else list(range(len(columns)))
    (line,) = axes.plot(places, [statistics.median(column) for column in columns], label=label, **style)
    if band:
        axes.fill_between(
            places, [min(c) for c in columns], [max(c) for c in columns], color=line.get_color(), alpha=0.2
        )


def heat_map(
    axes: Axes,
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    low: float,
    high: float,
) -> None:
    """Numbers as colours, each written in its cell.

    Args:
        axes: Where.
        values: Row by row.
        rows: Names of the rows.
        columns: Names of the columns.
        low: Value of the first colour.
        high: Value of the last colour.
    """
    axes.imshow(values, vmin=low, vmax=high, cmap="viridis_r", aspect="auto")
    for number, row in enumerate(values):
        for place, value in enumerate(row):
            color = "white" if value > (low + high) / 2 else "black"
            axes.text(place, number, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
