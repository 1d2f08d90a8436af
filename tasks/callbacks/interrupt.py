"""Signals that end a run, between two steps and not within one."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from pathlib import Path
from types import FrameType
from typing import Any, cast

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

__all__ = ["GracefulInterrupt", "requeue"]

log = logging.getLogger(__name__)


class GracefulInterrupt(Callback):
    """On a signal to end: finishes the optimizer step, saves `last.ckpt` and says how to go on; again stops at once.

    A checkpoint that is saved within a step would hold weights of which only some are updated. The process ends with
    128 plus the signal's number, as shells expect. All ranks stop after the same step, whichever got the signal;
    several stop where the trainer logs.

    Ctrl-C and SIGTERM end a run. In a job of SLURM, which ends jobs that are over with SIGTERM, it is Ctrl-C, and the
    signal that Lightning has jobs queued again on (SIGUSR1): then the job is queued again after the checkpoint.
    """

    def __init__(self) -> None:
        self._signum = 0
        self._last_step = 0
        self._requeue_signal = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals, which Lightning gives back after training; only the main thread can."""
        self._signum, self._last_step = 0, trainer.global_step
        self._requeue_signal = 0
        if threading.current_thread() is not threading.main_thread():
            return
        signal.signal(signal.SIGINT, self._interrupt)
        if not SLURMEnvironment.detect():
            signal.signal(signal.SIGTERM, self._interrupt)
            return
        environment = cast(
            "Any", trainer
        )._accelerator_connector.cluster_environment  # public with some strategies only
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
            self._requeue_signal = environment.requeue_signal
            signal.signal(self._requeue_signal, self._interrupt)

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self._signum:
            raise KeyboardInterrupt
        self._signum = signum
        name = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
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
        asked = bool(self._requeue_signal) and self._signum == self._requeue_signal
        if trainer.strategy.reduce_boolean_decision(asked, all=False):
            if trainer.is_global_zero:
                requeue()
            trainer.strategy.barrier()  # SLURM may end a job as soon as one of its ranks has ended
        raise SystemExit(128 + (self._signum or signal.SIGTERM))


def requeue() -> None:
    """Have SLURM run this job again from its start."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        trouble = done.stderr.strip() if done.returncode else None
    except OSError as error:
        trouble = str(error)
    if trouble is not None:
        log.error("the job could not be queued again (%s): run `scontrol requeue %s`, or submit it again", trouble, job)


_say = rank_zero_only(log.warning)
