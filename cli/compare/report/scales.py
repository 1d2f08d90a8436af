"""Ranges and ticks that keep a small chart readable, whatever the worst run did."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Literal

from .wording import learning_rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["focus", "rate_ticks", "value_ticks"]

# How far from the best value the range may go, in distances of the median from the best.
REACH = 6


def focus(values: Iterable[float], mode: Literal["min", "max"], *, target: float | None = None) -> tuple[float, float]:
    """A range that shows the differences between good values, and lets far worse ones lie outside.

    Args:
        values: Those that the range is made for.
        mode: Whether small or large values are good.
        target: A value that must lie inside.
    """
    known = sorted(value for value in values if math.isfinite(value))
    if target is not None and not math.isfinite(target):
        target = None
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


def value_ticks(axes: Axes, format_x: Callable[[float], str] | None = None, *, whole: bool = False) -> None:
    """Few ticks; those of x in the reader's words, at whole numbers where asked."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(6))
    if format_x is not None:
        axes.xaxis.set_major_locator(MaxNLocator(4, min_n_ticks=2, integer=whole))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_x(x)))


def rate_ticks(axes: Axes, rates: Sequence[float], *, room: int = 6) -> None:
    """A logarithmic axis with ticks at the learning rates that were tried, as far as there is room for them.

    Args:
        axes: Where.
        rates: The learning rates, in rising order.
        room: How many labels fit.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log")
    if rates:
        axes.set_xlim(rates[0] / 1.3, rates[-1] * 1.3)
    axes.xaxis.set_major_locator(FixedLocator(rates[:: math.ceil(len(rates) / room) or 1]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda lr, _: learning_rate(lr)))
