"""Statistics of a comparison: means over seeds, Welch's test, time to a target, performance profiles."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, median_high, median_low, stdev
from typing import Literal

from .run_records import Point

__all__ = [
    "CONFIDENCE",
    "MeanStd",
    "PerformanceProfile",
    "TimeToTarget",
    "Verdict",
    "best_of",
    "first_reaching",
    "mean_std",
    "performance_profiles",
    "target_of",
    "time_to_target",
    "verdict_of",
    "welch",
]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class MeanStd:
    """Mean and sample standard deviation of `n` values; the deviation of a single value is None."""

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True, kw_only=True)
class TimeToTarget:
    """When the curve first reached the target at the best learning rate.

    Args:
        by_seed: Optimizer steps, or seconds of training; None for a seed that never reached it or diverged. Runs that
            failed or did not finish are not included.
        median: Median over the seeds, where a seed that never reached the target counts as later than all others; None
            means never.
    """

    by_seed: Mapping[int, float | None]
    median: float | None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether the difference to the reference exceeds the spread over seeds.

    Args:
        word: `better`, `worse` or `within the spread` by the interval of the difference; `reference` for the reference
            itself; `failed` if every run failed; `no verdict` if the runs do not allow one.
        text: The verdict for readers, with the reason if there is none.
        difference: Mean primary metric minus the reference's.
        interval: 95 % confidence interval of the difference, by Welch's t-test (Welch 1947).
        p_value: Two-sided, of no difference.
    """

    word: Literal["better", "worse", "within the spread", "reference", "failed", "no verdict"]
    text: str
    difference: float | None = None
    interval: tuple[float, float] | None = None
    p_value: float | None = None


@dataclass(frozen=True, kw_only=True)
class PerformanceProfile:
    """Performance profile of an optimizer over the tasks (Dolan and More 2002; Dahl et al. 2023).

    Args:
        optimizer: Its label.
        factors: Recipe -> time to the target divided by that of the fastest optimizer; None if it was never reached.
            Tasks that no optimizer solved are left out.
        taus: Factors at which the profile steps, from 1.
        shares: Share of the tasks on which the optimizer is within each factor.
    """

    optimizer: str
    factors: Mapping[str, float | None]
    taus: tuple[float, ...]
    shares: tuple[float, ...]


def mean_std(values: Iterable[float]) -> MeanStd | None:
    """Mean and sample standard deviation (with n - 1); None without values."""
    values = list(values)
    if not values:
        return None
    return MeanStd(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def best_of(tuning: Mapping[float, MeanStd | None], mode: str) -> float | None:
    """The learning rate with the best mean over the tuning seeds.

    Learning rates with the most finished seeds come first: one at which a seed diverged or failed is only chosen if
    that happened at all of them. Ties go to the smaller learning rate.

    Args:
        tuning: Learning rate -> mean over its tuning seeds; None if no seed finished.
        mode: `min` if smaller is better, else `max`.
    """
    sign = 1 if mode == "min" else -1
    candidates = {lr: found for lr, found in tuning.items() if found is not None}
    return min(candidates, key=lambda lr: (-candidates[lr].n, sign * candidates[lr].mean, lr), default=None)


def target_of(last: Iterable[float | None], mode: str) -> float | None:
    """The value that the reference's median seed ends with; for an even number the worse of the middle two.

    At least half of the seeds reach it, and more than half of an even number, so the median of their times is finite.

    Args:
        last: Last values of the reference's curves; None for a seed that diverged, which is worse than any other.
        mode: `min` if smaller is better, else `max`.

    Returns:
        None if there is no seed, or if the middle one diverged.
    """
    worst = math.inf if mode == "min" else -math.inf
    values = [value if value is not None and math.isfinite(value) else worst for value in last]
    if not values:
        return None
    middle = median_high(values) if mode == "min" else median_low(values)
    return middle if math.isfinite(middle) else None


def first_reaching(curve: Sequence[Point], target: float, mode: str) -> Point | None:
    """The first point of a curve that is at least as good as the target."""
    reached = (point for point in curve if (point.value <= target if mode == "min" else point.value >= target))
    return next(reached, None)


def time_to_target(by_seed: Mapping[int, float | None]) -> TimeToTarget:
    """The times of the seeds with their median; a seed that never reached the target is later than all others."""
    if not by_seed:
        return TimeToTarget(by_seed={}, median=None)
    middle = median(math.inf if value is None else value for value in by_seed.values())
    return TimeToTarget(by_seed=dict(by_seed), median=middle if math.isfinite(middle) else None)


def welch(ours: Sequence[float], reference: Sequence[float]) -> tuple[float, tuple[float, float], float]:
    """Difference of two means, its 95 % confidence interval and the two-sided p-value, by Welch's t-test (Welch 1947).

    The two variances may differ, but one of them must be positive.

    Args:
        ours: At least two values.
        reference: At least two values.
    """
    from scipy.stats import ttest_ind

    difference = fmean(ours) - fmean(reference)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # one of the two may have no variance
        test = ttest_ind(ours, reference, equal_var=False)
    interval = test.confidence_interval(CONFIDENCE)
    return difference, (float(interval.low), float(interval.high)), float(test.pvalue)


def verdict_of(
    ours: Sequence[float], reference: Sequence[float], mode: str, *, missing: int = 0, unfinished: int = 0
) -> Verdict:
    """Whether an optimizer differs from the reference by more than the spread over seeds.

    Args:
        ours: Primary metric of each seed at the best learning rate.
        reference: The same of the reference.
        mode: `min` if smaller is better, else `max`.
        missing: Seeds of either that did not finish: the rest would look too good.
        unfinished: Tuning runs of either that neither finished nor diverged: another learning rate might be the best.
    """
    if not ours or not reference:
        return Verdict(word="no verdict", text=f"no {'result' if not ours else 'result of the reference'}: no verdict")
    difference = fmean(ours) - fmean(reference)
    reason = ""
    if missing:
        reason = f"{missing} seed{'s' * (missing > 1)} did not finish"
    elif unfinished:
        reason = f"{unfinished} tuning run{'s' * (unfinished > 1)} did not finish"
    elif min(len(ours), len(reference)) < 2:
        reason = "one seed"
    elif stdev(ours) == stdev(reference) == 0.0:
        reason = "the seeds do not differ"
    if reason:
        return Verdict(word="no verdict", text=f"{reason}: no verdict", difference=difference)
    difference, (low, high), p_value = welch(ours, reference)
    word: Literal["better", "worse", "within the spread"] = "within the spread"
    if low > 0.0 or high < 0.0:
        word = "better" if (difference < 0.0) == (mode == "min") else "worse"
    return Verdict(word=word, text=word, difference=difference, interval=(low, high), p_value=p_value)


def performance_profiles(times: Mapping[str, Mapping[str, float | None]]) -> tuple[PerformanceProfile, ...]:
    """The share of tasks that each optimizer solves within a factor of the fastest one (Dolan and More 2002).

    Args:
        times: Task -> optimizer -> time to the target, positive; None if it was never reached. Tasks that no optimizer
            solved are left out.
    """
    fastest = {
        task: min(reached)
        for task, by_optimizer in times.items()
        if (reached := [time for time in by_optimizer.values() if time is not None])
    }
    optimizers = dict.fromkeys(name for by_optimizer in times.values() for name in by_optimizer)
    factors = {
        name: {task: None if (time := times[task].get(name)) is None else time / best for task, best in fastest.items()}
        for name in optimizers
    }
    taus = sorted({1.0} | {factor for own in factors.values() for factor in own.values() if factor is not None})
    return tuple(
        PerformanceProfile(
            optimizer=name,
            factors=own,
            taus=tuple(taus),
            shares=tuple(
                sum(factor is not None and factor <= tau for factor in own.values()) / max(len(own), 1) for tau in taus
            ),
        )
        for name, own in factors.items()
    )
