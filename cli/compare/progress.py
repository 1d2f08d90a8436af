"""Lines that say how far a comparison is."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from .grid import format_lr
from .job import Job
from .results import primary_metric_value

__all__ = ["Progress", "say"]


def say(line: str) -> None:
    """Print a line at once; a reader who has gone away is no reason to stop training."""
    try:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        pass


class Progress:
    """Prints a line for each run that starts and for each that ends.

    Args:
        total: Runs to come.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._num_ended = 0
        self._num_started = 0
        self._start = time.monotonic()
        self.statuses: list[str] = []
        """How the runs of this start ended."""

    def expect(self, total: int) -> None:
        """Correct the number of runs."""
        self._total = total

    def started(self, job: Job) -> None:
        """Say that a run starts."""
        self._num_started += 1
        say(f"[{self._num_started}/{self._total}] start {_name(job)}")

    def ended(self, job: Job, status: Mapping[str, Any]) -> None:
        """Say how a run ended, and when all will have."""
        self._num_ended += 1
        self.statuses.append(str(status["status"]))
        value = primary_metric_value(job.folder)
        told = f"{value:.5g}" if value is not None else str(status.get("message") or "")
        left = self._total - self._num_ended
        elapsed = time.monotonic() - self._start
        seconds = elapsed / self._num_ended * left
        eta = f"; {_duration(seconds)} left" if left else ""
        say(f"[{self._num_ended}/{self._total}] {status['status']} {_name(job)}: {told}{eta}")


def _name(job: Job) -> str:
    run = job.run
    return f"{run.recipe} {run.optimizer} lr {format_lr(run.lr)} seed {run.seed}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{rest} s"
