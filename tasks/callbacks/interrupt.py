"""Ctrl-C and SIGTERM between two steps, not within one."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any, cast

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

__all__ = ["GracefulInterrupt"]

log = logging.getLogger(__name__)


class GracefulInterrupt(Callback):
    """On Ctrl-C or SIGTERM: finishes the optimizer step, saves `last.ckpt` and says how to go on; again stops at once.

    A checkpoint that is saved within a step would hold weights of which only some are updated. The process ends with
    128 plus the signal's number, as shells expect. All ranks stop after the same step, whichever got the signal;
    several stop where the trainer logs.
    """

    def __init__(self) -> None:
        self._signum = 0
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals, which Lightning gives back after training; only the main thread can."""
        self._signum, self._last_step = 0, trainer.global_step
        if threading.current_thread() is not threading.main_thread():
            return
        signal.signal(signal.SIGINT, self._interrupt)
        if not SLURMEnvironment.detect():  # there Lightning has the job queued again
            signal.signal(signal.SIGTERM, self._interrupt)

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self._signum:
            raise KeyboardInterrupt
        self._signum = signum
        name = "Ctrl-C" if signum == signal.SIGINT else "SIGTERM"
        log.warning("%s: finishing this step and saving a checkpoint; once more stops at once.", name)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save and stop where a step has just been completed."""
        stepped = trainer.global_step != self._last_step
        self._last_step = trainer.global_step
        if not stepped:
            return
        # Several ranks agree at the logging interval alone: to ask makes the host wait for the device.
        interval = cast("Any", trainer).log_every_n_steps if trainer.world_size > 1 else 1
        if trainer.global_step % max(interval, 1):
            return
        if not trainer.strategy.reduce_boolean_decision(bool(self._signum), all=False):
            return
        run_dir = Path(trainer.default_root_dir)
        folder = Path(getattr(trainer.checkpoint_callback, "dirpath", None) or run_dir / "checkpoints")
        trainer.save_checkpoint(folder / "last.ckpt", weights_only=False)
        _say("Stopped after step %d. Continue with --run_dir %s --ckpt_path last", trainer.global_step, run_dir)
        raise SystemExit(128 + (self._signum or signal.SIGTERM))


_say = rank_zero_only(log.warning)
