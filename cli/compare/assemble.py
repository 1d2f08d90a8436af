"""From the folders of the runs to the comparison that reports are written from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any, Literal

from .comparison import (
    Comparison,
    Costs,
    Entry,
    LearningRate,
    Ratios,
    RunResult,
    TaskComparison,
    ToTarget,
    Verdict,
)
from .grid import Grid, Run, expand
from .notes import notes_of
from .plan import read_plan
from .results import Metrics, headline_of, headline_value, read_run
from .statistics import best_of, estimate, first_reaching, profiles, to_target, verdict
from .status import read_json, read_status

__all__ = ["best_learning_rates", "load_comparison"]


def load_comparison(out: Path) -> Comparison:
    """Everything that the runs in a folder have come to, finished or not.

    Args:
        out: Folder of the comparison.

    Raises:
        ValueError: There is no comparison.
    """
    from ...tasks.metrics_file import read_metrics

    plan = read_plan(out)
    if plan is None:
        raise ValueError(f"{out} holds no comparison: there is no plan.json in it")
    grid = expand(plan)
    tasks = tuple(_task(grid, recipe, out, read_metrics) for recipe in grid.recipes)
    runs = [run for task in tasks for entry in task.entries for run in entry.runs]
    costs: tuple[Literal["steps", "seconds"], ...] = ("steps", "seconds")
    return Comparison(
        tasks=tasks,
        optimizers=tuple(grid.optimizers),
        reference=grid.reference,
        seeds=plan.seeds,
        tuning_seeds=plan.tuning_seeds,
        profiles={cost: profiles(_times(tasks, cost)) for cost in costs},
        hardware=tuple({repr(sorted(run.hardware.items())): run.hardware for run in runs if run.hardware}.values()),
        versions=_versions(runs),
        command=plan.command,
        created=plan.created,
        notes=tuple(notes_of(grid)),
    )


def best_learning_rates(grid: Grid, out: Path) -> dict[tuple[str, str], float]:
    """The best learning rate of each recipe and label on the tuning seeds; none where no run came to its end."""
    best = {}
    for (recipe, label), lrs in grid.lrs.items():
        mode, tuning = "min", {}
        for lr in lrs:
            folders = [out / grid.folder(Run(recipe, label, lr, seed)) for seed in grid.plan.tuning_seeds]
            values = [value for folder in folders if (value := headline_value(folder)) is not None]
            if values:
                done = next(folder for folder in folders if read_status(folder)["status"] == "done")
                mode = headline_of(read_json(done / "result.json")).mode
            tuning[lr] = estimate(values)
        if (chosen := best_of(tuning, mode)) is not None:
            best[recipe, label] = chosen
    return best


def _task(grid: Grid, recipe: str, out: Path, read_metrics: Callable[[Path], Metrics]) -> TaskComparison:
    best = best_learning_rates(grid, out)
    tuning = set(grid.plan.tuning_seeds)
    runs = {
        label: [
            read_run(grid, Run(recipe, label, lr, seed), out, read_metrics)
            for lr in grid.lrs[recipe, label]
            for seed in grid.plan.seeds
            # Other seeds run at the best learning rate alone, and at one that was the best of an earlier start.
            if seed in tuning
            or lr == best.get((recipe, label))
            or (out / grid.folder(Run(recipe, label, lr, seed))).exists()
        ]
        for label in grid.optimizers
    }
    results = [read_json(run.folder / "result.json") for own in runs.values() for run in own if run.status == "done"]
    headline = headline_of(next((result for result in results if result), {}))
    reference = _at(runs[grid.reference], best.get((recipe, grid.reference)))
    last = estimate(run.curve[-1].value for run in reference if run.status == "done" and run.curve)
    target = last.mean if last else None
    entries = tuple(
        _entry(grid, label, best.get((recipe, label)), runs[label], reference, target, headline.mode)
        for label in grid.optimizers
    )
    unit = next((run.costs.unit for own in runs.values() for run in own if run.costs.unit), "samples")
    return TaskComparison(
        recipe=recipe,
        title=grid.recipes[recipe].title,
        headline=headline,
        unit=unit,
        target=target,
        entries=entries,
    )


def _entry(
    grid: Grid,
    label: str,
    best_lr: float | None,
    runs: list[RunResult],
    reference: list[RunResult],
    target: float | None,
    mode: Literal["min", "max"],
) -> Entry:
    ours = _at(runs, best_lr)
    tuning = grid.plan.tuning_seeds
    lrs = {lr: _learning_rate(lr, _at(runs, lr), tuning) for lr in sorted({run.lr for run in runs})}
    costs, other = _middle_costs(ours), _middle_costs(reference)
    if label == grid.reference:
        judged = Verdict(word="reference", text="reference")
    else:
        missing = sum(run.value is None for run in (*ours, *reference))
        judged = verdict(_values(ours), _values(reference), mode, missing=missing)
    return Entry(
        optimizer=label,
        options=grid.optimizers[label].arguments,
        lrs=lrs,
        best_lr=best_lr,
        runs=tuple(runs),
        final=estimate(_values(ours)),
        steps_to_target=_to_target(ours, target, mode, "step"),
        seconds_to_target=_to_target(ours, target, mode, "seconds"),
        costs=costs,
        ratios=Ratios(**{field.name: _ratio(costs, other, field.name) for field in fields(Ratios)}),
        verdict=judged,
        message=_message(lrs, best_lr, runs),
    )


def _learning_rate(lr: float, runs: list[RunResult], tuning: tuple[int, ...]) -> LearningRate:
    values = {run.seed: run.value for run in runs}
    on_tuning = [values.get(seed) for seed in tuning]
    found = [value for value in on_tuning if value is not None]
    return LearningRate(
        lr=lr,
        values=values,
        statuses={run.seed: run.status for run in runs},
        tuning=estimate(found),
        eligible=len(found) == len(tuning),
    )


def _message(lrs: Mapping[float, LearningRate], best_lr: float | None, runs: list[RunResult]) -> str:
    """Why there is no figure, or what its reader must know."""
    bad = [run for run in runs if run.status != "done"]
    if best_lr is None:
        return next((run.message for run in bad if run.message), "no run has come to its end")
    if not lrs[best_lr].eligible:
        return "at each learning rate a seed did not come to its end: the best of the others"
    if lost := [run for run in bad if run.lr == best_lr]:
        told = f": {lost[0].message}" if lost[0].message else ""
        return f"seed {', '.join(str(run.seed) for run in lost)} {lost[0].status}{told}"
    if len(lrs) > 2 and best_lr in (min(lrs), max(lrs)):
        side = "smallest" if best_lr == min(lrs) else "largest"
        return f"its best learning rate is the {side} of those tried: a better one may lie beyond"
    return ""


def _to_target(
    runs: list[RunResult], target: float | None, mode: Literal["min", "max"], what: Literal["step", "seconds"]
) -> ToTarget:
    if target is None:
        return to_target({})
    reached = {run.seed: first_reaching(run.curve, target, mode) for run in runs if run.status == "done"}
    if what == "seconds" and any(point is not None and point.seconds is None for point in reached.values()):
        return to_target({})  # not logged, which is not never
    return to_target({seed: None if point is None else getattr(point, what) for seed, point in reached.items()})


def _middle_costs(runs: list[RunResult]) -> Costs:
    """Medians over the runs that came to their end."""
    found: dict[str, Any] = {}
    for name in (field.name for field in fields(Costs)):
        values = [value for run in runs if run.status == "done" and (value := getattr(run.costs, name)) is not None]
        found[name] = None if not values else values[0] if isinstance(values[0], str) else median(values)
    return Costs(**found)


def _ratio(ours: Costs, reference: Costs, name: str) -> float | None:
    one, other = getattr(ours, name), getattr(reference, name)
    return one / other if one is not None and other else None


def _times(tasks: tuple[TaskComparison, ...], cost: str) -> dict[str, dict[str, float | None]]:
    return {
        task.recipe: {entry.optimizer: getattr(entry, f"{cost}_to_target").median for entry in task.entries}
        for task in tasks
    }


def _versions(runs: list[RunResult]) -> dict[str, str]:
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for name, version in run.versions.items():
            found.setdefault(name, {})[str(version)] = None
    return {name: ", ".join(versions) for name, versions in found.items()}


def _at(runs: list[RunResult], lr: float | None) -> list[RunResult]:
    return [run for run in runs if run.lr == lr]


def _values(runs: list[RunResult]) -> list[float]:
    return [run.value for run in runs if run.value is not None]
