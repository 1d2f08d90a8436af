"""Runs as they lie in their folders: `result.json`, `metrics.jsonl` and `status.json`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from .comparison import Costs, Headline, Point, RunResult, Status
from .grid import Grid, Run
from .status import read_json, read_status

__all__ = ["headline_of", "headline_value", "read_run"]

Metrics = dict[str, dict[int, float]]

STATUSES: Mapping[str, Status] = {
    "done": "done",
    "diverged": "diverged",
    "failed": "failed",
    "timeout": "timeout",
    "interrupted": "interrupted",
}


def read_run(grid: Grid, run: Run, out: Path, read_metrics: Callable[[Path], Metrics]) -> RunResult:
    """A run of the grid, whether it has come to its end or not.

    Args:
        grid: The grid.
        run: The run.
        out: Folder of the comparison.
        read_metrics: Reads `metrics.jsonl` of a run folder.
    """
    folder = out / grid.folder(run)
    told, result = read_status(folder), read_json(folder / "result.json")
    status = STATUSES.get(str(told["status"]), "pending")
    metrics = read_metrics(folder)
    command = tuple(map(str, told.get("command") or ["adam-mini", *grid.arguments(run, out)]))
    done = status == "done"
    return RunResult(
        recipe=run.recipe,
        optimizer=run.optimizer,
        lr=run.lr,
        seed=run.seed,
        folder=folder,
        status=status,
        message=str(told.get("message") or ""),
        value=headline_value(folder),
        steps=result.get("steps") if done else None,
        curve=_curve(metrics, headline_of(result).curve),
        train_curve=_curve(metrics, "train_loss"),
        metrics=result.get("metrics") or {} if done else {},
        costs=_costs(result.get("costs") or {}) if done else Costs(),
        hardware=result.get("hardware") or {},
        versions=result.get("versions") or {},
        command=command,
        wall_seconds=told.get("wall_seconds"),
    )


def headline_value(folder: Path) -> float | None:
    """The headline figure of a run; None unless it is done."""
    if read_status(folder)["status"] != "done":
        return None
    value = (read_json(folder / "result.json").get("headline") or {}).get("value")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def headline_of(result: Mapping[str, Any]) -> Headline:
    """The headline that a `result.json` names; validation loss where there is none."""
    told = result.get("headline")
    if not isinstance(told, dict):
        return Headline()
    metric = str(told["metric"])
    return Headline(
        metric=metric,
        mode="max" if told.get("mode") == "max" else "min",
        label=str(told.get("label") or metric),
        curve=str(told.get("curve") or metric),
    )


def _curve(metrics: Metrics, name: str) -> tuple[Point, ...]:
    """A metric over steps, with the seconds of training until then."""
    seconds = metrics.get("training_seconds", {})
    return tuple(Point(step, seconds.get(step), value) for step, value in metrics.get(name, {}).items() if step)


def _costs(told: Mapping[str, Any]) -> Costs:
    return Costs(**{field.name: told.get(field.name) for field in fields(Costs)})
