"""The comparison as rows for other programs: every run, and every optimizer on every task."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from ..comparison import Ratios
from ..run_records import Costs

if TYPE_CHECKING:
    from ..comparison import Comparison, Entry, TaskComparison
    from ..run_records import RunResult

__all__ = ["RUN_COLUMNS", "SUMMARY_COLUMNS", "run_rows", "summary_rows"]

COSTS = tuple(field.name for field in fields(Costs))
RATIOS = tuple(field.name for field in fields(Ratios))

RUN_COLUMNS = (
    *("recipe", "optimizer", "lr", "seed", "status", "message", "is_best_lr", "is_tuning_seed"),
    *("primary_metric", "primary_metric_mode", "value", "selection", "steps", *COSTS),
    *("wall_seconds", "num_jobs", "folder", "command"),
)
SUMMARY_COLUMNS = (
    *("recipe", "optimizer", "is_reference", "options", "best_lr", "num_lrs", "primary_metric", "primary_metric_mode"),
    *("mean", "std", "n", "verdict", "difference", "interval_low", "interval_high", "p_value", "target"),
    *("steps_to_target", "seconds_to_target", *COSTS, *(f"{name}_ratio" for name in RATIOS), "message"),
)


def run_rows(comparison: Comparison) -> list[Sequence[object]]:
    """One row a run, in the order of the comparison."""
    return [
        _run_row(comparison, task, entry, run)
        for task in comparison.tasks
        for entry in task.entries
        for run in entry.runs
    ]


def summary_rows(comparison: Comparison) -> list[Sequence[object]]:
    """One row for each optimizer on each task."""
    return [_summary_row(comparison, task, entry) for task in comparison.tasks for entry in task.entries]


def _run_row(comparison: Comparison, task: TaskComparison, entry: Entry, run: RunResult) -> Sequence[object]:
    return (
        *(run.recipe, run.optimizer, run.lr, run.seed, run.status, run.message),
        *(run.lr == entry.best_lr, run.seed in comparison.tuning_seeds),
        *(task.primary_metric.metric, task.primary_metric.mode, run.value, run.selection, run.steps),
        *(getattr(run.costs, name) for name in COSTS),
        *(run.wall_seconds, run.num_jobs, run.folder, shlex.join(run.command)),
    )


def _summary_row(comparison: Comparison, task: TaskComparison, entry: Entry) -> Sequence[object]:
    final, verdict = entry.final, entry.verdict
    low, high = verdict.interval or (None, None)
    return (
        *(task.recipe, entry.optimizer, entry.optimizer == comparison.reference, shlex.join(entry.options)),
        *(entry.best_lr, len(entry.lrs), task.primary_metric.metric, task.primary_metric.mode),
        *((final.mean, final.std, final.n) if final else (None, None, 0)),
        *(verdict.word, verdict.difference, low, high, verdict.p_value, task.target),
        *(entry.steps_to_target.median, entry.seconds_to_target.median),
        *(getattr(entry.costs, name) for name in COSTS),
        *(getattr(entry.ratios, name) for name in RATIOS),
        entry.message,
    )
