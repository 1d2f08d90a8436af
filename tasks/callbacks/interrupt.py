"""Ctrl-C between two steps, not within one."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["GracefulInterrupt"]

log = logging.getLogger(__name__)


class GracefulInterrupt(Callback):
    """On Ctrl-C: finishes the optimizer step, saves `last.ckpt` and says where. A second Ctrl-C stops at once.

    A checkpoint that is saved within a step would hold weights of which only some are updated.
    """

    def __init__(self) -> None:
        self._interrupted = False
        self._previous: Any = None
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signal; only the main thread can."""
        self._last_step = trainer.global_step
        try:
            self._previous = signal.signal(signal.SIGINT, self._interrupt)
        except ValueError:
            self._previous = None

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        log.warning("Ctrl-C: finishing this step and saving a checkpoint; once more stops at once.")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save and stop where a step has just been completed."""
        stepped = trainer.global_step != self._last_step
        self._last_step = trainer.global_step
        if not (self._interrupted and stepped):
            return
        checkpoint = trainer.checkpoint_callback
        folder = getattr(checkpoint, "dirpath", None) or trainer.default_root_dir
        path = Path(folder) / "last.ckpt"
        trainer.save_checkpoint(path)
        log.warning("Stopped after step %d. Continue with --ckpt_path %s", trainer.global_step, path)
        raise KeyboardInterrupt

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signal back."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
