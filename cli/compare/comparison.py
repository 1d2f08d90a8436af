"""What a comparison has found, as frozen values: what reports are written from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .outcomes import Estimate, Profile, ToTarget, Verdict
from .run_records import Costs, PrimaryMetric, RunResult, Status

__all__ = ["Comparison", "Entry", "LearningRate", "Ratios", "TaskComparison"]


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """What one learning rate of an optimizer came to.

    Args:
        lr: The peak learning rate.
        values: PrimaryMetric figure by seed, of all seeds that ran with it; None where a run did not come to its end.
        statuses: How each of them ended, by seed.
        tuning: Estimate of the figure that chooses, over the tuning seeds that came to their end; None where none did.
        unfinished: Tuning seeds that neither came to their end nor diverged: the rate was not tried as planned.
        eligible: Whether all tuning seeds came to their end, so that it may be the best.
    """

    lr: float
    values: Mapping[int, float | None]
    statuses: Mapping[int, Status]
    tuning: Estimate | None
    unfinished: tuple[int, ...]
    eligible: bool


@dataclass(frozen=True, kw_only=True)
class Ratios:
    """Costs in units of the reference's; None where one of them is not known."""

    step_milliseconds: float | None = None
    optimizer_milliseconds: float | None = None
    peak_memory_bytes: float | None = None
    optimizer_state_bytes: float | None = None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One optimizer on one task.

    Args:
        optimizer: Its label.
        options: Its options on the command line, without the learning rate.
        lrs: What each learning rate came to, in rising order.
        best_lr: The best of them; None where no run came to its end.
        runs: All its runs, by learning rate and seed.
        final: PrimaryMetric figure at the best learning rate, over all seeds.
        steps_to_target: Optimizer steps to the target.
        seconds_to_target: Seconds of training to the target.
        costs: Medians over the seeds at the best learning rate.
        ratios: Costs in units of the reference's.
        verdict: The comparison with the reference.
        message: Why there is no figure, or what to know about it; empty otherwise.
    """

    optimizer: str
    options: tuple[str, ...]
    lrs: Mapping[float, LearningRate]
    best_lr: float | None
    runs: tuple[RunResult, ...]
    final: Estimate | None
    steps_to_target: ToTarget
    seconds_to_target: ToTarget
    costs: Costs
    ratios: Ratios
    verdict: Verdict
    message: str = ""

    @property
    def best_runs(self) -> tuple[RunResult, ...]:
        """The runs at the best learning rate, by seed."""
        return tuple(run for run in self.runs if run.lr == self.best_lr)


@dataclass(frozen=True, kw_only=True)
class TaskComparison:
    """All optimizers on one recipe.

    Args:
        recipe: The recipe as the user named it.
        title: First line of the recipe.
        primary_metric: What runs are compared by.
        target: Median over the seeds of the last value of the reference's curve at its best learning rate, of an even
            number the worse of the middle two; a seed that diverged is worse than any other. So half of its seeds at
            least reach it. None where the reference has none.
        entries: One for each optimizer, in the order of the command.
    """

    recipe: str
    title: str
    primary_metric: PrimaryMetric
    target: float | None
    entries: tuple[Entry, ...]

    def entry(self, optimizer: str) -> Entry:
        """The entry of a label."""
        return next(entry for entry in self.entries if entry.optimizer == optimizer)

    @property
    def selection_differs(self) -> bool:
        """Whether the learning rates were chosen by another figure than the primary metric."""
        runs = (run for entry in self.entries for run in entry.runs if run.status == "done")
        return any(run.selection != run.value for run in runs)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A whole comparison.

    Args:
        tasks: One for each recipe, in the order of the command.
        optimizers: Labels, in the order of the command.
        reference: Label of the optimizer that the others are compared with.
        seeds: All seeds.
        tuning_seeds: Those on which learning rates were chosen.
        profiles: Performance profiles over the tasks, by `steps` and by `seconds`.
        hardware: Each machine that took part, as `result.json` has it.
        versions: Versions of the software; where runs differ, all of them, with commas.
        command: The command of the comparison.
        created: Its first start, ISO 8601 in UTC.
        notes: What a reader must know: definitions, and settings that differ between optimizers.
    """

    tasks: tuple[TaskComparison, ...]
    optimizers: tuple[str, ...]
    reference: str
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    profiles: Mapping[Literal["steps", "seconds"], tuple[Profile, ...]]
    hardware: tuple[Mapping[str, Any], ...]
    versions: Mapping[str, str]
    command: tuple[str, ...]
    created: str
    notes: tuple[str, ...]

    @property
    def runs(self) -> tuple[RunResult, ...]:
        """All runs of all tasks."""
        return tuple(run for task in self.tasks for entry in task.entries for run in entry.runs)

    @property
    def statuses(self) -> dict[Status, int]:
        """How many runs ended in each way."""
        counts: dict[Status, int] = {}
        for run in self.runs:
            counts[run.status] = counts.get(run.status, 0) + 1
        return counts
