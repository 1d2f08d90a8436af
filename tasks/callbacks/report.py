"""Files that a run writes at its end: the report, its result as JSON, plots, and predictions."""

from __future__ import annotations

import json
import logging
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lightning_adam_mini.factory import AdamMini
from lightning_adam_mini.measure import (
    adamw_state_bytes,
    describe_machine,
    optimizer_state_bytes,
    package_versions,
)
from lightning_adam_mini.partition import EVIDENCE, PAPERS, RECOMMENDED, resolve_strategy

from ..atomic_files import write_json, write_text
from ..base import Task
from ..data.module import SampledDataModule, write_record
from ..metrics import read_metrics
from ..plots import draw_curves

__all__ = ["PredictionFile", "RunReport", "run_result"]

log = logging.getLogger(__name__)

Metrics = dict[str, dict[int, float]]

_SHOWN_PREDICTIONS = 8
_CURVES = (
    ("train_loss", "train loss", {"linewidth": 0.9, "alpha": 0.6}),
    ("val_loss", "val loss", {"marker": "o", "markersize": 4}),
)


class RunReport(Callback):
    """Writes `report.md`, `result.json` and pictures to the run folder when training ends, and logs the report."""

    def __init__(self) -> None:
        self._trained = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the record of the data to the run folder."""
        self._trained = True
        data = getattr(trainer, "datamodule", None)
        writes = trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False)
        if writes and isinstance(data, SampledDataModule):
            write_record(Path(trainer.default_root_dir), data.record())

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Have the last step validated, whatever the interval: Lightning validates when `should_stop` is set."""
        if 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files from the metrics of the whole run."""
        if getattr(trainer, "fast_dev_run", False) or not isinstance(pl_module, Task):
            return
        folder = Path(trainer.default_root_dir)
        if not self._trained:
            rank_zero_warn(
                f"no step was left to train: the checkpoint is at step {trainer.global_step}; raise trainer.max_steps "
                "or trainer.max_epochs"
            )
            if (folder / "result.json").exists():
                return  # otherwise it was killed between its last checkpoint and its report
        metrics = read_metrics(folder)
        result = run_result(trainer, pl_module, metrics)
        write_json(folder / "result.json", result)
        pictures = {"loss curve": folder / "loss_curve.png"}
        draw_curves(pictures["loss curve"], metrics, _CURVES, ylabel="loss")
        pictures |= pl_module.pictures(folder)
        lines = {
            "steps": f"{trainer.global_step}",
            "optimizer": type(pl_module.optimizer_factory).__name__,
            **pl_module.summary(),
            **_cost_lines(result["costs"]),
            **_recommendation(pl_module, result["costs"]["adamw_state_bytes"]),
            **{name: str(path) for name, path in pictures.items()},
        }
        width = max(map(len, lines))
        log.info("%s", "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items()))
        text = f"# {folder.name}\n\n" + "".join(f"- **{name}**: {value}\n" for name, value in lines.items())
        write_text(folder / "report.md", text)


def _cost_lines(costs: dict[str, Any]) -> dict[str, str]:
    own, adamw = costs["optimizer_state_bytes"], costs["adamw_state_bytes"]
    lines = {
        "parameters": f"{costs['parameters']:,}",
        "optimizer state": f"{own / 1e6:.2f} MB; AdamW's for this model: {adamw / 1e6:.2f} MB ({own / adamw:.1%})",
    }
    for name, label, scale, unit in (
        ("units_per_second", "throughput", 1.0, f"{costs['unit']}/s"),
        ("step_milliseconds", "step time", 1.0, "ms"),
        ("optimizer_milliseconds", "of which the optimizer's update", 1.0, "ms"),
        ("peak_memory_bytes", "peak memory", 1e-6, "MB"),
    ):
        if costs[name] is not None:
            lines[label] = f"{costs[name] * scale:,.1f} {unit}"
    return lines


def _recommendation(task: Task, adamw_bytes: int) -> dict[str, str]:
    """Where the partition is one of the papers', what the recommended one would keep."""
    factory = task.optimizer_factory
    if not isinstance(factory, AdamMini):
        return {}
    strategy = resolve_strategy(factory.partition, task, factory.partition_layouts)
    if strategy.name not in PAPERS:
        return {}
    name: Any = RECOMMENDED.name
    state = replace(factory, partition=name, partition_overrides={}).predict_state_bytes(task)
    share = state / adamw_bytes
    return {"recommended partition": f"{name}, {state / 1e6:.2f} MB ({share:.1%} of AdamW's); {EVIDENCE}"}


def run_result(trainer: Trainer, task: Task, metrics: Metrics) -> dict[str, Any]:
    """The result of a run as an object that JSON holds, for comparisons of runs.

    Args:
        trainer: After its fit.
        task: The task that was trained.
        metrics: Those of `read_metrics`, of all starts of the run.

    Returns:
        `steps`; `optimizer`, its name and options; `primary_metric`, the task's with its last `value` and that of the
        metric that chooses hyperparameters, `selection`; `metrics`, the last value of each; `costs`, medians over the
        rows of the log, bytes and seconds; `hardware`, `versions`, `command`. Values that were not measured, or are not
        finite, are None.
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


class PredictionFile(Callback):
    """Writes the predictions to `predictions.jsonl` in the run folder, one JSON object a line, and logs the first few.

    `predict_step` of a task returns a list of objects that JSON can hold. The file is written when all predictions are
    made. Each rank but the first writes a file of its own, unless the model is sharded, where all ranks predict the
    same.
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Keep the batch's predictions."""
        if _repeats_rank_zero(trainer, pl_module):
            return
        for row in outputs or []:
            self._rows.append(row)
            if len(self._rows) <= _SHOWN_PREDICTIONS:
                log.info("%s", "\n".join(f"{key}: {value}" for key, value in row.items()))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        if _repeats_rank_zero(trainer, pl_module):
            return
        rank = f".rank{trainer.global_rank}" if trainer.global_rank else ""
        path = Path(trainer.default_root_dir) / f"predictions{rank}.jsonl"
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self._rows))
        total, self._rows = len(self._rows), []
        log.info("%s", f"{total} predictions: {path}")


def _repeats_rank_zero(trainer: Trainer, pl_module: LightningModule) -> bool:
    return trainer.global_rank > 0 and getattr(pl_module, "is_sharded", False)
