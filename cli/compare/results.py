"""Runs as they lie in their folders: `result.json`, `metrics.jsonl` and `status.json`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ...tasks.atomic_files import read_json
from .grid import Grid, Run
from .run_result import Costs, Point, PrimaryMetric, RunResult, Status
from .status import read_status

__all__ = ["primary_metric_value", "read_run", "selection_value", "task_primary_metric"]

Metrics = dict[str, dict[int, float]]

STATUSES: Mapping[str, Status] = {
    "done": "done",
    "diverged": "diverged",
    "failed": "failed",
    "timeout": "timeout",
    "interrupted": "interrupted",
}


def read_run(
    grid: Grid, run: Run, out: Path, primary_metric: PrimaryMetric, read_metrics: Callable[[Path], Metrics]
) -> RunResult:
    """A run of the grid, whether it has come to its end or not.

    Args:
        grid: The grid.
        run: The run.
        out: Folder of the comparison.
        primary_metric: That of the task, which a run that diverged may not have written.
        read_metrics: Reads `metrics.jsonl` of a run folder.
    """
    folder = out / grid.folder(run)
    told, result = read_status(folder), read_json(folder / "result.json")
    status = STATUSES.get(str(told["status"]), "pending")
    command = map(str, told.get("command") or ["adam-mini", *grid.arguments(run, out)])
    done, num_jobs, launcher = status == "done", told.get("num_jobs"), told.get("launcher")
    return RunResult(
        recipe=run.recipe,
        optimizer=run.optimizer,
        lr=run.lr,
        seed=run.seed,
        folder=folder,
        status=status,
        message=str(told.get("message") or ""),
        value=primary_metric_value(folder),
        selection=selection_value(folder),
        steps=result.get("steps") if done else None,
        curve=_curve(read_metrics(folder), primary_metric.curve),
        costs=_costs(result.get("costs") or {}) if done else Costs(),
        hardware=result.get("hardware") or {},
        versions=result.get("versions") or {},
        # A start that went on from a checkpoint says so in its command, which is no part of the experiment.
        command=tuple(part for part in command if part != "--ckpt_path=last"),
        wall_seconds=told.get("wall_seconds"),
        num_jobs=num_jobs if isinstance(num_jobs, int) else None,
        launcher=launcher if isinstance(launcher, str) else None,
    )


def primary_metric_value(folder: Path) -> float | None:
    """The primary metric of a run; None unless it is done."""
    return _finite(_told(folder).get("value"))


def selection_value(folder: Path) -> float | None:
    """The figure of a run that learning rates are chosen by; None unless it is done.

    That is the primary metric where `result.json` names no other.
    """
    told = _told(folder)
    return _finite(told.get("selection", told.get("value")))


def task_primary_metric(folders: Iterable[Path]) -> PrimaryMetric:
    """The primary metric of a task, from the first of its runs that tells it; validation loss where none does."""
    results = (read_json(folder / "result.json") for folder in folders)
    return next(
        (_primary_metric_of(result) for result in results if isinstance(result.get("primary_metric"), dict)),
        PrimaryMetric(),
    )


def _primary_metric_of(result: Mapping[str, Any]) -> PrimaryMetric:
    """The primary metric that a `result.json` names; validation loss where there is none."""
    told = result.get("primary_metric")
    if not isinstance(told, dict):
        return PrimaryMetric()
    metric = str(told["metric"])
    label = str(told.get("label") or metric)
    return PrimaryMetric(
        metric=metric,
        mode="max" if told.get("mode") == "max" else "min",
        label=label,
        curve=str(told.get("curve") or metric),
        curve_label=str(told.get("curve_label") or label),
    )


def _told(folder: Path) -> Mapping[str, Any]:
    """What a run that is done says of its primary metric."""
    if read_status(folder)["status"] != "done":
        return {}
    return read_json(folder / "result.json").get("primary_metric") or {}


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _curve(metrics: Metrics, name: str) -> tuple[Point, ...]:
    """A metric over steps, with the seconds of training until then."""
    seconds = metrics.get("training_seconds", {})
    return tuple(Point(step, seconds.get(step), value) for step, value in metrics.get(name, {}).items() if step)


def _costs(told: Mapping[str, Any]) -> Costs:
    return Costs(**{field.name: told.get(field.name) for field in fields(Costs)})
