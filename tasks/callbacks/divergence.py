"""An end to runs that have diverged, before they overwrite the last good checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_adam_mini.optim.distributed import local

__all__ = ["DivergenceError", "StopOnDivergence"]


class DivergenceError(ValueError):
    """Training has diverged: a loss or a weight is not finite."""

    exit_code = 3
    """Of the process, so that whoever started many runs can tell these from wrong options."""


class StopOnDivergence(Callback):
    """Stops where the training loss, the validation loss or a weight is not finite, and saves nothing from then on.

    The first bad step is noted on the device, and read where the trainer logs, validates or saves: asking after every
    step would make the host wait for the device.

    Raises:
        DivergenceError: With the step, and the last good checkpoint.
    """

    def __init__(self) -> None:
        self._first_bad: Tensor | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier run."""
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss, and stop at the logging interval."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor) and self._first_bad is not None:
            bad = (self._first_bad < 0) & ~loss.detach().isfinite().all()
            self._first_bad.masked_fill_(bad, trainer.global_step)
        interval = cast("Any", trainer).log_every_n_steps
        if interval and trainer.global_step % interval == 0:
            self._check_training(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before a validation that would end in a checkpoint."""
        self._check_training(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop where gradients were not finite though the losses were: the validation shows it."""
        loss = trainer.callback_metrics.get("val_loss")
        if self._first_bad is not None and loss is not None and not torch.isfinite(loss).all():
            _stop(trainer, f"the validation loss is {float(loss)} after step {trainer.global_step}")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save no weights that are not finite."""
        self._check_training(trainer, pl_module)
        if self._first_bad is None:
            return
        bad = next((name for name, p in pl_module.named_parameters() if not local(p.detach()).isfinite().all()), None)
        if trainer.strategy.reduce_boolean_decision(bad is not None, all=False):
            _stop(trainer, f"{bad or 'a parameter on another rank'} is not finite after step {trainer.global_step}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop where the last steps were bad."""
        self._check_training(trainer, pl_module)

    def _check_training(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._first_bad is None:
            return
        step = int(self._first_bad)
        if trainer.strategy.reduce_boolean_decision(step >= 0, all=False):
            where = f"at step {step}" if step >= 0 else f"on another rank by step {trainer.global_step}"
            _stop(trainer, f"the training loss is not finite {where}")


def _stop(trainer: Trainer, what: str) -> NoReturn:
    lr = max(group["lr"] for group in trainer.optimizers[0].param_groups)
    folder = Path(
        getattr(trainer.checkpoint_callback, "dirpath", None) or Path(trainer.default_root_dir) / "checkpoints"
    )
    last = folder / "last.ckpt"
    kept = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint was saved before"
    raise DivergenceError(
        f"training has diverged: {what}; lower --optimizer.lr (now {float(lr):.3g}), lengthen --schedule.warmup "
        f"or clip gradients; {kept}"
    )
