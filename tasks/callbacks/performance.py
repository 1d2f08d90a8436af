"""Throughput, FLOPs utilisation, memory and the optimizer's own time, as metrics."""

from __future__ import annotations

import time
from statistics import fmean
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer

from lightning_adam_mini.measure import optimizer_state_bytes, peak_flops, peak_memory_bytes

from ..base import Task

__all__ = ["FIGURES", "PerformanceMonitor"]

FIGURES = (
    "step_milliseconds",
    "optimizer_milliseconds",
    "optimizer_state_bytes",
    "peak_memory_bytes",
    "training_seconds",
    "mfu",
)
"""What it logs beside the throughput, whose name has the task's unit."""


class PerformanceMonitor(Callback):
    """Logs what training costs.

    Metrics, at the trainer's logging interval: `tokens_per_second` (or the task's unit; over all ranks), `mfu` (model
    FLOPs utilisation, a fraction of the device's peak), `optimizer_milliseconds` (the update alone: no backward pass,
    no clipping; mean since the last row), `step_milliseconds`, `optimizer_state_bytes` (over all ranks where it is
    sharded) and `peak_memory_bytes` (of one rank), `training_seconds` (time in training steps since the first one,
    without validation, over all starts of the run; in a row of its own at each validation too).

    Args:
        peak_flops: Peak dense FLOP/s of one device, for devices that are not in the table. On a CPU a matrix product
            is timed.
    """

    def __init__(self, peak_flops: float | None = None) -> None:
        self.peak_flops = peak_flops
        self._timer = _StepTimer()
        self._units = 0
        self._flops = 0.0
        self._window_start = 0.0
        self._last_step = 0
        self._outside = 0.0
        self._left = 0.0
        self._trained = 0.0

    def state_dict(self) -> dict[str, float]:
        """The training time so far."""
        return {"training_seconds": self._training_seconds()}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Count on from the training time of a checkpoint."""
        self._trained = state_dict.get("training_seconds", 0.0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the device's peak and start to time the optimizer."""
        if self.peak_flops is None:
            self.peak_flops = peak_flops(pl_module.device)
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(self._timer.stop)
        if isinstance(pl_module, Task):
            self._timer.device = pl_module.device
            pl_module.before_update = self._timer.start
        self._last_step = trainer.global_step
        self._open_window()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation within training does not count as training time, which is noted beside its figures."""
        self._left = time.perf_counter()
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            for logger in trainer.loggers:
                logger.log_metrics({"training_seconds": self._training_seconds()}, step=trainer.global_step - 1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See `on_validation_start`."""
        self._outside += time.perf_counter() - self._left
        self._left = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and log where the trainer logs."""
        if not isinstance(pl_module, Task):
            return
        units = pl_module.batch_units(batch)
        self._units += units
        self._flops += units * (pl_module.flops_per_unit(batch) or 0.0)
        step = trainer.global_step
        interval = cast("Any", trainer).log_every_n_steps  # set by the trainer, but not declared
        if step == self._last_step or not interval or step % interval:
            return
        optimizer_milliseconds = self._timer.mean_milliseconds()  # waits for the device, before the clock is read
        elapsed = self._elapsed()
        # Ranks of tensor parallelism read the same batches.
        replicas = (trainer.distributed_sampler_kwargs or {"num_replicas": 1})["num_replicas"]
        metrics = {
            f"{pl_module.unit}_per_second": self._units * replicas / elapsed,
            "step_milliseconds": 1000 * elapsed / (step - self._last_step),
            "optimizer_milliseconds": optimizer_milliseconds,
            "optimizer_state_bytes": float(sum(optimizer_state_bytes(o) for o in trainer.optimizers)),
            "peak_memory_bytes": float(peak_memory_bytes(pl_module.device)),
            "training_seconds": self._trained + elapsed,
        }
        if self._flops and self.peak_flops:
            metrics["mfu"] = self._flops * replicas / trainer.world_size / elapsed / self.peak_flops
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step - 1)  # Lightning's number of this step, under which losses stand
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        self._last_step = step
        self._trained += elapsed
        self._open_window()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._trained, self._window_start = self._training_seconds(), 0.0

    def _elapsed(self) -> float:
        """Seconds of training since the last row."""
        return time.perf_counter() - self._window_start - self._outside if self._window_start else 0.0

    def _training_seconds(self) -> float:
        """Seconds of training since the first step; within a validation, up to its start."""
        waiting = time.perf_counter() - self._left if self._left else 0.0
        return self._trained + self._elapsed() - waiting

    def _open_window(self) -> None:
        self._units, self._flops, self._outside = 0, 0.0, 0.0
        self._window_start = time.perf_counter()


class _StepTimer:
    """Times the optimizer's step from after clipping to its end; on CUDA by events, so that nothing waits."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._start: Any = None
        self._pairs: list[tuple[Any, Any]] = []

    def start(self) -> None:
        self._start = self._now()

    def stop(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._start is not None:
            self._pairs.append((self._start, self._now()))
            self._start = None

    def mean_milliseconds(self) -> float:
        pairs, self._pairs = self._pairs, []
        if not pairs:
            return float("nan")
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return fmean(start.elapsed_time(end) for start, end in pairs)
        return 1000 * fmean(end - start for start, end in pairs)

    def _now(self) -> Any:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.perf_counter()
