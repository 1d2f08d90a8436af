"""The charts of the report: validation curves, learning rates, memory, what it costs, performance profiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, Literal

from ..status import LOST
from .style import FONT_POINTS, HEIGHT_INCHES, Chart, draw, series_style
from .wording import BYTE_UNITS, count, duration, learning_rate, number, plain, shorten, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..analysis import Comparison, OptimizerSummary, TaskComparison
    from ..stats import PerformanceProfile

__all__ = [
    "curves_chart",
    "focus",
    "peak_chart",
    "profile_chart",
    "rates_chart",
    "state_chart",
    "tradeoff_chart",
]

LABEL_LENGTH = 24
MARKERS_IN_A_LINE = 7
# How far the range goes beyond the best value, in distances of the median from the best.
REACH = 6


@dataclass(frozen=True)
class MeanCurve:
    """The curve of one optimizer.

    Args:
        series: Its number, which gives colour and marker.
        summary: The optimizer.
        points: `(x, mean, lowest, highest)` of each validation, by ascending x; finite.
        num_seeds: Number of runs.
    """

    series: int
    summary: OptimizerSummary
    points: tuple[tuple[float, float, float, float], ...]
    num_seeds: int


def curves_chart(task: TaskComparison, name: str, over: Literal["steps", "seconds"]) -> Chart | None:
    """Validation curves at the best learning rates, over steps or training time; None if no run has one."""
    curves = [
        curve
        for series, summary in enumerate(task.summaries)
        if (curve := _mean_curve(series, summary, over)) is not None
    ]
    if not curves:
        return None
    label, mode = plain(task.primary_metric.curve_label), task.primary_metric.mode
    format_x: Callable[[float], str] = count if over == "steps" else duration
    target = task.target if task.target is not None and math.isfinite(task.target) else None
    # The first validations show how far off the start is, not how the optimizers differ.
    limits = focus(
        (point[1] for curve in curves for point in curve.points[len(curve.points) // 5 :]), mode, target=target
    )

    def paint(axes: Axes) -> None:
        for curve in curves:
            style = series_style(curve.series)
            x, means, lows, highs = zip(*curve.points, strict=True)
            if curve.num_seeds > 1:
                axes.fill_between(x, lows, highs, color=style["color"], alpha=0.16, linewidth=0)
            every = math.ceil(len(x) / MARKERS_IN_A_LINE)
            first = curve.series % every  # so that the markers of overlapping curves stay apart
            axes.plot(x, means, label=_label(curve.summary.optimizer), markevery=(first, every), **style)
        if target is not None:
            axes.axhline(target, color="black", linewidth=1.1, linestyle=(0, (1, 2)))
        axes.set_xlabel("optimizer steps" if over == "steps" else "training time, without validation")
        axes.set_ylabel(label)
        axes.set_ylim(*limits)
        _few_ticks(axes, format_x, whole=over == "steps")

    metric = label.partition(",")[0]  # without its unit
    title = f"{metric[:1].upper()}{metric[1:]} against {'steps' if over == 'steps' else 'training time'}"
    unit = " steps" if over == "steps" else ""
    words = f"{title}. " + " ".join(_curve_in_words(curve, format_x, unit) for curve in curves)
    caption = ["Best learning rate of each optimizer."]
    if any(curve.num_seeds > 1 for curve in curves):
        caption.append("Line: mean over seeds; band: lowest to highest seed.")
    else:
        caption.append("One seed, so there is no band.")
    if target is not None:
        caption.append(f"Dotted: the target, {number(target)}.")
    if any(not limits[0] <= point[1] <= limits[1] for curve in curves for point in curve.points):
        caption.append("Values far off, as at the start, are outside the chart.")
    return draw(name, title=title, caption=" ".join(caption), words=words, paint=paint)


def _mean_curve(series: int, summary: OptimizerSummary, over: Literal["steps", "seconds"]) -> MeanCurve | None:
    """Mean and range over the finished runs at the validations that they share."""
    runs = []
    for run in summary.best_runs:
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
    return MeanCurve(series, summary, tuple(points), len(runs)) if points else None


def _curve_in_words(curve: MeanCurve, format_x: Callable[[float], str], unit: str) -> str:
    (first, start, *_), (last, end, low, high) = curve.points[0], curve.points[-1]
    seeds = f", seeds from {number(low)} to {number(high)}" if curve.num_seeds > 1 else ""
    return (
        f"{plain(curve.summary.optimizer)} at learning rate {learning_rate(curve.summary.best_lr)}: "
        f"{number(start)} after {format_x(first)}{unit}, {number(end)} after {format_x(last)}{unit}{seeds}."
    )


def rates_chart(task: TaskComparison, name: str) -> Chart | None:
    """Mean over the tuning seeds at each learning rate, with the rates that lost runs; None if no run finished."""
    finished = [_finished_rates(summary) for summary in task.summaries]
    lost = [(series, lr) for series, summary in enumerate(task.summaries) for lr in _lost_rates(summary)]
    rates = sorted({lr for points in finished for lr, _ in points} | {lr for _, lr in lost})
    if not any(finished):
        return None
    metric, mode = task.primary_metric, task.primary_metric.mode
    label = plain(f"{metric.curve_label} (it chooses the rate)" if task.selection_differs else metric.label)
    low, high = focus((value for points in finished for _, value in points), mode)
    edge, inwards = (high, -1) if mode == "min" else (low, 1)

    def paint(axes: Axes) -> None:
        ring: dict[str, Any] = {"marker": "o", "markersize": 12, "markerfacecolor": "none", "markeredgewidth": 1.4}
        cross: dict[str, Any] = {"marker": "x", "markersize": 8, "markeredgewidth": 2}
        for series, (points, summary) in enumerate(zip(finished, task.summaries, strict=True)):
            style = series_style(series)
            shown = [(lr, min(max(value, low), high)) for lr, value in points]
            x, y = [lr for lr, _ in shown], [value for _, value in shown]
            axes.plot(x, y, label=_label(summary.optimizer), clip_on=False, **style)
            for lr, value in shown:
                if lr == summary.best_lr:
                    axes.plot([lr], [value], color=style["color"], clip_on=False, **ring)
        for place, (series, lr) in enumerate(lost):
            # One below the other if several optimizers lost runs at the same rate.
            before = sum(other == lr for _, other in lost[:place])
            y_lost = edge + inwards * before * 0.06 * (high - low)
            axes.plot([lr], [y_lost], color=series_style(series)["color"], clip_on=False, **cross)
        axes.set_xlabel("learning rate")
        axes.set_ylabel(label)
        axes.set_ylim(low, high)
        _few_ticks(axes)
        _rate_ticks(axes, rates)

    caption = "Mean over the tuning seeds that finished; the ring marks the best learning rate."
    if lost:
        caption += " A cross at the edge marks runs that diverged or failed."
    if any(not low <= value <= high for points in finished for _, value in points):
        caption += " Values far off are drawn at the edge."
    title = "Sensitivity to the learning rate"
    words = f"{title}: {label}. " + " ".join(map(_rates_in_words, task.summaries))
    return draw(name, title=title, caption=caption, words=words, paint=paint)


def _finished_rates(summary: OptimizerSummary) -> list[tuple[float, float]]:
    return [
        (lr, rate.tuning.mean)
        for lr, rate in sorted(summary.lrs.items())
        if rate.tuning is not None and math.isfinite(rate.tuning.mean)
    ]


def _lost_rates(summary: OptimizerSummary) -> list[float]:
    lost = {"diverged", *LOST} - {"interrupted"}
    return [lr for lr, rate in sorted(summary.lrs.items()) if lost & set(rate.statuses.values())]


def _rates_in_words(summary: OptimizerSummary) -> str:
    parts = [f"{number(value)} at {learning_rate(lr)}" for lr, value in _finished_rates(summary)]
    parts += [f"runs lost at {learning_rate(lr)}" for lr in _lost_rates(summary)]
    best = f"; best {learning_rate(summary.best_lr)}" if summary.best_lr is not None else ""
    return f"{plain(summary.optimizer)}: {', '.join(parts) or 'no finished run'}{best}."


def state_chart(task: TaskComparison, name: str) -> Chart | None:
    """The optimizer state at the best learning rate, measured and predicted from the shapes."""
    caption = "Filled: measured in the run. Outlined: predicted from the shapes before training."
    costs = [(summary.costs.optimizer_state_bytes, summary.costs.predicted_state_bytes) for summary in task.summaries]
    return _memory_chart(task, costs, name, title="Optimizer state", caption=caption)


def peak_chart(task: TaskComparison, name: str) -> Chart | None:
    """Peak memory, with the part of it that is known before training."""
    caption = (
        "Filled: measured in the run. Outlined: predicted parameters, gradients and optimizer state; without "
        "activations, libraries and data."
    )
    costs = [(summary.costs.peak_memory_bytes, summary.costs.predicted_memory_bytes) for summary in task.summaries]
    return _memory_chart(task, costs, name, title="Peak memory", caption=caption)


def _memory_chart(
    task: TaskComparison, costs: Sequence[tuple[float | None, float | None]], name: str, *, title: str, caption: str
) -> Chart | None:
    """Bars of (measured, predicted) bytes for each optimizer; None if none is known."""
    bars = [tuple(value if value is not None and math.isfinite(value) else None for value in pair) for pair in costs]
    known = [value for pair in bars for value in pair if value is not None]
    if not known:
        return None
    scale, unit = next(((scale, unit) for scale, unit in BYTE_UNITS if max(known) >= scale), (1.0, "B"))
    labels = [summary.optimizer for summary in task.summaries]

    def paint(axes: Axes) -> None:
        for place, pair in enumerate(bars):
            colour = series_style(place)["color"]
            for value, offset, face in zip(pair, (0.19, -0.19), (colour, "none"), strict=True):
                if value is None:
                    continue
                bar = axes.barh(offset - place, value / scale, height=0.3, lw=1.2, facecolor=face, edgecolor=colour)
                axes.bar_label(bar, [size(value)], padding=3, fontsize=9.8)
        axes.set_yticks([-place for place in range(len(bars))], [shorten(label, 18) for label in labels])
        axes.set_ylim(-len(bars) + 0.4, 0.6)
        axes.set_xlim(0, 1.24 * max(known) / scale)  # space for the number next to the longest bar
        axes.set_xlabel(unit)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.locator_params(axis="x", nbins=5)

    words = [f"{title}."]
    for label, pair in zip(labels, bars, strict=True):
        measured, predicted = (
            f"not {word}" if value is None else f"{size(value)} {word}"
            for value, word in zip(pair, ("measured", "predicted"), strict=True)
        )
        words.append(f"{plain(label)}: {measured}, {predicted}.")
    height = 0.9 + 0.46 * len(bars)
    return draw(name, title=title, caption=caption, words=" ".join(words), paint=paint, height=height)


@dataclass(frozen=True)
class TradeoffPoint:
    """An optimizer on one task, beside the reference.

    Args:
        series: Its number, which gives colour and marker.
        optimizer: Its label.
        state: Optimizer state in percent of the reference's.
        difference: Mean primary metric minus the reference's.
        interval: Of the difference, 95 %; None for the reference, or where there is none.
    """

    series: int
    optimizer: str
    state: float
    difference: float
    interval: tuple[float, float] | None


def tradeoff_chart(tasks: Sequence[TaskComparison], names: Mapping[str, str], name: str) -> Chart | None:
    """What the memory of each optimizer costs: a panel a task; None where no optimizer has a difference.

    Args:
        tasks: The tasks, in the order of the panels.
        names: Recipe -> its short name.
        name: Name of the chart.
    """
    found = [(task, points) for task in tasks if len(points := _tradeoff_points(task)) > 1]
    if not found:
        return None
    limits = [
        focus(
            [0.0, *(end for point in points for end in (point.interval or (point.difference,)))],
            task.primary_metric.mode,
            target=0.0,
        )
        for task, points in found
    ]

    def paint(*panels: Axes) -> None:
        for axes, (task, points), (low, high) in zip(panels, found, limits, strict=True):
            axes.axhline(0, color="black", linewidth=1.1, linestyle=(0, (1, 2)))
            for point in points:
                style = series_style(point.series) | {"linestyle": "none"}
                y = min(max(point.difference, low), high)
                if point.interval is not None:
                    axes.plot([point.state] * 2, point.interval, color=style["color"], linewidth=1.4, alpha=0.7)
                axes.plot([point.state], [y], label=_label(point.optimizer), clip_on=False, **style)
            arrow = "↓" if task.primary_metric.mode == "min" else "↑"
            metric = shorten(task.primary_metric.label.partition(",")[0], LABEL_LENGTH - 4)
            axes.set_title(f"{shorten(names[task.recipe], LABEL_LENGTH)}\n{arrow} {metric}", fontsize=FONT_POINTS)
            axes.set_xlim(0, 1.08 * max(100.0, *(point.state for point in points)))
            axes.set_ylim(low, high)
            axes.set_xlabel("state, %")
            _few_ticks(axes)
            axes.locator_params(axis="x", nbins=4)

    reference = next(summary.optimizer for summary in found[0][0].summaries if summary.verdict.word == "reference")
    title = "Final value against memory"
    words = f"{title}. " + " ".join(_tradeoff_in_words(task, points, names) for task, points in found)
    caption = (
        f"Memory of the optimizer, in percent of {plain(reference)}'s, and the final value minus that of "
        f"{plain(reference)}, with the 95 % confidence interval of the difference; arrows point to better values."
    )
    height = 2.2 if len(found) > 1 else HEIGHT_INCHES
    places = zip(found, limits, strict=True)
    if any(not low <= point.difference <= high for (_, points), (low, high) in places for point in points):
        caption += " Values far off are drawn at the edge."
    return draw(name, title=title, caption=caption, words=words, paint=paint, height=height, panels=len(found))


def _tradeoff_points(task: TaskComparison) -> list[TradeoffPoint]:
    """Optimizers with a final value and a known state; none where the reference lacks one of them."""
    points = []
    for series, summary in enumerate(task.summaries):
        ratio, verdict = summary.ratios.optimizer_state_bytes, summary.verdict
        is_reference = verdict.word == "reference"
        if summary.final is None or ratio is None or not (is_reference or verdict.difference is not None):
            continue
        difference = 0.0 if verdict.difference is None else verdict.difference
        if math.isfinite(difference):
            points.append(TradeoffPoint(series, summary.optimizer, 100 * ratio, difference, verdict.interval))
    return points


def _tradeoff_in_words(task: TaskComparison, points: Sequence[TradeoffPoint], names: Mapping[str, str]) -> str:
    parts = [
        f"{plain(point.optimizer)} {number(point.difference)} with {point.state:.0f} % of the state"
        for point in points
        if point.interval is not None
    ]
    return f"{names[task.recipe]}: {', '.join(parts) or 'no intervals'}."


def profile_chart(comparison: Comparison, axis: Literal["steps", "seconds"], names: dict[str, str]) -> Chart | None:
    """Performance profiles over the tasks (Dolan and More, Mathematical Programming 91, 2002); None for one task.

    Args:
        comparison: The comparison.
        axis: What the target costs.
        names: Recipe -> its short name.
    """
    profiles = comparison.profiles.get(axis, ())
    num_tasks = max((len(profile.factors) for profile in profiles), default=0)
    if len(comparison.tasks) < 2 or not num_tasks:
        return None
    end = max(1.1, 1.08 * max(tau for profile in profiles for tau in profile.taus))
    cost = "steps" if axis == "steps" else "training time"

    def paint(axes: Axes) -> None:
        for profile in profiles:
            style = series_style(comparison.optimizers.index(profile.optimizer))
            taus, shares = [*profile.taus, end], [*profile.shares, profile.shares[-1]]
            # The last corner is the edge of the chart and no measurement.
            corners: dict[str, Any] = {"drawstyle": "steps-post", "clip_on": False, "markevery": slice(0, -1)}
            axes.plot(taus, shares, label=_label(profile.optimizer), **corners, **style)
        axes.set_xlim(1, end)
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel(f"factor of the fastest optimizer's {cost}")
        axes.set_ylabel("share of the tasks")
        axes.locator_params(axis="x", nbins=6)

    title = f"Performance profile, {cost} to the target"
    caption = (
        f"Higher is better. A curve at factor 1 is the share of {num_tasks} tasks on which the optimizer was fastest; "
        "one that stays below 1 did not reach the target on every task."
    )
    words = f"{title}. " + " ".join(_profile_in_words(profile, names) for profile in profiles)
    return draw(f"profile-{axis}", title=title, caption=caption, words=words, paint=paint)


def _profile_in_words(profile: PerformanceProfile, names: dict[str, str]) -> str:
    factors = [
        f"{names[recipe]} never" if factor is None else f"{names[recipe]} factor {number(factor, decimals=2)}"
        for recipe, factor in profile.factors.items()
    ]
    return f"{plain(profile.optimizer)}: {', '.join(factors)}."


def focus(values: Iterable[float], mode: Literal["min", "max"], *, target: float | None = None) -> tuple[float, float]:
    """A range that shows the differences between good values and leaves far worse ones outside.

    Args:
        values: The values to show.
        mode: `min` if small values are good, else `max`.
        target: A value that must be inside.
    """
    known = sorted(value for value in values if math.isfinite(value))
    if not known:
        known = [target] if target is not None else [0.0, 1.0]
    low, high, middle = known[0], known[-1], median(known)
    if mode == "min" and middle > low:
        high = min(high, low + REACH * (middle - low))
    elif mode == "max" and middle < high:
        low = max(low, high - REACH * (high - middle))
    if target is not None:
        low, high = min(low, target), max(high, target)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _few_ticks(axes: Axes, format_x: Callable[[float], str] | None = None, *, whole: bool = False) -> None:
    """Few ticks; those of x in the reader's units, at whole numbers if asked."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(6))
    if format_x is not None:
        axes.xaxis.set_major_locator(MaxNLocator(4, min_n_ticks=2, integer=whole))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_x(x)))


def _rate_ticks(axes: Axes, rates: Sequence[float], *, most: int = 6) -> None:
    """A logarithmic axis with ticks at the learning rates, in ascending order, of which so many labels fit."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log")
    axes.set_xlim(rates[0] / 1.3, rates[-1] * 1.3)
    axes.xaxis.set_major_locator(FixedLocator(rates[:: math.ceil(len(rates) / most)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda lr, _: learning_rate(lr)))


def _label(optimizer: str) -> str:
    label = shorten(optimizer, LABEL_LENGTH)
    return f"\u200b{label}" if label.startswith("_") else label  # matplotlib leaves those out of a legend
