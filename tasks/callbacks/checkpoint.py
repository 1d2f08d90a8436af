"""The checkpoints of a run: the best, and always the newest."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from ..base import Task
from ..in_place import beside, put_in_place, remove, sweep

__all__ = ["HEADLINE", "RunCheckpoint"]

HEADLINE = "primary_metric"
"""Monitors the metric of the task's primary_metric, whatever it is."""


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint in the run folder, with a `last.ckpt` that is never older than the last validation.

    With `monitor: primary_metric` the best checkpoint is the best by the task's own primary_metric.

    Lightning itself writes `last.ckpt` only where the monitored metric has improved: a run that no longer improves
    would lose everything since then.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose what is best and the folder, and remove what a killed process left half written there."""
        if self.monitor == HEADLINE and isinstance(pl_module, Task):
            self.monitor, self.mode = pl_module.primary_metric.curve, pl_module.primary_metric.mode
            self.kth_value = torch.tensor(torch.inf if self.mode == "min" else -torch.inf)
        if self.dirpath is None:
            self.dirpath = os.path.realpath(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero:
            sweep(Path(self.dirpath))
            sweep(Path(trainer.default_root_dir))  # where SLURM has a job saved that it queues again

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
        if self._should_skip_saving_checkpoint(trainer):
            return
        candidates = self._monitor_candidates(trainer)
        if self.save_last == "link":  # what is saved is older, so there is nothing to lead to
            self.last_model_path = self.format_checkpoint_name(candidates, self.CHECKPOINT_NAME_LAST)
            self._save_checkpoint(trainer, self.last_model_path)
        else:
            self._save_last_checkpoint(trainer, candidates)

    @staticmethod
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        if trainer.is_global_zero and Path(filepath).absolute() != Path(linkpath).absolute():
            _link(Path(filepath), Path(linkpath))
        trainer.strategy.barrier()

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        last, newest = Path(self.last_model_path), self._last_checkpoint_saved
        if trainer.is_global_zero and last.is_symlink() and last.resolve() == Path(filepath).resolve():
            _link(Path(newest), last)  # Lightning does it after the removal: a kill in between would lose the last
        super()._remove_checkpoint(trainer, filepath)


def _link(target: Path, link: Path) -> None:
    new = beside(link)
    remove(new)
    new.symlink_to(os.path.relpath(target, link.parent))
    put_in_place(new, link)
