"""An early end to runs whose callbacks wait for a figure that nobody logs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint, ModelSummary, ProgressBar

from ..base import Task
from .checkpoint import HEADLINE
from .performance import FIGURES

__all__ = ["MonitorCheck"]

_SILENT = (Checkpoint, EarlyStopping, ModelSummary, ProgressBar)
"""Callbacks from elsewhere that log nothing."""


class MonitorCheck(Callback):
    """Tells that a figure which EarlyStopping or ModelCheckpoint monitor is not logged, and which are.

    Before training where the task says what it logs and no other callback may log more, else when the figure is first
    looked for. It stands before those callbacks.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare with what the task says that it logs.

        Raises:
            ValueError: A monitored figure is not among it.
        """
        own = vars(type(pl_module)).get("logged_metrics")
        if stage != "fit" or own is None or not isinstance(pl_module, Task):
            return
        package = __name__.partition(".")[0]
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if all(isinstance(each, _SILENT) or type(each).__module__.startswith(f"{package}.") for each in callbacks):
            known = {*own, *FIGURES, f"{pl_module.unit}_per_second"}
            for callback in _monitoring(trainer):
                _check(callback, pl_module, known, own)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look before those that look after a validation.

        Raises:
            ValueError: A monitored figure was not logged.
        """
        if not trainer.sanity_checking:
            self._check_logged(trainer, pl_module, at_epoch_end=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look before those that look after an epoch of training; see `on_validation_end`."""
        self._check_logged(trainer, pl_module, at_epoch_end=True)

    def _check_logged(self, trainer: Trainer, pl_module: LightningModule, *, at_epoch_end: bool) -> None:
        if trainer.state.fn != "fit":
            return
        for callback in _monitoring(trainer):
            if isinstance(callback, EarlyStopping):
                looks = callback._check_on_train_epoch_end is at_epoch_end
            else:
                # Where no validation has run, a figure of one may still come.
                validated = trainer.fit_loop.epoch_loop.val_loop._has_run
                looks = validated and callback._should_save_on_train_epoch_end(trainer) is at_epoch_end
            if looks:
                logged = trainer.callback_metrics
                _check(callback, pl_module, logged, sorted(logged))


def _monitoring(trainer: Trainer) -> list[Any]:
    """Callbacks that cannot do without a figure."""
    if getattr(trainer, "fast_dev_run", False):
        return []
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [
        each
        for each in callbacks
        if (isinstance(each, EarlyStopping) and each.strict)
        or (isinstance(each, ModelCheckpoint) and each.monitor is not None and each.save_top_k != 0)
    ]


def _check(callback: Any, module: LightningModule, known: Collection[str], told: Collection[str]) -> None:
    if callback.monitor not in known and callback.monitor != HEADLINE:  # which the checkpoint replaces in its setup
        whose = "checkpoint" if isinstance(callback, ModelCheckpoint) else type(callback).__name__
        raise ValueError(
            f"{whose} monitors {callback.monitor!r}, which {type(module).__name__} does not log; it logs "
            f"{', '.join(told) or 'nothing'}"
        )
