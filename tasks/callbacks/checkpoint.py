"""Checkpoints of a run, the best and the newest, and an early error where a monitored metric is never logged."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint, ModelSummary, ProgressBar

from ..atomic_files import replacing, sweep
from ..base import Task
from .monitoring import PERFORMANCE_METRICS

__all__ = ["PRIMARY_METRIC", "MonitorCheck", "RunCheckpoint"]

PRIMARY_METRIC = "primary_metric"
"""Value of `monitor` for the primary metric of whichever task is trained."""

_LOG_NOTHING = (Checkpoint, EarlyStopping, ModelSummary, ProgressBar)
"""Lightning's callbacks that log no metrics."""


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint in the run folder, with a `last.ckpt` that is never older than the last validation.

    With `monitor: primary_metric` the best checkpoint has the best value of the task's primary metric.

    Lightning's own writes `last.ckpt` only when the monitored metric has improved: a run that no longer improves would
    lose all steps since then.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set metric and folder, and remove the incomplete files of killed processes."""
        if self.monitor == PRIMARY_METRIC and isinstance(pl_module, Task):
            self.monitor, self.mode = pl_module.primary_metric.curve, pl_module.primary_metric.mode
            self.kth_value = torch.tensor(torch.inf if self.mode == "min" else -torch.inf)
        if self.dirpath is None:
            self.dirpath = os.path.realpath(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero:
            sweep(Path(self.dirpath))
            sweep(Path(trainer.default_root_dir))  # Lightning saves requeued SLURM jobs there

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the best and the newest."""
        super().on_validation_end(trainer, pl_module)
        if not self._should_save_on_train_epoch_end(trainer):
            self._save_newest(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the best and the newest, if checkpoints are saved at the end of epochs."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._should_save_on_train_epoch_end(trainer):
            self._save_newest(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the state after the last step, if no validation has."""
        self._save_newest(trainer)

    def _save_newest(self, trainer: Trainer) -> None:
        if self._should_skip_saving_checkpoint(trainer):
            return
        candidates = self._monitor_candidates(trainer)
        if self.save_last == "link":  # the best checkpoint is older, so there is no file to link to
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
            _link(Path(newest), last)  # Lightning links after the removal: a kill in between would lose `last`
        super()._remove_checkpoint(trainer, filepath)


def _link(target: Path, link: Path) -> None:
    with replacing(link) as new:
        new.symlink_to(os.path.relpath(target, link.parent))


class MonitorCheck(Callback):
    """Reports that a metric which EarlyStopping or ModelCheckpoint monitor is not logged, and which metrics are.

    It does so before training if the task declares its metrics and no other callback may log more, and else when the
    metric is first read. It has to come before those callbacks.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare with the metrics that the task declares.

        Raises:
            ValueError: A monitored metric is not among them.
        """
        own = vars(type(pl_module)).get("logged_metrics")
        if stage != "fit" or own is None or not isinstance(pl_module, Task):
            return
        package = __name__.partition(".")[0]
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if all(isinstance(each, _LOG_NOTHING) or type(each).__module__.startswith(f"{package}.") for each in callbacks):
            known = {*own, *PERFORMANCE_METRICS, f"{pl_module.unit}_per_second"}
            for callback in _monitoring(trainer):
                _check(callback, pl_module, known, own)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check before callbacks read metrics after a validation.

        Raises:
            ValueError: A monitored metric was not logged.
        """
        if not trainer.sanity_checking:
            self._check_logged(trainer, pl_module, at_epoch_end=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check before callbacks read metrics after an epoch of training; see `on_validation_end`."""
        self._check_logged(trainer, pl_module, at_epoch_end=True)

    def _check_logged(self, trainer: Trainer, pl_module: LightningModule, *, at_epoch_end: bool) -> None:
        if trainer.state.fn != "fit":
            return
        for callback in _monitoring(trainer):
            if isinstance(callback, EarlyStopping):
                reads = callback._check_on_train_epoch_end is at_epoch_end
            else:
                # Before the first validation, its metrics are still to come.
                validated = trainer.fit_loop.epoch_loop.val_loop._has_run
                reads = validated and callback._should_save_on_train_epoch_end(trainer) is at_epoch_end
            if reads:
                logged = trainer.callback_metrics
                _check(callback, pl_module, logged, sorted(logged))


def _monitoring(trainer: Trainer) -> list[Any]:
    """Callbacks that fail, or save nothing, without their metric."""
    if getattr(trainer, "fast_dev_run", False):
        return []
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [
        each
        for each in callbacks
        if (isinstance(each, EarlyStopping) and each.strict)
        or (isinstance(each, ModelCheckpoint) and each.monitor is not None and each.save_top_k != 0)
    ]


def _check(callback: Any, module: LightningModule, known: Collection[str], shown: Collection[str]) -> None:
    if callback.monitor not in known and callback.monitor != PRIMARY_METRIC:  # RunCheckpoint replaces it in its setup
        whose = "checkpoint" if isinstance(callback, ModelCheckpoint) else type(callback).__name__
        raise ValueError(
            f"{whose} monitors {callback.monitor!r}, which {type(module).__name__} does not log; it logs "
            f"{', '.join(shown) or 'nothing'}"
        )
