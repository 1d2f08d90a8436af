"""From the folders of the runs to the comparison that reports are written from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from .comparison import Comparison, TaskComparison
from .entries import Side, make_entry
from .grid import Grid, Run, expand
from .notes import notes_of
from .plan import Plan, read_plan
from .recipe import copy_of, read_recipe
from .results import Metrics, read_run, task_primary_metric
from .run_result import RunResult
from .selection import best_learning_rates
from .statistics import profiles, target_of
from .status import FINISHED

__all__ = ["load_comparison"]


def load_comparison(out: Path) -> Comparison:
    """Everything that the runs in a folder have come to, finished or not.

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
    tasks = tuple(_task(grid, recipe, out, best, read_metrics) for recipe in grid.recipes)
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
        notes=tuple(notes_of(grid, runs)),
    )


def _check_recipes(plan: Plan, out: Path) -> None:
    """Refuse a recipe that has changed: other learning rates would be looked for than have run."""
    for name in plan.recipes:
        recipe = read_recipe(name, out)
        if recipe.digest != plan.digests.get(name, recipe.digest):
            raise ValueError(
                f"{recipe.path} is not the recipe that {out} was begun with; restore it, or put what it was in "
                f"{copy_of(name, out)}"
            )


def _task(
    grid: Grid,
    recipe: str,
    out: Path,
    best: dict[tuple[str, str], float],
    read_metrics: Callable[[Path], Metrics],
) -> TaskComparison:
    runs = {label: _runs(grid, recipe, label, best.get((recipe, label)), out) for label in grid.optimizers}
    primary_metric = task_primary_metric(out / grid.folder(run) for own in runs.values() for run in own)
    sides = {
        label: Side(
            label,
            tuple(read_run(grid, run, out, primary_metric, read_metrics) for run in own),
            best.get((recipe, label)),
        )
        for label, own in runs.items()
    }
    reference = sides[grid.reference]
    target = target_of(_last_values(reference.at_best), primary_metric.mode)
    return TaskComparison(
        recipe=recipe,
        title=grid.recipes[recipe].title,
        primary_metric=primary_metric,
        target=target,
        entries=tuple(make_entry(grid, side, reference, target, primary_metric.mode) for side in sides.values()),
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


def _last_values(runs: Sequence[RunResult]) -> list[float | None]:
    """The last value of each finished run's curve; None of one that diverged."""
    return [
        run.curve[-1].value if run.status == "done" and run.curve else None for run in runs if run.status in FINISHED
    ]


def _times(tasks: tuple[TaskComparison, ...], cost: str) -> dict[str, dict[str, float | None]]:
    return {
        task.recipe: {entry.optimizer: getattr(entry, f"{cost}_to_target").median for entry in task.entries}
        for task in tasks
    }


def _versions(runs: Sequence[RunResult]) -> dict[str, str]:
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for name, version in run.versions.items():
            found.setdefault(name, {})[str(version)] = None
    return {name: ", ".join(versions) for name, versions in found.items()}
