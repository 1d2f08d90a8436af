"""How long work will take, told once where it is long."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

__all__ = ["tell_duration", "tell_each"]

log = logging.getLogger(__name__)
_WATCHED, _LONG, _APART = 5.0, 20.0, 1.0
"""Seconds of work that an estimate rests on, of all of it from which on it is worth a line, and between two lines."""


def tell_duration(what: str, clock: Callable[[], float] = time.perf_counter) -> Callable[[float, float], None]:
    """A function that takes how much of the work is done and how much there is, and logs once how long all of it takes.

    Args:
        what: The work, for the line.
        clock: Seconds from any time on.
    """
    start, is_told = clock(), False

    def tell(done: float, total: float) -> None:
        nonlocal is_told
        elapsed = clock() - start
        if is_told or not done or done >= total or elapsed < _WATCHED:
            return
        is_told = True
        if (seconds := elapsed / done * total) >= _LONG:
            log.info("%s: about %s in all", what, _words(seconds))

    return tell


def tell_each(
    what: str, weights: Sequence[float] | None = None, clock: Callable[[], float] = time.perf_counter
) -> Callable[[str, int, int], None]:
    """A function for the start of each piece of work: logs its name and number, but once a second at most.

    Args:
        what: The work, for the line that tells how long all of it takes.
        weights: How long each piece takes, in any unit; alike by default.
        clock: Seconds from any time on.
    """
    duration, last = tell_duration(what, clock), -math.inf

    def tell(name: str, number: int, total: int) -> None:
        nonlocal last
        if (now := clock()) - last >= _APART:
            log.info("%d of %d: %s", number, total, name)
            last = now
        shares = [1.0] * total if weights is None else weights
        duration(sum(shares[: number - 1]), sum(shares))

    return tell


def _words(seconds: float) -> str:
    for name, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {name}" if seconds < 10 * length else f"{seconds / length:.0f} {name}"
    return f"{seconds:.0f} seconds"
