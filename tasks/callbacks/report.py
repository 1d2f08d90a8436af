"""The report of a run: what came out, what it cost, and a picture of the loss."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lightning_adam_mini.measure import adamw_state_bytes, optimizer_state_bytes

from ..base import Task
from ..metrics_file import read_metrics

__all__ = ["RunReport"]

log = logging.getLogger(__name__)


class RunReport(Callback):
    """Writes `report.md` and `loss_curve.png` to the run folder when training ends, and logs the report."""

    def __init__(self) -> None:
        self._trained = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that there is something to report."""
        self._trained = True

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Have the last step validated, whatever the interval: Lightning validates where training is asked to stop."""
        if 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write both files, from the metrics of the whole run."""
        if getattr(trainer, "fast_dev_run", False) or not isinstance(pl_module, Task):
            return
        if not self._trained:
            rank_zero_warn(
                f"no step was left to train: the checkpoint is at step {trainer.global_step}; raise trainer.max_steps "
                "or trainer.max_epochs"
            )
            return
        folder = Path(trainer.default_root_dir)
        metrics = read_metrics(folder)
        picture = folder / "loss_curve.png"
        _plot(metrics, picture)
        lines = {
            "steps": f"{trainer.global_step}",
            "optimizer": type(pl_module.optimizer_factory).__name__,
            **pl_module.summary(),
            **_costs(trainer, pl_module, metrics),
            "loss curve": str(picture),
        }
        width = max(map(len, lines))
        log.info("%s", "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items()))
        text = f"# {folder.name}\n\n" + "".join(f"- **{name}**: {value}\n" for name, value in lines.items())
        beside = folder / ".report.md.tmp"
        beside.write_text(text, "utf-8")
        beside.replace(folder / "report.md")


def _costs(trainer: Trainer, task: Task, metrics: dict[str, dict[int, float]]) -> dict[str, str]:
    own = sum(optimizer_state_bytes(optimizer) for optimizer in trainer.optimizers)
    adamw = adamw_state_bytes(task.parameters())
    costs = {"optimizer state": f"{own / 1e6:.2f} MB; AdamW's for this model: {adamw / 1e6:.2f} MB ({own / adamw:.1%})"}
    units = f"{task.unit}_per_second"
    for name, label, scale, unit in (
        (units, "throughput", 1.0, f"{task.unit}/s"),
        ("step_milliseconds", "step time", 1.0, "ms"),
        ("optimizer_milliseconds", "of it the optimizer's update", 1.0, "ms"),
        ("peak_memory_bytes", "peak memory", 1e-6, "MB"),
    ):
        if values := list(metrics.get(name, {}).values()):
            middle = sorted(values)[len(values) // 2]
            costs[label] = f"{middle * scale:,.1f} {unit}"
    return costs


def _plot(metrics: dict[str, dict[int, float]], path: Path) -> None:
    """Training and validation loss by step, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, style in (
        ("train_loss", {"linewidth": 0.9, "alpha": 0.6}),
        ("val_loss", {"marker": "o", "markersize": 4}),
    ):
        if values := metrics.get(name):
            axes.plot(list(values), list(values.values()), label=name.replace("_", " "), **style)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    beside = path.with_name(f".{path.name}.tmp")
    figure.savefig(beside, dpi=120, format="png")
    beside.replace(path)
