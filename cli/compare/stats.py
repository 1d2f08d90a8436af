"""The statistics of a comparison: means over seeds, Welch's interval, time to a target, performance profiles."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median, median_high, median_low, stdev
from typing import Literal

from .outcomes import Estimate, Profile, ToTarget, Verdict
from .run_records import Point

__all__ = [
    "CONFIDENCE",
    "best_of",
    "estimate",
    "first_reaching",
    "profiles",
    "target_of",
    "to_target",
    "verdict",
    "welch",
]

CONFIDENCE = 0.95


def estimate(values: Iterable[float]) -> Estimate | None:
    """Mean and sample standard deviation (with n - 1); None of no values."""
    values = list(values)
    if not values:
        return None
    return Estimate(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def best_of(tuning: Mapping[float, Estimate | None], mode: str) -> float | None:
    """The learning rate with the best mean over the tuning seeds.

    Those with the most seeds that came to their end go first: one at which a seed diverged or failed is taken only
    where that is so of all of them. Of equal ones the smaller is taken.

    Args:
        tuning: Estimate by learning rate; None where no seed came to its end.
        mode: Whether less (`min`) or more (`max`) is better.
    """
    sign = 1 if mode == "min" else -1
    candidates = {lr: result for lr, result in tuning.items() if result is not None}
    return min(candidates, key=lambda lr: (-candidates[lr].n, sign * candidates[lr].mean, lr), default=None)


def target_of(last: Iterable[float | None], mode: str) -> float | None:
    """The value that the reference's own median seed ends with; of an even number the worse of the middle two.

    At least half of the seeds reach it, and more than half of an even number, so that the median of their times is
    finite.

    Args:
        last: Last values of the reference's curves; None of a seed that diverged, which is worse than any other.
        mode: Whether less (`min`) or more (`max`) is better.

    Returns:
        None where there is no seed, or the middle one diverged.
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


def to_target(by_seed: Mapping[int, float | None]) -> ToTarget:
    """When the target was reached, by seed, with the median; a seed that never did counts as later than any other."""
    if not by_seed:
        return ToTarget(by_seed={}, median=None)
    middle = median(math.inf if value is None else value for value in by_seed.values())
    return ToTarget(by_seed=dict(by_seed), median=middle if math.isfinite(middle) else None)


def welch(ours: Sequence[float], reference: Sequence[float]) -> tuple[float, tuple[float, float], float]:
    """Difference of two means, its 95 % confidence interval and the two-sided p-value, by Welch's t (Welch 1947).

    The variances of the two need not be equal, but one of them must be positive.

    Args:
        ours: At least two values.
        reference: At least two values.
    """
    from scipy.stats import ttest_ind

    difference = fmean(ours) - fmean(reference)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # one of the two may be without variance
        test = ttest_ind(ours, reference, equal_var=False)
    interval = test.confidence_interval(CONFIDENCE)
    return difference, (float(interval.low), float(interval.high)), float(test.pvalue)


def verdict(
    ours: Sequence[float], reference: Sequence[float], mode: str, *, missing: int = 0, unfinished: int = 0
) -> Verdict:
    """Whether one optimizer's figures differ from the reference's by more than their spread over seeds.

    Args:
        ours: PrimaryMetric figures of the seeds, at the best learning rate.
        reference: The same of the reference.
        mode: Whether less (`min`) or more (`max`) is better.
        missing: Seeds of either that did not come to their end: what is left would flatter.
        unfinished: Runs of either that were to choose the learning rate and neither came to their end nor diverged:
            with them another rate might be the best.
    """
    if not ours or not reference:
        return Verdict(word="no verdict", text=f"no {'result' if not ours else 'result of the reference'}: no verdict")
    difference = fmean(ours) - fmean(reference)
    reason = ""
    if missing:
        reason = f"{missing} seed{'s' * (missing > 1)} did not come to an end"
    elif unfinished:
        reason = f"{unfinished} run{'s' * (unfinished > 1)} to choose the learning rate did not finish"
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


def profiles(times: Mapping[str, Mapping[str, float | None]]) -> tuple[Profile, ...]:
    """Performance profiles (Dolan and More 2002): the share of tasks that are solved within a factor of the quickest.

    Args:
        times: Time to the target by task and optimizer, positive; None where it was never reached. Tasks that no
            optimizer solved are left out.
    """
    best = {
        task: min(reached)
        for task, by_optimizer in times.items()
        if (reached := [time for time in by_optimizer.values() if time is not None])
    }
    optimizers = list(dict.fromkeys(name for by_optimizer in times.values() for name in by_optimizer))
    factors: dict[str, dict[str, float | None]] = {name: {} for name in optimizers}
    for name in optimizers:
        for task, quickest in best.items():
            time = times[task].get(name)
            factors[name][task] = None if time is None else time / quickest
    taus = sorted({1.0} | {factor for own in factors.values() for factor in own.values() if factor is not None})
    return tuple(
        Profile(
            optimizer=name,
            factors=own,
            taus=tuple(taus),
            shares=tuple(
                sum(factor is not None and factor <= tau for factor in own.values()) / max(len(own), 1) for tau in taus
            ),
        )
        for name, own in factors.items()
    )
