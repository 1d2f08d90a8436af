"""The figure that chooses the learning rate, over the rate: how sensitive it is, and whether the best lies inside."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .scales import focus, rate_ticks, value_ticks
from .style import Drawing, draw
from .theme import sentinel, series_style
from .wording import learning_rate, number, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..comparison import Entry, TaskComparison

__all__ = ["rates_chart"]

LOST = ("diverged", "failed", "timeout")


def rates_chart(task: TaskComparison, name: str) -> Drawing | None:
    """Mean over the tuning seeds at each rate, and the rates at which runs were lost; None where none finished."""
    finished = [_finished(entry) for entry in task.entries]
    lost = [(series, lr) for series, entry in enumerate(task.entries) for lr in _lost(entry)]
    rates = sorted({lr for points in finished for lr, _ in points} | {lr for _, lr in lost})
    if not any(finished):
        return None
    mode, label = task.primary_metric.mode, plain(_label(task))
    low, high = focus((value for points in finished for _, value in points), mode)
    edge, inwards = (high, -1) if mode == "min" else (low, 1)

    def paint(axes: Axes) -> None:
        for series, (points, entry) in enumerate(zip(finished, task.entries, strict=True)):
            style = series_style(series)
            colour = sentinel(style.variable)
            clipped = [(lr, min(max(value, low), high)) for lr, value in points]
            look: dict[str, Any] = {
                "color": colour,
                "marker": style.marker,
                "linestyle": style.linestyle,
                "clip_on": False,
            }
            axes.plot([lr for lr, _ in clipped], [value for _, value in clipped], **look)
            ring: dict[str, Any] = {
                "markersize": 12,
                "markerfacecolor": "none",
                "markeredgecolor": colour,
                "markeredgewidth": 1.4,
            }
            for lr, value in clipped:
                if lr == entry.best_lr:
                    axes.plot([lr], [value], marker="o", clip_on=False, **ring)
        for place, (series, lr) in enumerate(lost):
            before = sum(other == lr for _, other in lost[:place])
            cross: dict[str, Any] = {"marker": "x", "markersize": 8, "markeredgewidth": 2, "clip_on": False}
            # One under the other where several optimizers lost runs at the same rate.
            shifted = edge + inwards * before * 0.06 * (high - low)
            axes.plot([lr], [shifted], markeredgecolor=sentinel(series_style(series).variable), **cross)
        axes.set_xlabel("learning rate")
        axes.set_ylabel(label)
        axes.set_ylim(low, high)
        value_ticks(axes)
        rate_ticks(axes, rates)

    caption = "Mean over the tuning seeds that finished; the ring marks the best learning rate."
    if lost:
        caption += " A cross at the edge marks runs that diverged or failed."
    if any(not low <= value <= high for points in finished for _, value in points):
        caption += " Values far off are drawn at the edge."
    title = "Sensitivity to the learning rate"
    words = f"{title}: {label}. " + " ".join(map(_in_words, task.entries))
    return draw(name, title=title, caption=caption, words=words, paint=paint)


def _label(task: TaskComparison) -> str:
    primary_metric = task.primary_metric
    return f"{primary_metric.curve_label} (it chooses the rate)" if task.selection_differs else primary_metric.label


def _finished(entry: Entry) -> list[tuple[float, float]]:
    return [
        (lr, rate.tuning.mean)
        for lr, rate in sorted(entry.lrs.items())
        if rate.tuning is not None and math.isfinite(rate.tuning.mean) and lr > 0
    ]


def _lost(entry: Entry) -> list[float]:
    return [lr for lr, rate in sorted(entry.lrs.items()) if lr > 0 and any(s in LOST for s in rate.statuses.values())]


def _in_words(entry: Entry) -> str:
    parts = [f"{number(value)} at {learning_rate(lr)}" for lr, value in _finished(entry)]
    parts += [f"runs lost at {learning_rate(lr)}" for lr in _lost(entry)]
    best = f"; best {learning_rate(entry.best_lr)}" if entry.best_lr is not None else ""
    return f"{plain(entry.optimizer)}: {', '.join(parts) or 'no finished run'}{best}."
