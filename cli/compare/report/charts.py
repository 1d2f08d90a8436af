"""Validation curves of each optimizer at its best learning rate: the mean over seeds, and how far they lie apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from .scales import focus, value_ticks
from .style import Drawing, draw
from .theme import sentinel, series_style
from .wording import count, duration, learning_rate, number, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..comparison import Entry, TaskComparison

__all__ = ["curves_chart"]

MARKERS_IN_A_LINE = 7


@dataclass(frozen=True)
class Curve:
    """What is drawn for one optimizer.

    Args:
        series: Its number, which gives colour and marker.
        entry: The optimizer.
        points: `(x, mean, lowest, highest)` of each validation, by growing x; finite.
        num_seeds: Runs that they are made of.
    """

    series: int
    entry: Entry
    points: tuple[tuple[float, float, float, float], ...]
    num_seeds: int


def curves_chart(task: TaskComparison, name: str, over: Literal["steps", "seconds"]) -> Drawing | None:
    """The curve of the primary metric against steps or training time; None where no run has one."""
    curves = [
        curve for series, entry in enumerate(task.entries) if (curve := _curve(series, entry, over=over)) is not None
    ]
    if not curves:
        return None
    label, mode = plain(task.primary_metric.curve_label), task.primary_metric.mode
    format_x: Callable[[float], str] = count if over == "steps" else duration
    # The first validations say how far the start lies off, not how the optimizers differ.
    limits = focus(
        (point[1] for curve in curves for point in curve.points[len(curve.points) // 5 :]), mode, target=task.target
    )

    def paint(axes: Axes) -> None:
        for curve in curves:
            _paint_curve(axes, curve)
        if task.target is not None and math.isfinite(task.target):
            axes.axhline(task.target, color=sentinel("muted"), linewidth=1.1, linestyle=(0, (1, 2)))
        axes.set_xlabel("optimizer steps" if over == "steps" else "training time, without validation")
        axes.set_ylabel(label)
        axes.set_ylim(*limits)
        value_ticks(axes, format_x, whole=over == "steps")

    name_of_figure = label.partition(",")[0]  # without its unit
    title = (
        f"{name_of_figure[:1].upper()}{name_of_figure[1:]} against {'steps' if over == 'steps' else 'training time'}"
    )
    words = f"{title}. " + " ".join(_in_words(curve, format_x, over) for curve in curves)
    caption = _caption(curves, task.target, limits)
    return draw(name, title=title, caption=caption, words=words, paint=paint)


def _curve(series: int, entry: Entry, *, over: Literal["steps", "seconds"]) -> Curve | None:
    """Mean and range over the finished runs at the validations that they share."""
    runs = []
    for run in entry.best_runs:
        known = {
            point.step: (float(point.step) if over == "steps" else point.seconds, point.value)
            for point in run.curve
            if math.isfinite(point.value) and (over == "steps" or point.seconds is not None)
        }
        if run.status == "done" and known:
            runs.append(known)
    shared = sorted(set.intersection(*(set(run) for run in runs))) if runs else []
    points = []
    for step in shared:
        values = [run[step][1] for run in runs]
        x = fmean(run[step][0] or 0.0 for run in runs)
        points.append((x, fmean(values), min(values), max(values)))
    return Curve(series, entry, tuple(points), len(runs)) if points else None


def _paint_curve(axes: Axes, curve: Curve) -> None:
    style = series_style(curve.series)
    colour = sentinel(style.variable)
    x, means, lows, highs = zip(*curve.points, strict=True)
    if curve.num_seeds > 1:
        axes.fill_between(x, lows, highs, color=colour, alpha=0.16, linewidth=0)
    every = math.ceil(len(x) / MARKERS_IN_A_LINE)
    first = curve.series % every  # so that markers of curves that lie on one another stay apart
    axes.plot(x, means, color=colour, marker=style.marker, linestyle=style.linestyle, markevery=(first, every))


def _caption(curves: list[Curve], target: float | None, limits: tuple[float, float]) -> str:
    parts = ["Best learning rate of each optimizer."]
    if any(curve.num_seeds > 1 for curve in curves):
        parts.append("Line: mean over seeds; band: lowest to highest seed.")
    else:
        parts.append("One seed, so there is no band.")
    if target is not None and math.isfinite(target):
        parts.append(f"Dotted: the target, {number(target)}.")
    if any(not limits[0] <= point[1] <= limits[1] for curve in curves for point in curve.points):
        parts.append("Values far off, as at the start, lie outside the chart.")
    return " ".join(parts)


def _in_words(curve: Curve, format_x: Callable[[float], str], over: str) -> str:
    (first, start, *_), (last, end, low, high) = curve.points[0], curve.points[-1]
    unit = " steps" if over == "steps" else ""
    seeds = f", seeds from {number(low)} to {number(high)}" if curve.num_seeds > 1 else ""
    return (
        f"{plain(curve.entry.optimizer)} at learning rate {learning_rate(curve.entry.best_lr)}: "
        f"{number(start)} after {format_x(first)}{unit}, {number(end)} after {format_x(last)}{unit}{seeds}."
    )
