"""Signals that end a run, between two steps and not within one."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, cast

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lightning_adam_mini.optim.sharding import local

__all__ = ["DivergenceError", "GracefulInterrupt", "StopOnDivergence", "requeue"]


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
