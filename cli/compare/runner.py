"""Trains the grid: first the runs that choose the learning rates, then the other seeds at the best ones."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .analysis import best_learning_rates
from .grid import ComparedRecipe, Grid, Run, format_lr
from .job import Job
from .launchers import ClusterHandle, ClusterLauncher, LocalHandle, LocalLauncher
from .process import Interruption
from .run_records import primary_metric_value
from .status import FINISHED, read_status

__all__ = ["GridRunner", "Progress", "say", "train_all"]


def train_all(
    jobs: Sequence[Job], launcher: ClusterLauncher | LocalLauncher, interruption: Interruption, progress: Progress
) -> None:
    """Train jobs, as many at a time as the launcher allows; once interrupted, start no more and stop the others.

    Raises:
        ValueError: A job could not be submitted; the others are stopped.
    """

    def stop(handle: ClusterHandle | LocalHandle) -> None:
        progress.ended(handle.job, handle.stop())

    waiting, running = deque(jobs), list[ClusterHandle | LocalHandle]()
    try:
        while waiting or running:
            while waiting and len(running) < (launcher.num_jobs or len(jobs)) and not interruption.stop.is_set():
                job = waiting.popleft()
                running.append(launcher.start(job, interruption))
                progress.started(job)
            for handle in [handle for handle in running if handle.done()]:
                running.remove(handle)
                progress.ended(handle.job, handle.status())
            if interruption.stop.is_set():
                break
            if running:
                interruption.stop.wait(launcher.poll_seconds)
    except BaseException:
        interruption.stop.set()  # a full disk, say: the others save their checkpoints
        raise
    finally:
        with ExitStack() as stack:  # if one of them fails to stop, the others are stopped all the same
            for handle in reversed(running):
                stack.callback(stop, handle)


@dataclass(frozen=True, kw_only=True)
class GridRunner:
    """Trains a grid.

    Args:
        grid: The runs.
        out: Folder of the comparison.
        launcher: Starts them.
        timeout: Seconds after which a start of a run is stopped; None for no limit.
        facts: What `status.json` says about the circumstances.
    """

    grid: Grid
    out: Path
    launcher: ClusterLauncher | LocalLauncher
    timeout: float | None
    facts: Mapping[str, Any]

    def train(self, interruption: Interruption) -> list[str]:
        """Train what is not finished.

        Args:
            interruption: Asks to stop.

        Returns:
            How the runs of this start ended.
        """
        tuning = self._jobs(self.grid.tuning_runs())
        progress = Progress(len(tuning) + len(self.grid.plan.final_seeds) * len(self.grid.lrs))
        train_all(tuning, self.launcher, interruption, progress)
        if not interruption.stop.is_set():
            final = self._jobs(self.grid.final_runs(self._chosen()))
            progress.total = len(tuning) + len(final)
            train_all(final, self.launcher, interruption, progress)
        return progress.statuses

    def _chosen(self) -> dict[tuple[str, str], float]:
        """The best learning rates of the cases whose tuning runs are all finished: others could still become best."""
        left = Counter(
            (run.recipe, run.optimizer)
            for run in self.grid.tuning_runs()
            if read_status(self.out / self.grid.folder(run))["status"] not in FINISHED
        )
        best = best_learning_rates(self.grid, self.out)
        if self.grid.plan.final_seeds:
            for recipe, label in best.keys() & left.keys():
                say(f"{recipe} {label}: the other seeds wait, {left[recipe, label]} tuning run(s) have no result yet")
        return {case: lr for case, lr in best.items() if case not in left}

    def _jobs(self, runs: Sequence[Run]) -> list[Job]:
        working_folder = Path(self.grid.plan.folder)
        jobs = [
            Job(
                run=run,
                arguments=tuple(self.grid.arguments(run, self.out)),
                folder=self.out / self.grid.folder(run),
                working_folder=working_folder,
                threads=self.launcher.threads,
                digest=self.grid.recipes[run.recipe].digest,
                timeout=self.timeout,
                facts=self.facts,
                environment=_python_path(self.grid.recipes[run.recipe], working_folder),
            )
            for run in runs
        ]
        return [job for job in jobs if not job.is_finished()]


def _python_path(recipe: ComparedRecipe, working_folder: Path) -> dict[str, str]:
    """Where a run finds modules next to its recipe, although it reads a copy elsewhere."""
    if not Path(recipe.name).is_absolute() or recipe.path.parent == working_folder:
        return {}
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([str(recipe.path.parent), *([before] if before else [])])}


class Progress:
    """Prints a line for each run that starts and for each that ends.

    Args:
        total: Number of runs; may be corrected later.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.statuses: list[str] = []
        """How the runs of this start ended."""
        self._num_started = 0
        self._start = time.monotonic()

    def started(self, job: Job) -> None:
        """Print that a run starts."""
        self._num_started += 1
        say(f"[{self._num_started}/{self.total}] start {_name(job)}")

    def ended(self, job: Job, status: Mapping[str, Any]) -> None:
        """Print how a run ended, and how long the others will take."""
        self.statuses.append(str(status["status"]))
        num_ended = len(self.statuses)
        value = primary_metric_value(job.folder)
        result = f"{value:.5g}" if value is not None else str(status.get("message") or "")
        left = self.total - num_ended
        seconds = (time.monotonic() - self._start) / num_ended * left
        say(
            f"[{num_ended}/{self.total}] {status['status']} {_name(job)}: {result}"
            + (f"; {_duration(seconds)} left" if left else "")
        )


def say(line: str) -> None:
    """Print a line at once; training goes on if its reader has gone away."""
    try:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        pass


def _name(job: Job) -> str:
    run = job.run
    return f"{run.recipe} {run.optimizer} lr {format_lr(run.lr)} seed {run.seed}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{rest} s"
