"""What a run folder says about its run: `status.json`, `result.json` and `metrics.jsonl`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from ...tasks.atomic_files import read_json
from ...tasks.base import PrimaryMetric
from .grid import Grid, Run
from .status import RunStatus, read_status

__all__ = [
    "Costs",
    "Point",
    "RunRecord",
    "primary_metric_value",
    "read_primary_metric",
    "read_record",
    "selection_value",
]

Metrics = dict[str, dict[int, float]]


@dataclass(frozen=True)
class Point:
    """One value of a curve.

    Args:
        step: Optimizer steps taken.
        seconds: Seconds of training until then, without validation; None if the run did not log them.
        value: The value.
    """

    step: int
    seconds: float | None
    value: float


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Costs of a run on one rank; None if unknown. The names are those in `result.json`.

    Args:
        step_milliseconds: Time of a training step.
        optimizer_milliseconds: The part of it that the optimizer's update takes.
        units_per_second: Throughput over all ranks.
        unit: What throughput counts: samples, tokens, nodes.
        peak_memory_bytes: Peak memory, measured.
        optimizer_state_bytes: The optimizer state, measured.
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
        """Parameters, gradients of the same size and optimizer state, predicted; without activations."""
        if self.parameter_bytes is None or self.predicted_state_bytes is None:
            return None
        return 2 * self.parameter_bytes + self.predicted_state_bytes


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run of the grid, finished or not.

    Args:
        recipe: The recipe as the user named it.
        optimizer: Label of the optimizer.
        lr: Peak learning rate.
        seed: Seed of the run.
        folder: The run folder.
        status: How it ended.
        message: Why it did not finish; empty otherwise.
        value: Primary metric; None unless the run is done.
        selection: The metric that chooses the learning rate, never a test metric; None unless the run is done.
        steps: Optimizer steps taken; None without a result.
        curve: The validated metric, one point for each validation.
        costs: Time and memory.
        hardware: As in `result.json`.
        versions: As in `result.json`.
        command: The command of the run, as a user would type it.
        wall_seconds: Seconds from the start of the process to its end, summed over all starts.
        num_jobs: Runs at a time, including this one; None if that was not recorded or unlimited.
        launcher: What started it, `local` or `submitit`; None if that was not recorded.
    """

    recipe: str
    optimizer: str
    lr: float
    seed: int
    folder: Path
    status: RunStatus
    message: str = ""
    value: float | None = None
    selection: float | None = None
    steps: int | None = None
    curve: tuple[Point, ...] = ()
    costs: Costs = Costs()
    hardware: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    wall_seconds: float | None = None
    num_jobs: int | None = None
    launcher: str | None = None


def read_record(
    grid: Grid, run: Run, out: Path, primary_metric: PrimaryMetric, read_metrics: Callable[[Path], Metrics]
) -> RunRecord:
    """Read a run of the grid, finished or not.

    Args:
        grid: The grid.
        run: The run.
        out: Folder of the comparison.
        primary_metric: That of the task, which a diverged run may not have written.
        read_metrics: Reads `metrics.jsonl` of a run folder.
    """
    folder = out / grid.folder(run)
    status, result = read_status(folder), read_json(folder / "result.json")
    word: RunStatus = status["status"] if status["status"] in get_args(RunStatus) else "pending"
    command = map(str, status.get("command") or ["adam-mini", *grid.arguments(run, out)])
    is_done, num_jobs, launcher = word == "done", status.get("num_jobs"), status.get("launcher")
    metrics = read_metrics(folder)
    seconds, costs = metrics.get("training_seconds", {}), result.get("costs") or {}
    return RunRecord(
        recipe=run.recipe,
        optimizer=run.optimizer,
        lr=run.lr,
        seed=run.seed,
        folder=folder,
        status=word,
        message=str(status.get("message") or ""),
        value=primary_metric_value(folder),
        selection=selection_value(folder),
        steps=result.get("steps") if is_done else None,
        curve=tuple(
            Point(step, seconds.get(step), value)
            for step, value in metrics.get(primary_metric.curve, {}).items()
            if step
        ),
        costs=Costs(**{each.name: costs.get(each.name) for each in fields(Costs)}) if is_done else Costs(),
        hardware=result.get("hardware") or {},
        versions=result.get("versions") or {},
        # A start that resumed from a checkpoint has it in its command, but it is not part of the experiment.
        command=tuple(part for part in command if part != "--ckpt_path=last"),
        wall_seconds=status.get("wall_seconds"),
        num_jobs=num_jobs if isinstance(num_jobs, int) else None,
        launcher=launcher if isinstance(launcher, str) else None,
    )


def primary_metric_value(folder: Path) -> float | None:
    """The primary metric of a run; None unless it is done."""
    return _finite(_primary_metric_of_done(folder).get("value"))


def selection_value(folder: Path) -> float | None:
    """The metric of a run that chooses the learning rate; None unless the run is done.

    That is the primary metric if `result.json` names no other.
    """
    metric = _primary_metric_of_done(folder)
    return _finite(metric.get("selection", metric.get("value")))


def read_primary_metric(folders: Iterable[Path]) -> PrimaryMetric:
    """The primary metric of a task, from the first of its runs that has one; validation loss by default."""
    for folder in folders:
        metric = read_json(folder / "result.json").get("primary_metric")
        if isinstance(metric, dict):
            name = str(metric["metric"])
            return PrimaryMetric(
                metric=name,
                mode="max" if metric.get("mode") == "max" else "min",
                label=str(metric.get("label") or name),
                validated=metric.get("curve"),
                validated_label=metric.get("curve_label"),
            )
    return PrimaryMetric()


def _primary_metric_of_done(folder: Path) -> Mapping[str, Any]:
    if read_status(folder)["status"] != "done":
        return {}
    return read_json(folder / "result.json").get("primary_metric") or {}


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
