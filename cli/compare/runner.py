"""The two stages of a comparison: runs that choose the learning rates, and the other seeds at the best ones."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .grid import Grid, Run
from .interruption import Interruption
from .job import Job
from .launchers import Launcher
from .progress import Progress, say
from .recipe import Recipe
from .selection import best_learning_rates
from .status import FINISHED, read_status

__all__ = ["Stages"]


@dataclass(frozen=True, kw_only=True)
class Stages:
    """What is to be trained.

    Args:
        grid: The runs.
        out: Folder of the comparison.
        launcher: Trains them.
        threads: Threads of each; None where its job decides.
        timeout: Seconds after which a start of a run is stopped; None for no limit.
        facts: What `status.json` says of the circumstances.
    """

    grid: Grid
    out: Path
    launcher: Launcher
    threads: int | None
    timeout: float | None
    facts: Mapping[str, Any]

    def train(self, interruption: Interruption) -> list[str]:
        """Train what is not finished.

        Args:
            interruption: Asks to stop.

        Returns:
            How the runs that were started ended.
        """
        plan = self.grid.plan
        tuning = self._jobs(self.grid.tuning_runs())
        num_final = (len(plan.seeds) - len(plan.tuning_seeds)) * len(self.grid.lrs)
        progress = Progress(len(tuning) + num_final)
        self.launcher.train(tuning, interruption, progress.started, progress.ended)
        if not interruption.stop.is_set():
            final = self._jobs(self.grid.final_runs(self._chosen()))
            progress.expect(len(tuning) + len(final))
            self.launcher.train(final, interruption, progress.started, progress.ended)
        return progress.statuses

    def _chosen(self) -> dict[tuple[str, str], float]:
        """The best learning rates of the cases whose tuning runs are over: others could still become the best."""
        left = Counter(
            (run.recipe, run.optimizer)
            for run in self.grid.tuning_runs()
            if read_status(self.out / self.grid.folder(run))["status"] not in FINISHED
        )
        best = best_learning_rates(self.grid, self.out)
        if len(self.grid.plan.tuning_seeds) < len(self.grid.plan.seeds):
            for recipe, label in best.keys() & left.keys():
                num = left[recipe, label]
                say(f"{recipe} {label}: the other seeds wait, for {num} of its tuning runs have no result yet")
        return {case: lr for case, lr in best.items() if case not in left}

    def _jobs(self, runs: Sequence[Run]) -> list[Job]:
        jobs = [
            Job(
                run=run,
                arguments=tuple(self.grid.arguments(run, self.out)),
                folder=self.out / self.grid.folder(run),
                working_folder=Path(self.grid.plan.folder),
                threads=self.threads,
                digest=self.grid.recipes[run.recipe].digest,
                timeout=self.timeout,
                facts=self.facts,
                environment=_own_classes(self.grid.recipes[run.recipe], Path(self.grid.plan.folder)),
            )
            for run in runs
        ]
        return [job for job in jobs if not job.is_finished()]


def _own_classes(recipe: Recipe, working_folder: Path) -> dict[str, str]:
    """Where a run finds modules that lie beside its recipe, of which it reads a copy elsewhere."""
    if not Path(recipe.name).is_absolute() or recipe.path.parent == working_folder:
        return {}
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([str(recipe.path.parent), *([before] if before else [])])}
