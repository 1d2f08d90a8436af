"""What a comparison has found, as frozen values: what reports are written from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = [
    "Comparison",
    "Costs",
    "Entry",
    "Estimate",
    "Headline",
    "LearningRate",
    "Point",
    "Profile",
    "Ratios",
    "RunResult",
    "Status",
    "TaskComparison",
    "ToTarget",
    "Verdict",
]

Status = Literal["done", "diverged", "failed", "timeout", "interrupted", "pending"]
"""How a run ended; `pending` has not begun, or is not yet over."""


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The figure that runs of a task are compared by.

    Args:
        metric: Its name; the last value of a run counts.
        mode: Whether less (`min`) or more (`max`) is better.
        label: Its name for readers.
        curve: The metric of each validation that is drawn over steps; `metric` itself where a task names no other.
    """

    metric: str = "val_loss"
    mode: Literal["min", "max"] = "min"
    label: str = "validation loss"
    curve: str = "val_loss"


@dataclass(frozen=True)
class Point:
    """One value of a curve.

    Args:
        step: Optimizer steps taken.
        seconds: Seconds of training until then, without validation; None where a run did not log them.
        value: The value.
    """

    step: int
    seconds: float | None
    value: float


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a run cost on one rank; None where it is not known. Names are those of `result.json`.

    Args:
        step_milliseconds: Time of a training step.
        optimizer_milliseconds: Of it the optimizer's update.
        units_per_second: Throughput over all ranks.
        unit: What throughput counts: samples, tokens, nodes.
        peak_memory_bytes: Peak memory, measured.
        optimizer_state_bytes: The optimizer's state, measured.
        predicted_state_bytes: The same, predicted from the shapes before training.
        adamw_state_bytes: AdamW's state for the same model, predicted.
        parameters: Number of parameters.
        parameter_bytes: Their bytes.
        training_seconds: Seconds of all training steps, without validation.
    """

    step_milliseconds: float | None = None
    optimizer_milliseconds: float | None = None
    units_per_second: float | None = None
    unit: str | None = None
    peak_memory_bytes: float | None = None
    optimizer_state_bytes: float | None = None
    predicted_state_bytes: float | None = None
    adamw_state_bytes: float | None = None
    parameters: float | None = None
    parameter_bytes: float | None = None
    training_seconds: float | None = None

    @property
    def predicted_memory_bytes(self) -> float | None:
        """Parameters, gradients of the same size and the optimizer's state, predicted; activations are not in it."""
        if self.parameter_bytes is None or self.predicted_state_bytes is None:
            return None
        return 2 * self.parameter_bytes + self.predicted_state_bytes


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One run of the grid, whether it came to its end or not.

    Args:
        recipe: The recipe as the user named it.
        optimizer: Label of the optimizer.
        lr: Peak learning rate.
        seed: Seed of the run.
        folder: The run folder.
        status: How it ended.
        message: Why it did not end well; empty otherwise.
        value: Headline figure; None unless the run is done.
        steps: Optimizer steps taken; None where it left no result.
        curve: The headline's curve, one point a validation.
        train_curve: The training loss, one point a row of the log.
        metrics: Last value of each metric.
        costs: What it cost.
        hardware: As `result.json` has it.
        versions: As `result.json` has it.
        command: The command of the run, as a user would type it.
        wall_seconds: Seconds from the start of the process to its end, of all starts together.
    """

    recipe: str
    optimizer: str
    lr: float
    seed: int
    folder: Path
    status: Status
    message: str = ""
    value: float | None = None
    steps: int | None = None
    curve: tuple[Point, ...] = ()
    train_curve: tuple[Point, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    costs: Costs = Costs()
    hardware: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    wall_seconds: float | None = None


@dataclass(frozen=True)
class Estimate:
    """Mean and sample standard deviation of `n` values; a single value has no deviation."""

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """What one learning rate of an optimizer came to on the tuning seeds.

    Args:
        lr: The peak learning rate.
        values: Headline figure by seed, of all seeds that ran with it; None where a run did not come to its end.
        statuses: How each of them ended, by seed.
        tuning: Estimate over the tuning seeds that came to their end; None where none did.
        eligible: Whether all tuning seeds came to their end, so that it may be the best.
    """

    lr: float
    values: Mapping[int, float | None]
    statuses: Mapping[int, Status]
    tuning: Estimate | None
    eligible: bool


@dataclass(frozen=True, kw_only=True)
class ToTarget:
    """When the curve first reached the target at the best learning rate.

    Args:
        by_seed: Optimizer steps, or seconds of training; None where it never did.
        median: Median over the seeds, a seed that never did counting as later than any other; None is never.
    """

    by_seed: Mapping[int, float | None]
    median: float | None


@dataclass(frozen=True, kw_only=True)
class Ratios:
    """Costs in units of the reference's; None where one of them is not known."""

    step_milliseconds: float | None = None
    optimizer_milliseconds: float | None = None
    peak_memory_bytes: float | None = None
    optimizer_state_bytes: float | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether the difference to the reference exceeds the spread over seeds.

    Args:
        word: `better`, `worse` and `within the spread` say where the interval of the difference lies; `reference`
            stands for itself; `no verdict` where there are too few values.
        text: The verdict for readers, with the reason where there is none.
        difference: Mean headline figure less the reference's.
        interval: 95 % confidence interval of the difference, by Welch's t (Welch 1947).
        p_value: Two-sided, of no difference.
    """

    word: Literal["better", "worse", "within the spread", "reference", "no verdict"]
    text: str
    difference: float | None = None
    interval: tuple[float, float] | None = None
    p_value: float | None = None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One optimizer on one task.

    Args:
        optimizer: Its label.
        options: Its options on the command line, without the learning rate.
        lrs: What each learning rate came to, in rising order.
        best_lr: The best of them; None where no run came to its end.
        runs: All its runs, by learning rate and seed.
        final: Headline figure at the best learning rate, over all seeds.
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
        headline: What runs are compared by.
        unit: What throughput counts.
        target: Mean over the seeds of the last value of the reference's curve at its best learning rate; None where
            the reference has no run that came to its end.
        entries: One for each optimizer, in the order of the command.
    """

    recipe: str
    title: str
    headline: Headline
    unit: str
    target: float | None
    entries: tuple[Entry, ...]

    def entry(self, optimizer: str) -> Entry:
        """The entry of a label."""
        return next(entry for entry in self.entries if entry.optimizer == optimizer)


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
