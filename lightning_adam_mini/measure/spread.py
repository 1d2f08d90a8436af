"""The middle of repeated figures and how far it can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import median, quantiles

__all__ = ["Spread", "ratio_of_pairs", "spread_of"]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of figures that were measured several times.

    Args:
        median: Their median.
        low: Lower quartile.
        high: Upper quartile.
        number: How many there were.
    """

    median: float
    low: float
    high: float
    number: int

    @property
    def uncertainty(self) -> float:
        """Half of the 95 % interval of the median, relative to it: 1.96 standard deviations of the median.

        These are estimated from the quartiles, 1.25 (high - low) / (1.35 root of the number), as for the notches of box
        plots (McGill, Tukey and Larsen 1978, "Variations of Box Plots").
        """
        return 1.96 * 1.25 / 1.35 * (self.high - self.low) / sqrt(self.number) / self.median if self.median else 0.0


def spread_of(figures: Sequence[float]) -> Spread:
    """Median and quartiles, which lie between figures as numpy's do.

    Raises:
        ValueError: Fewer than two figures.
    """
    if len(figures) < 2:
        raise ValueError(f"quartiles need at least two figures, got {len(figures)}")
    low, _, high = quantiles(figures, n=4, method="inclusive")
    return Spread(median(figures), low, high, len(figures))


def ratio_of_pairs(figures: Sequence[float], others: Sequence[float]) -> Spread:
    """Ratios of figures that were measured in the same round, to the other's."""
    return spread_of([figure / other for figure, other in zip(figures, others, strict=True)])
