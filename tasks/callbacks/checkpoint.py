"""The checkpoints of a run: the best, and always the newest."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from ..base import Task

__all__ = ["HEADLINE", "RunCheckpoint"]

HEADLINE = "headline"
"""Monitors the metric of the task's headline, whatever it is."""


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint in the run folder, with a `last.ckpt` that is never older than the last validation.

    With `monitor: headline` the best checkpoint is the best by the task's own headline.

    Lightning itself writes `last.ckpt` only where the monitored metric has improved: a run that no longer improves
    would lose everything since then.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose what is best and the folder, and remove what a killed process left half written there."""
        if self.monitor == HEADLINE and isinstance(pl_module, Task):
            self.monitor, self.mode = pl_module.headline.curve, pl_module.headline.mode
            self.kth_value = torch.tensor(torch.inf if self.mode == "min" else -torch.inf)
        if self.dirpath is None:
            self.dirpath = os.path.realpath(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero:
            for leftover in Path(self.dirpath).glob(".*.ckpt.*.tmp"):
                leftover.unlink(missing_ok=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the best and the newest."""
        super().on_validation_end(trainer, pl_module)
        if not self._should_save_on_train_epoch_end(trainer):
            self._save_newest(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the best and the newest, where validation ends with the epoch."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._should_save_on_train_epoch_end(trainer):
            self._save_newest(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the state after the last step, where no validation has done so; Lightning would in a fast_dev_run."""
        self._save_newest(trainer)

    def _save_newest(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
