"""How long work takes, and which piece of it has begun, as lines of the log."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

__all__ = ["log_duration", "log_each"]

log = logging.getLogger(__name__)
_MEASURED, _LONG, _APART = 5.0, 20.0, 1.0
"""Seconds of work before an estimate, total seconds that are worth a line, and seconds between two lines."""


def log_duration(what: str, clock: Callable[[], float] = time.perf_counter) -> Callable[[float, float], None]:
    """A function of the work done and the work in all that logs once how long all of it takes, where that is long.

    Args:
        what: The work, for the line.
        clock: Returns seconds.
    """
    start, is_logged = clock(), False

    def update(done: float, total: float) -> None:
        nonlocal is_logged
        elapsed = clock() - start
        if is_logged or not done or done >= total or elapsed < _MEASURED:
            return
        is_logged = True
        if (seconds := elapsed / done * total) >= _LONG:
            log.info("%s: about %s in all", what, _duration(seconds))

    return update


def log_each(
    what: str, weights: Sequence[float] | None = None, clock: Callable[[], float] = time.perf_counter
) -> Callable[[str, int, int], None]:
    """A function for the start of each piece of work that logs its name and number, at most once a second.

    Args:
        what: The work, for the line about the whole duration.
        weights: How long each piece takes, in any unit; the same by default.
        clock: Returns seconds.
    """
    duration, last = log_duration(what, clock), -math.inf

    def update(name: str, number: int, total: int) -> None:
        nonlocal last
        if (now := clock()) - last >= _APART:
            log.info("%d of %d: %s", number, total, name)
            last = now
        shares = [1.0] * total if weights is None else weights
        duration(sum(shares[: number - 1]), sum(shares))

    return update


def _duration(seconds: float) -> str:
    for name, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {name}" if seconds < 10 * length else f"{seconds / length:.0f} {name}"
    return f"{seconds:.0f} seconds"
