"""What a comparison has found: from the folders of its runs to frozen values, which the report is written from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any, Literal

from ...tasks.base import PrimaryMetric
from .grid import Grid, Run, copy_of, expand, format_lr, read_recipe
from .notes import notes_of
from .run_records import Costs, Metrics, RunRecord, read_primary_metric, read_record, selection_value
from .spec import ComparisonPlan, read_plan
from .stats import (
    MeanStd,
    PerformanceProfile,
    TimeToTarget,
    Verdict,
    best_of,
    first_reaching,
    mean_std,
    performance_profiles,
    target_of,
    time_to_target,
    verdict_of,
)
from .status import FINISHED, RunStatus

__all__ = [
    "Comparison",
    "CostRatios",
    "LearningRate",
    "OptimizerSummary",
    "TaskComparison",
    "analyse_task",
    "best_learning_rates",
    "load_comparison",
]

ENDS = {"timeout": "ran out of time", "interrupted": "was interrupted", "pending": "is pending"}
"""How a run ended, after its seed; other statuses are used as they are."""

COST_AXES: tuple[Literal["steps", "seconds"], ...] = ("steps", "seconds")


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """The runs of an optimizer at one learning rate.

    Args:
        lr: The peak learning rate.
        values: Seed -> primary metric, of all seeds that ran with it; None if a run did not finish.
        statuses: Seed -> how its run ended.
        tuning: Mean over the tuning seeds of the metric that chooses the learning rate; None if no seed finished.
        unfinished: Tuning seeds that neither finished nor diverged: the rate was not tried as planned.
        eligible: Whether all tuning seeds finished, so that it may be the best.
    """

    lr: float
    values: Mapping[int, float | None]
    statuses: Mapping[int, RunStatus]
    tuning: MeanStd | None
    unfinished: tuple[int, ...]
    eligible: bool


@dataclass(frozen=True, kw_only=True)
class CostRatios:
    """Costs divided by the reference's; None if one of them is unknown."""

    step_milliseconds: float | None = None
    optimizer_milliseconds: float | None = None
    peak_memory_bytes: float | None = None
    optimizer_state_bytes: float | None = None


@dataclass(frozen=True, kw_only=True)
class OptimizerSummary:
    """One optimizer on one task.

    Args:
        optimizer: Its label.
        options: Its options on the command line, without the learning rate.
        lrs: Its learning rates, ascending.
        best_lr: The best of them; None if no run finished.
        runs: All its runs, by learning rate and seed.
        final: Primary metric at the best learning rate, over all seeds.
        steps_to_target: Optimizer steps to the target.
        seconds_to_target: Seconds of training to the target.
        costs: Medians over the seeds at the best learning rate.
        ratios: Costs divided by the reference's.
        verdict: The comparison with the reference.
        message: Why there is no value, or what to know about it; empty otherwise.
    """

    optimizer: str
    options: tuple[str, ...]
    lrs: Mapping[float, LearningRate]
    best_lr: float | None
    runs: tuple[RunRecord, ...]
    final: MeanStd | None
    steps_to_target: TimeToTarget
    seconds_to_target: TimeToTarget
    costs: Costs
    ratios: CostRatios
    verdict: Verdict
    message: str = ""

    @property
    def best_runs(self) -> tuple[RunRecord, ...]:
        """The runs at the best learning rate, by seed."""
        return tuple(run for run in self.runs if run.lr == self.best_lr)


@dataclass(frozen=True, kw_only=True)
class TaskComparison:
    """All optimizers on one recipe.

    Args:
        recipe: The recipe as the user named it.
        title: First line of the recipe.
        primary_metric: What runs are compared by.
        target: Median over the seeds of the last value of the reference's curve at its best learning rate, for an even
            number the worse of the middle two; a seed that diverged is worse than any other. So at least half of its
            seeds reach it. None if the reference has none.
        summaries: One for each optimizer, in the order of the command.
    """

    recipe: str
    title: str
    primary_metric: PrimaryMetric
    target: float | None
    summaries: tuple[OptimizerSummary, ...]

    def summary_of(self, optimizer: str) -> OptimizerSummary:
        """The summary of a label."""
        return next(summary for summary in self.summaries if summary.optimizer == optimizer)

    @property
    def selection_differs(self) -> bool:
        """Whether another metric than the primary one chose the learning rates."""
        runs = (run for summary in self.summaries for run in summary.runs if run.status == "done")
        return any(run.selection != run.value for run in runs)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A whole comparison.

    Args:
        tasks: One for each recipe, in the order of the command.
        optimizers: Labels, in the order of the command.
        reference: Label of the optimizer that the others are compared with.
        seeds: All seeds.
        tuning_seeds: Those that chose the learning rates.
        profiles: Performance profiles over the tasks, by `steps` and by `seconds`.
        hardware: Each machine that took part, as in `result.json`.
        versions: Versions of the software, comma-separated if runs differ.
        command: The command of the comparison.
        created: Its first start, ISO 8601 in UTC.
        notes: What a reader must know: definitions, and settings that differ between optimizers.
    """

    tasks: tuple[TaskComparison, ...]
    optimizers: tuple[str, ...]
    reference: str
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    profiles: Mapping[Literal["steps", "seconds"], tuple[PerformanceProfile, ...]]
    hardware: tuple[Mapping[str, Any], ...]
    versions: Mapping[str, str]
    command: tuple[str, ...]
    created: str
    notes: tuple[str, ...]

    @property
    def runs(self) -> tuple[RunRecord, ...]:
        """All runs of all tasks."""
        return tuple(run for task in self.tasks for summary in task.summaries for run in summary.runs)

    @property
    def statuses(self) -> dict[RunStatus, int]:
        """How many runs ended in each way."""
        counts: dict[RunStatus, int] = {}
        for run in self.runs:
            counts[run.status] = counts.get(run.status, 0) + 1
        return counts


def load_comparison(out: Path) -> Comparison:
    """Read all runs in the folder of a comparison, finished or not.

    Args:
        out: Folder of the comparison.

    Raises:
        ValueError: There is no comparison, or a recipe of it has changed and there is no copy.
    """
    from ...tasks.metrics import read_metrics

    plan = read_plan(out)
    if plan is None:
        raise ValueError(f"{out} holds no comparison: there is no plan.json in it")
    _check_recipes(plan, out)
    grid = expand(plan, out)
    best = best_learning_rates(grid, out)
    tasks = tuple(_load_task(grid, recipe, out, best, read_metrics) for recipe in grid.recipes)
    runs = [run for task in tasks for summary in task.summaries for run in summary.runs]
    versions: dict[str, dict[str, None]] = {}
    for run in runs:
        for name, version in run.versions.items():
            versions.setdefault(name, {})[str(version)] = None
    return Comparison(
        tasks=tasks,
        optimizers=tuple(grid.optimizers),
        reference=grid.reference,
        seeds=plan.seeds,
        tuning_seeds=plan.tuning_seeds,
        profiles=profiles_of(tasks),
        hardware=tuple({repr(sorted(run.hardware.items())): run.hardware for run in runs if run.hardware}.values()),
        versions={name: ", ".join(found) for name, found in versions.items()},
        command=plan.command,
        created=plan.created,
        notes=tuple(notes_of(grid, runs)),
    )


def _check_recipes(plan: ComparisonPlan, out: Path) -> None:
    """Refuse a recipe that has changed: its multiples would give other learning rates than those that have run."""
    for name in plan.recipes:
        recipe = read_recipe(name, out)
        if recipe.digest != plan.digests.get(name, recipe.digest):
            raise ValueError(
                f"{recipe.path} is not the recipe that {out} began with; restore it, or put its earlier content into "
                f"{copy_of(name, out)}"
            )


def best_learning_rates(grid: Grid, out: Path) -> dict[tuple[str, str], float]:
    """(recipe, label) -> its best learning rate on the tuning seeds, if any run finished.

    A validation metric chooses, also if the primary metric is a test metric.

    Args:
        grid: The grid.
        out: Folder of the comparison.
    """
    best = {}
    for (recipe, label), lrs in grid.lrs.items():
        folders = {
            lr: [out / grid.folder(Run(recipe, label, lr, seed)) for seed in grid.plan.tuning_seeds] for lr in lrs
        }
        values = {lr: [selection_value(folder) for folder in own] for lr, own in folders.items()}
        tuning = {lr: mean_std(value for value in own if value is not None) for lr, own in values.items()}
        mode = read_primary_metric(folder for own in folders.values() for folder in own).mode
        if (chosen := best_of(tuning, mode)) is not None:
            best[recipe, label] = chosen
    return best


def profiles_of(
    tasks: Sequence[TaskComparison],
) -> dict[Literal["steps", "seconds"], tuple[PerformanceProfile, ...]]:
    """Performance profiles over the tasks."""
    return {
        axis: performance_profiles(
            {
                task.recipe: {
                    summary.optimizer: getattr(summary, f"{axis}_to_target").median for summary in task.summaries
                }
                for task in tasks
            }
        )
        for axis in COST_AXES
    }


def _load_task(
    grid: Grid,
    recipe: str,
    out: Path,
    best: Mapping[tuple[str, str], float],
    read_metrics: Callable[[Path], Metrics],
) -> TaskComparison:
    runs = {label: _runs(grid, recipe, label, best.get((recipe, label)), out) for label in grid.optimizers}
    primary_metric = read_primary_metric(out / grid.folder(run) for own in runs.values() for run in own)
    return analyse_task(
        {
            label: [read_record(grid, run, out, primary_metric, read_metrics) for run in own]
            for label, own in runs.items()
        },
        recipe=recipe,
        title=grid.recipes[recipe].title,
        primary_metric=primary_metric,
        tuning_seeds=grid.plan.tuning_seeds,
        best_lrs={label: best.get((recipe, label)) for label in runs},
        options={label: choice.arguments for label, choice in grid.optimizers.items()},
        reference=grid.reference,
    )


def _runs(grid: Grid, recipe: str, label: str, best_lr: float | None, out: Path) -> list[Run]:
    """The runs of an optimizer: all seeds at its best learning rate, and the tuning seeds at the others."""
    runs = [Run(recipe, label, lr, seed) for lr in grid.lrs[recipe, label] for seed in grid.plan.seeds]
    return [
        run
        for run in runs
        # Some ran at what was the best learning rate of an earlier start.
        if run.seed in grid.plan.tuning_seeds or run.lr == best_lr or (out / grid.folder(run)).exists()
    ]


def analyse_task(
    runs: Mapping[str, Sequence[RunRecord]],
    *,
    recipe: str,
    title: str,
    primary_metric: PrimaryMetric,
    tuning_seeds: tuple[int, ...],
    best_lrs: Mapping[str, float | None],
    options: Mapping[str, tuple[str, ...]],
    reference: str,
) -> TaskComparison:
    """Compare the optimizers on one task.

    Args:
        runs: Label -> its runs.
        recipe: The recipe as the user named it.
        title: First line of the recipe.
        primary_metric: What runs are compared by.
        tuning_seeds: The seeds that chose the learning rates.
        best_lrs: Label -> its best learning rate; None if no run finished.
        options: Label -> its options on the command line.
        reference: Label of the reference.
    """
    mode = primary_metric.mode
    all_runs = {
        label: _OptimizerRuns(label, tuple(own), best_lrs[label], tuning_seeds, options[label])
        for label, own in runs.items()
    }
    last = [
        run.curve[-1].value if run.status == "done" and run.curve else None
        for run in all_runs[reference].at_best
        if run.status in FINISHED
    ]
    target = target_of(last, mode)
    return TaskComparison(
        recipe=recipe,
        title=title,
        primary_metric=primary_metric,
        target=target,
        summaries=tuple(_summarise(own, all_runs[reference], target, mode) for own in all_runs.values()),
    )


@dataclass(frozen=True)
class _OptimizerRuns:
    """The runs of one optimizer on one task."""

    label: str
    runs: tuple[RunRecord, ...]
    best_lr: float | None
    tuning_seeds: tuple[int, ...]
    options: tuple[str, ...]

    @property
    def at_best(self) -> tuple[RunRecord, ...]:
        """Those at the best learning rate."""
        return tuple(run for run in self.runs if run.lr == self.best_lr)

    @property
    def values(self) -> list[float]:
        """Primary metric of the seeds that finished at the best learning rate."""
        return [run.value for run in self.at_best if run.value is not None]

    @property
    def costs(self) -> Costs:
        """Medians over the runs that finished at the best learning rate."""
        found: dict[str, Any] = {}
        for name in (each.name for each in fields(Costs)):
            values = [
                value
                for run in self.at_best
                if run.status == "done" and (value := getattr(run.costs, name)) is not None
            ]
            found[name] = None if not values else values[0] if isinstance(values[0], str) else median(values)
        return Costs(**found)

    @property
    def lrs(self) -> dict[float, LearningRate]:
        """Its learning rates, ascending."""
        found = {}
        for lr in sorted({run.lr for run in self.runs}):
            own = [run for run in self.runs if run.lr == lr]
            tuning = [run for run in own if run.seed in self.tuning_seeds]
            values = [run.selection for run in tuning if run.selection is not None]
            found[lr] = LearningRate(
                lr=lr,
                values={run.seed: run.value for run in own},
                statuses={run.seed: run.status for run in own},
                tuning=mean_std(values),
                unfinished=tuple(run.seed for run in tuning if run.status not in FINISHED),
                eligible=len(values) == len(self.tuning_seeds),
            )
        return found


def _summarise(
    ours: _OptimizerRuns, reference: _OptimizerRuns, target: float | None, mode: Literal["min", "max"]
) -> OptimizerSummary:
    is_reference = ours.label == reference.label
    lrs, reference_lrs = ours.lrs, reference.lrs
    costs, reference_costs = ours.costs, reference.costs
    return OptimizerSummary(
        optimizer=ours.label,
        options=ours.options,
        lrs=lrs,
        best_lr=ours.best_lr,
        runs=ours.runs,
        final=mean_std(ours.values),
        steps_to_target=_time_to_target(ours.at_best, target, mode, "step"),
        seconds_to_target=_time_to_target(ours.at_best, target, mode, "seconds"),
        costs=costs,
        ratios=CostRatios(**{each.name: _ratio(costs, reference_costs, each.name) for each in fields(CostRatios)}),
        verdict=Verdict(word="reference", text="reference")
        if is_reference
        else _verdict(ours, reference, mode, [*lrs.values(), *reference_lrs.values()]),
        message=_message(ours, lrs, "" if is_reference else _left_out(reference_lrs, f"{reference.label}'s ")),
    )


def _verdict(ours: _OptimizerRuns, reference: _OptimizerRuns, mode: str, lrs: Iterable[LearningRate]) -> Verdict:
    if ours.runs and all(run.status == "failed" for run in ours.runs):
        return Verdict(word="failed", text="every run failed")
    missing = sum(run.value is None for run in (*ours.at_best, *reference.at_best))
    unfinished = sum(len(rate.unfinished) for rate in lrs)
    return verdict_of(ours.values, reference.values, mode, missing=missing, unfinished=unfinished)


def _message(ours: _OptimizerRuns, lrs: Mapping[float, LearningRate], of_reference: str) -> str:
    """Why there is no value, or what its reader must know."""
    if ours.best_lr is None:
        return next((run.message for run in ours.runs if run.message), "no run has finished")
    parts = []
    lost = [run for run in ours.at_best if run.status != "done"]
    if not lrs[ours.best_lr].eligible:
        parts.append("at each learning rate a seed did not finish: the best of the others")
    elif lost:
        reason = f": {lost[0].message}" if lost[0].message else ""
        parts.append(_ends({run.seed: run.status for run in lost}) + reason)
    parts += filter(None, (_left_out(lrs), of_reference))
    if len(lrs) > 2 and ours.best_lr in (min(lrs), max(lrs)):
        place = "smallest" if ours.best_lr == min(lrs) else "largest"
        parts.append(f"its best learning rate is the {place} one tried: a better one may lie beyond")
    return "; ".join(parts)


def _left_out(lrs: Mapping[float, LearningRate], owner: str = "") -> str:
    """The learning rates that were not tried on all tuning seeds, although the optimizer did not diverge."""
    # If each rate has lost a seed, none is left out.
    verb = " was left out" if any(rate.eligible for rate in lrs.values()) else ""
    return "; ".join(
        f"{owner}lr {format_lr(lr)}{verb}: {_ends({seed: rate.statuses[seed] for seed in rate.unfinished})}"
        for lr, rate in lrs.items()
        if rate.unfinished
    )


def _ends(statuses: Mapping[int, str]) -> str:
    """`seed 1 failed, seed 2 ran out of time`."""
    return ", ".join(f"seed {seed} {ENDS.get(status, status)}" for seed, status in statuses.items())


def _time_to_target(
    runs: Sequence[RunRecord], target: float | None, mode: str, axis: Literal["step", "seconds"]
) -> TimeToTarget:
    if target is None:
        return time_to_target({})
    # A run that diverged never reaches the target, whatever it reached before; one that was stopped might have.
    reached = {
        run.seed: first_reaching(run.curve, target, mode) if run.status == "done" else None
        for run in runs
        if run.status in FINISHED
    }
    if axis == "seconds" and any(point is not None and point.seconds is None for point in reached.values()):
        return time_to_target({})  # not logged, which is not never
    return time_to_target({seed: None if point is None else getattr(point, axis) for seed, point in reached.items()})


def _ratio(ours: Costs, reference: Costs, name: str) -> float | None:
    one, other = getattr(ours, name), getattr(reference, name)
    return one / other if one is not None and other else None
