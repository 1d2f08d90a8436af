"""Logged metrics of training itself: its costs, and the spread of gradients within the optimizer's blocks."""

from __future__ import annotations

import math
import time
from statistics import fmean
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_adam_mini.blocks import Kind
from lightning_adam_mini.hessian.block_structure import spread_from, spread_sums
from lightning_adam_mini.measure import optimizer_state_bytes, peak_flops, peak_memory_bytes
from lightning_adam_mini.optim import AdamMini
from lightning_adam_mini.partition import ParameterPartition, partition_module

from ..base import Task

__all__ = ["PERFORMANCE_METRICS", "GradientSpread", "PerformanceMonitor"]

PERFORMANCE_METRICS = (
    "step_milliseconds",
    "optimizer_milliseconds",
    "optimizer_state_bytes",
    "peak_memory_bytes",
    "training_seconds",
    "mfu",
)
"""What `PerformanceMonitor` logs, besides the throughput, whose name contains the task's unit."""


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
        """Look up the peak of the device and start to time the optimizer."""
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
        """Stop counting training time, and log it in a row of its own."""
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
        """Count the batch, and log at the trainer's interval."""
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


class GradientSpread(Callback):
    """Logs what the blocks leave out of Adam's second moment: the variance of `ln g^2` within them, by role.

    Metrics, at the trainer's logging interval: `gradient_spread/ROLE`, the variance within blocks, and
    `gradient_spread_explained/ROLE`, the part of the whole variance that lies between blocks instead. The gradients are
    those of one optimizer step, so pure noise has the variance pi^2 / 2 = 4.9. The blocks are those of AdamMini or,
    with another optimizer, those that AdamMini would use. Parameters with one value an element are left out, and so are
    factored second moments, which have no blocks.

    Add it with `--trainer.callbacks+=lightning_adam_mini.tasks.callbacks.GradientSpread`. In a step that is logged it
    costs some passes over the gradients, and the host waits for the device once.

    Raises:
        ValueError: Gradients are freed before the optimizer's step (`model.gradient_release`).
    """

    def __init__(self) -> None:
        self._partitions: dict[str, ParameterPartition] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the blocks."""
        if getattr(pl_module, "gradient_release", False):
            raise ValueError("GradientSpread needs the gradients of a whole step: leave model.gradient_release out")
        self._partitions = {}
        if getattr(pl_module, "is_sharded", False) or any(hasattr(p, "device_mesh") for p in pl_module.parameters()):
            rank_zero_warn("GradientSpread logs nothing: ranks hold parts of the gradients, and blocks cross them")
            return
        optimizer = next(iter(trainer.optimizers), None)
        if isinstance(optimizer, AdamMini):
            partitions = _named_as_in(pl_module, optimizer)
        else:
            partitions = partition_module(pl_module)
        if not partitions:
            rank_zero_warn(
                "GradientSpread logs nothing: the parameters of the optimizer have other names than any module; pass "
                "AdamMini a module"
            )
            return
        self._partitions = {name: partition for name, partition in partitions.items() if _has_blocks(partition)}
        if not self._partitions:
            rank_zero_warn("GradientSpread logs nothing: no parameter has blocks of several elements")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Sum over blocks in steps that are logged, before clipping, which scales all gradients by one factor."""
        interval = cast("Any", trainer).log_every_n_steps  # set by the trainer, but not declared
        if not self._partitions or not trainer.is_global_zero or not interval or (trainer.global_step + 1) % interval:
            return
        gradients = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
        by_role: dict[str, Tensor] = {}
        for name, partition in self._partitions.items():
            if name in gradients:
                sums = spread_sums(partition.blocks, gradients[name].float().square())
                role = partition.role.name
                by_role[role] = by_role[role] + sums if role in by_role else sums
        if not by_role:
            return
        rows = torch.stack(list(by_role.values())).cpu()  # the host waits for the device here alone
        metrics: dict[str, float] = {}
        for role, row in zip(by_role, rows, strict=True):
            spread = spread_from(row)
            metrics[f"gradient_spread/{role}"] = spread.within
            metrics[f"gradient_spread_explained/{role}"] = spread.explained
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)  # the number of this step, from 0


def _named_as_in(module: LightningModule, optimizer: AdamMini) -> dict[str, ParameterPartition]:
    """The optimizer's partition by the names of parameters in `module`, also if it was built from a submodule."""
    partitions = optimizer.partition
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for prefix, part in module.named_modules():
        named = {name: p for name, p in part.named_parameters() if p in trained}
        if len(named) == len(trained) and named.keys() <= partitions.keys():
            return {f"{prefix}.{name}" if prefix else name: partitions[name] for name in named}
    return {}


def _has_blocks(partition: ParameterPartition) -> bool:
    """Whether second moments are shared within blocks of several elements."""
    blocks = partition.blocks
    return blocks.kind is Kind.MEAN and blocks.num_values < math.prod(blocks.shape)
