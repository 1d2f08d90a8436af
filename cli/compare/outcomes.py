"""What the statistics of a comparison come to, as frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["Estimate", "Profile", "ToTarget", "Verdict"]


@dataclass(frozen=True)
class Estimate:
    """Mean and sample standard deviation of `n` values; a single value has no deviation."""

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True, kw_only=True)
class ToTarget:
    """When the curve first reached the target at the best learning rate.

    Args:
        by_seed: Optimizer steps, or seconds of training; None where it never did, as of a run that diverged. Runs
            that failed or did not finish are not among them.
        median: Median over the seeds, a seed that never did counting as later than any other; None is never.
    """

    by_seed: Mapping[int, float | None]
    median: float | None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether the difference to the reference exceeds the spread over seeds.

    Args:
        word: `better`, `worse` and `within the spread` say where the interval of the difference lies; `reference`
            stands for itself; `failed` where every run failed; `no verdict` where the runs do not allow one.
        text: The verdict for readers, with the reason where there is none.
        difference: Mean primary metric less the reference's.
        interval: 95 % confidence interval of the difference, by Welch's t (Welch 1947).
        p_value: Two-sided, of no difference.
    """

    word: Literal["better", "worse", "within the spread", "reference", "failed", "no verdict"]
    text: str
    difference: float | None = None
    interval: tuple[float, float] | None = None
    p_value: float | None = None


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Performance profile of an optimizer over the tasks (Dolan and More 2002; Dahl et al. 2023).

    Args:
        optimizer: Its label.
        factors: By recipe: its time to the target in units of the quickest optimizer's; None where it never got
            there. Tasks on which no optimizer did are left out.
        taus: Factors at which the profile steps, from 1.
        shares: Share of the tasks on which the optimizer is within each factor.
    """

    optimizer: str
    factors: Mapping[str, float | None]
    taus: tuple[float, ...]
    shares: tuple[float, ...]
