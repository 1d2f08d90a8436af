"""Memory, measured beside predicted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .style import Drawing, draw
from .theme import sentinel, series_style
from .wording import BYTE_UNITS, plain, shorten, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..comparison import TaskComparison

__all__ = ["peak_chart", "state_chart"]


@dataclass(frozen=True)
class Bar:
    """One optimizer: bytes measured and bytes predicted, each None where it is not known."""

    label: str
    series: int
    measured: float | None
    predicted: float | None


def state_chart(task: TaskComparison, name: str) -> Drawing | None:
    """The optimizer's state at the best learning rate, as measured and as the shapes predict it."""
    bars = [
        Bar(entry.optimizer, series, entry.costs.optimizer_state_bytes, entry.costs.predicted_state_bytes)
        for series, entry in enumerate(task.entries)
    ]
    caption = "Filled: measured in the run. Outlined: predicted from the shapes before training."
    return _chart(bars, name, title="Optimizer state", caption=caption)


def peak_chart(task: TaskComparison, name: str) -> Drawing | None:
    """Peak memory, beside the part of it that is known beforehand."""
    bars = [
        Bar(entry.optimizer, series, entry.costs.peak_memory_bytes, entry.costs.predicted_memory_bytes)
        for series, entry in enumerate(task.entries)
    ]
    caption = (
        "Filled: measured in the run. Outlined: parameters, gradients and optimizer state as predicted; activations, "
        "libraries and data are not in it."
    )
    return _chart(bars, name, title="Peak memory", caption=caption)


def _chart(bars: Sequence[Bar], name: str, *, title: str, caption: str) -> Drawing | None:
    known = [value for bar in bars for value in (bar.measured, bar.predicted) if _is_known(value)]
    if not known:
        return None
    largest = max(value for value in known if value is not None)
    scale, unit = next(((scale, unit) for scale, unit in BYTE_UNITS if largest >= scale), (1.0, "B"))

    def paint(axes: Axes) -> None:
        for place, bar in enumerate(bars):
            _paint_bar(axes, -place, bar, scale)
        axes.set_yticks([-place for place in range(len(bars))], [shorten(bar.label, 18) for bar in bars])
        axes.set_ylim(-len(bars) + 0.4, 0.6)
        axes.set_xlim(0, 1.24 * largest / scale)  # room for the figure behind the longest bar
        axes.set_xlabel(unit)
        axes.tick_params(axis="y", length=0, labelcolor=sentinel("ink"))
        axes.grid(visible=False, axis="y")
        axes.locator_params(axis="x", nbins=5)

    words = f"{title}. " + " ".join(map(_in_words, bars))
    return draw(name, title=title, caption=caption, words=words, paint=paint, height=0.9 + 0.46 * len(bars))


def _paint_bar(axes: Axes, place: float, bar: Bar, scale: float) -> None:
    colour = sentinel(series_style(bar.series).variable)
    for value, offset, face in ((bar.measured, 0.19, colour), (bar.predicted, -0.19, "none")):
        if value is None or not math.isfinite(value):
            continue
        (drawn,) = axes.barh(
            [place + offset], [value / scale], height=0.3, linewidth=1.2, facecolor=face, edgecolor=colour
        )
        axes.annotate(
            size(value),
            (drawn.get_width(), place + offset),
            xytext=(3, 0),
            textcoords="offset points",
            va="center_baseline",
            fontsize=9.8,
        )


def _in_words(bar: Bar) -> str:
    measured, predicted = (
        f"{size(value)} {word}" if _is_known(value) else f"not {word}"
        for value, word in ((bar.measured, "measured"), (bar.predicted, "predicted"))
    )
    return f"{plain(bar.label)}: {measured}, {predicted}."


def _is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
