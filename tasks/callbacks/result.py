"""What a run came to, as an object that JSON holds: for whoever compares runs."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict
from statistics import median
from typing import Any

from lightning.pytorch import Trainer

from lightning_adam_mini.measure import (
    adamw_state_bytes,
    describe_machine,
    optimizer_state_bytes,
    package_versions,
)

from ..base import Task

__all__ = ["run_result"]

Metrics = dict[str, dict[int, float]]


def run_result(trainer: Trainer, task: Task, metrics: Metrics) -> dict[str, Any]:
    """The result of a run.

    Args:
        trainer: After its fit.
        task: What was trained.
        metrics: As `read_metrics` gives them, of all starts of the run.

    Returns:
        `steps`; `optimizer`, its name and options; `primary_metric`, the task's with its last `value` and that of the
        metric that chooses hyperparameters, `selection`; `metrics`, the last value of each; `costs`, medians over the
        rows of the log, bytes and seconds; `hardware`, `versions`, `command`.
        Figures that were not measured, or are not numbers, are None.
    """
    primary_metric = task.primary_metric
    last = {name: _number(list(values.values())[-1]) for name, values in metrics.items() if values}
    return {
        "steps": trainer.global_step,
        "optimizer": {"name": type(task.optimizer_factory).__name__, **asdict(task.optimizer_factory)},
        "primary_metric": {
            "metric": primary_metric.metric,
            "mode": primary_metric.mode,
            "label": primary_metric.label,
            "curve": primary_metric.curve,
            "curve_label": primary_metric.curve_label,
            "value": last.get(primary_metric.metric),
            "selection": last.get(primary_metric.selection),
        },
        "metrics": last,
        "costs": _costs(trainer, task, metrics),
        "hardware": describe_machine(),
        "versions": package_versions(),
        "command": sys.argv,
    }


def _costs(trainer: Trainer, task: Task, metrics: Metrics) -> dict[str, Any]:
    parameters = [p for p in task.parameters() if p.requires_grad]
    finite = {name: [v for v in values.values() if math.isfinite(v)] for name, values in metrics.items()}
    middle = {name: median(values) for name, values in finite.items() if values}
    training_seconds = list(metrics.get("training_seconds", {}).values())
    return {
        "step_milliseconds": middle.get("step_milliseconds"),
        "optimizer_milliseconds": middle.get("optimizer_milliseconds"),
        "units_per_second": middle.get(f"{task.unit}_per_second"),
        "unit": task.unit,
        "peak_memory_bytes": max(metrics.get("peak_memory_bytes", {}).values(), default=None),
        "optimizer_state_bytes": sum(optimizer_state_bytes(optimizer) for optimizer in trainer.optimizers),
        "predicted_state_bytes": task.optimizer_factory.predict_state_bytes(task),
        "adamw_state_bytes": adamw_state_bytes(parameters),
        "parameters": sum(p.numel() for p in parameters),
        "parameter_bytes": sum(p.numel() * p.element_size() for p in parameters),
        "training_seconds": training_seconds[-1] if training_seconds else None,
    }


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
