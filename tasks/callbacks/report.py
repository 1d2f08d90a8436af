"""The report of a run: what came out, what it cost, and a picture of the loss."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from ..base import Task
from ..curves import draw_curves
from ..data.module import SampledDataModule
from ..data.record import write_record
from ..metrics_file import read_metrics
from ..run_files import write_text
from .result import run_result

__all__ = ["RunReport"]

log = logging.getLogger(__name__)

_CURVES = (
    ("train_loss", "train loss", {"linewidth": 0.9, "alpha": 0.6}),
    ("val_loss", "val loss", {"marker": "o", "markersize": 4}),
)


class RunReport(Callback):
    """Writes `report.md`, `result.json` and pictures to the run folder when training ends, and logs the report."""

    def __init__(self) -> None:
        self._trained = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that there is something to report, and write down what the data give outputs for a meaning."""
        self._trained = True
        data = getattr(trainer, "datamodule", None)
        if (
            trainer.is_global_zero
            and not getattr(trainer, "fast_dev_run", False)
            and isinstance(data, SampledDataModule)
        ):
            write_record(Path(trainer.default_root_dir), data.record())

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Have the last step validated, whatever the interval: Lightning validates where training is asked to stop."""
        if 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files, from the metrics of the whole run."""
        if getattr(trainer, "fast_dev_run", False) or not isinstance(pl_module, Task):
            return
        folder = Path(trainer.default_root_dir)
        if not self._trained:
            rank_zero_warn(
                f"no step was left to train: the checkpoint is at step {trainer.global_step}; raise trainer.max_steps "
                "or trainer.max_epochs"
            )
            if (folder / "result.json").exists():
                return  # else the run was killed between its last checkpoint and its report
        metrics = read_metrics(folder)
        result = run_result(trainer, pl_module, metrics)
        write_text(folder / "result.json", json.dumps(result, indent=1) + "\n")
        pictures = {"loss curve": folder / "loss_curve.png"}
        draw_curves(pictures["loss curve"], metrics, _CURVES, ylabel="loss")
        pictures |= pl_module.pictures(folder)
        lines = {
            "steps": f"{trainer.global_step}",
            "optimizer": type(pl_module.optimizer_factory).__name__,
            **pl_module.summary(),
            **_costs(result["costs"]),
            **{name: str(path) for name, path in pictures.items()},
        }
        width = max(map(len, lines))
        log.info("%s", "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items()))
        text = f"# {folder.name}\n\n" + "".join(f"- **{name}**: {value}\n" for name, value in lines.items())
        write_text(folder / "report.md", text)


def _costs(costs: dict[str, Any]) -> dict[str, str]:
    own, adamw = costs["optimizer_state_bytes"], costs["adamw_state_bytes"]
    lines = {
        "parameters": f"{costs['parameters']:,}",
        "optimizer state": f"{own / 1e6:.2f} MB; AdamW's for this model: {adamw / 1e6:.2f} MB ({own / adamw:.1%})",
    }
    for name, label, scale, unit in (
        ("units_per_second", "throughput", 1.0, f"{costs['unit']}/s"),
        ("step_milliseconds", "step time", 1.0, "ms"),
        ("optimizer_milliseconds", "of it the optimizer's update", 1.0, "ms"),
        ("peak_memory_bytes", "peak memory", 1e-6, "MB"),
    ):
        if costs[name] is not None:
            lines[label] = f"{costs[name] * scale:,.1f} {unit}"
    return lines
