"""Ends of a run before its last step: on a signal, between two steps; and when training has diverged."""

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

from lightning_adam_mini.optim.distributed import local

__all__ = ["DivergenceError", "GracefulInterrupt", "StopOnDivergence", "requeue"]

log = logging.getLogger(__name__)
_warn = rank_zero_only(log.warning)


class GracefulInterrupt(Callback):
    """On a signal, finishes the step, saves `last.ckpt` and prints how to continue; a second one stops at once.

    A checkpoint that is saved within a step would hold weights of which only some are updated. The process ends with
    128 plus the number of the signal, as shells expect. All ranks stop after the same step, whichever got the signal;
    with several ranks, after a step at which the trainer logs.

    The signals are Ctrl-C and SIGTERM. In a SLURM job they are Ctrl-C, because SLURM itself ends jobs by SIGTERM, and
    Lightning's signal for requeueing (SIGUSR1): then the job is requeued after the checkpoint.
    """

    def __init__(self) -> None:
        self._signum = 0
        self._last_step = 0
        self._requeue_signal = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handlers, in the main thread alone; Lightning restores the old ones after training."""
        self._signum, self._last_step = 0, trainer.global_step
        self._requeue_signal = 0
        if threading.current_thread() is not threading.main_thread():
            return
        signal.signal(signal.SIGINT, self._interrupt)
        if not SLURMEnvironment.detect():
            signal.signal(signal.SIGTERM, self._interrupt)
            return
        connector = cast("Any", trainer)._accelerator_connector  # public with some strategies only
        environment = connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
            self._requeue_signal = environment.requeue_signal
            signal.signal(self._requeue_signal, self._interrupt)

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self._signum:
            raise KeyboardInterrupt
        self._signum = signum
        name = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
        log.warning("%s: finishing this step and saving a checkpoint; send it again to stop at once.", name)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save and stop after a complete step."""
        stepped = trainer.global_step != self._last_step
        self._last_step = trainer.global_step
        if not stepped:
            return
        # Several ranks agree at the logging interval only: the reduction makes the host wait for the device.
        interval = cast("Any", trainer).log_every_n_steps if trainer.world_size > 1 else 1
        if trainer.global_step % max(interval, 1):
            return
        if not trainer.strategy.reduce_boolean_decision(bool(self._signum), all=False):
            return
        run_dir = trainer.default_root_dir
        trainer.save_checkpoint(_last_checkpoint(trainer), weights_only=False)
        _warn("Stopped after step %d. Continue with --run_dir %s --ckpt_path last", trainer.global_step, run_dir)
        requeues = bool(self._requeue_signal) and self._signum == self._requeue_signal
        if trainer.strategy.reduce_boolean_decision(requeues, all=False):
            if trainer.is_global_zero:
                requeue()
            trainer.strategy.barrier()  # SLURM may end a job as soon as one of its ranks ends
        raise SystemExit(128 + (self._signum or signal.SIGTERM))


def requeue() -> None:
    """Have SLURM run this job again from its start."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        failure = done.stderr.strip() if done.returncode else None
    except OSError as error:
        failure = str(error)
    if failure is not None:
        log.error("the job could not be queued again (%s): run `scontrol requeue %s`, or submit it again", failure, job)


def _last_checkpoint(trainer: Trainer) -> Path:
    folder = getattr(trainer.checkpoint_callback, "dirpath", None) or Path(trainer.default_root_dir, "checkpoints")
    return Path(folder) / "last.ckpt"


class DivergenceError(ValueError):
    """Training has diverged: a loss or a weight is not finite."""

    exit_code = 3
    """Exit code of the process, so that a comparison of many runs can tell divergence from wrong options."""


class StopOnDivergence(Callback):
    """Stops when the training loss, the validation loss or a weight is not finite, and saves nothing from then on.

    The first bad step is kept on the device, and read when the trainer logs, validates or saves: reading it after every
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
        """Keep the step of the first bad loss, and stop at the logging interval."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor) and self._first_bad is not None:
            bad = (self._first_bad < 0) & ~loss.detach().isfinite().all()
            self._first_bad.masked_fill_(bad, trainer.global_step)
        interval = cast("Any", trainer).log_every_n_steps
        if interval and trainer.global_step % interval == 0:
            self._check_training(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before a validation, which would save a checkpoint."""
        self._check_training(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop if the validation loss is not finite: gradients may be bad where the training losses are not."""
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
        """Stop if the last steps were bad."""
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
    last = _last_checkpoint(trainer)
    kept = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint was saved before"
    raise DivergenceError(
        f"training has diverged: {what}; lower --optimizer.lr (now {float(lr):.3g}), lengthen --schedule.warmup "
        f"or clip gradients; {kept}"
    )
