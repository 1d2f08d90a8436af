"""The base of all tasks, and all that a new domain has to state.

A domain is a folder of `tasks/`, or any importable module outside of this project, with a `Task` and a data module:

- the task builds its network in `configure_model`, through `self.build`, and has a `training_step` and a
  `validation_step` as any LightningModule. `self.build` shards the network where the trainer's strategy says so;
- it logs its primary metric, `val_loss` unless `primary_metric` names another one;
- the data module is any `LightningDataModule`; with `SampledDataModule` (`data/module.py`) runs resume after any batch.

Everything else here has a default. What most domains override: `unit` and `batch_units` (throughput), `flops_per_unit`
(utilisation), `batch_kind` (which data fit), `logged_metrics`, `summary` and `pictures` (the report), and
`configure_meta_model` (commands that look at the model without its data).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from importlib import import_module
from inspect import isabstract
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adam_mini import factory
from lightning_adam_mini.factory import OptimizerFactory
from lightning_adam_mini.optim import AdamMini
from lightning_adam_mini.schedule import Schedule

from .data.module import DATA_RECORD, SampledDataModule
from .data.sampling import seed_of
from .parallel.building import build_for
from .parallel.sharding import (
    clip_grad_norm_,
    keep_after_forward,
    repeated_blocks,
    running_statistics,
    share_running_statistics,
)
from .parallel.strategies import FSDP2, check_strategy, register_strategies

__all__ = ["PrimaryMetric", "Task"]

log = logging.getLogger(__name__)
_say = rank_zero_only(log.info)

register_strategies()  # for tasks that are trained by the command and in Python


@dataclass(frozen=True, kw_only=True)
class PrimaryMetric:
    """The metric by which runs are compared and the best checkpoint is chosen.

    Args:
        metric: Name of the metric, as it is logged; its last value is the result of a run.
        mode: Whether small or large values are good.
        label: The metric in words, with its unit.
        validated: Metric of each validation, drawn over the steps and used to choose the best checkpoint; by default
            `metric`.
        validated_label: The same in words.
        selected_by: Metric whose last value chooses hyperparameters, if `metric` is one of a test, which must not.
    """

    metric: str = "val_loss"
    mode: Literal["min", "max"] = "min"
    label: str = "validation loss"
    validated: str | None = None
    validated_label: str | None = None
    selected_by: str | None = None

    @property
    def curve(self) -> str:
        """The metric of each validation."""
        return self.validated or self.metric

    @property
    def curve_label(self) -> str:
        """The metric of each validation, in words."""
        return self.validated_label or self.label

    @property
    def selection(self) -> str:
        """The metric that chooses hyperparameters, good in the same direction."""
        return self.selected_by or self.metric


class ConfiguresOptimizer(LightningModule):
    """A LightningModule that is trained by the optimizer of a factory, with a schedule over the steps of the run.

    Set `optimizer_factory` and `schedule` in `__init__`, or in the class:

        class Net(ConfiguresOptimizer):
            optimizer_factory = factory.AdamMini(lr=1e-3, partition="factored")
    """

    optimizer_factory: OptimizerFactory = factory.AdamMini()
    schedule: Schedule = Schedule()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Build the optimizer over this module and its schedule over the steps of the run."""
        total = self.schedule.horizon or self.trainer.estimated_stepping_batches
        if math.isinf(total):
            raise ValueError("the schedule needs an end: set trainer.max_steps, trainer.max_epochs or schedule.horizon")
        _say("optimizer: %s", self.optimizer_factory)  # options of the recipe stay when only the class is changed
        # FSDP1 flattens parameters, and only its wrapper knows which elements belong to which parameter.
        is_flattened = isinstance(self.trainer.strategy, FSDPStrategy)
        optimizer = self.optimizer_factory.build(cast("nn.Module", self.trainer.model) if is_flattened else self)
        if isinstance(optimizer, AdamMini):
            _say("AdamMini's steps: %s", optimizer.implementation)
        scheduler = self.schedule.build(optimizer, int(total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Task(ConfiguresOptimizer):
    """Base of all tasks; see the head of this module.

    Args:
        optimizer: Factory of the optimizer; AdamMini by default.
        schedule: Learning-rate schedule, stepped once an optimizer step.

    Raises:
        ValueError: One of them has another type.
    """

    unit: ClassVar[str] = "samples"
    """What throughput counts: samples, tokens, nodes, ..."""

    primary_metric: PrimaryMetric = PrimaryMetric()
    """The metric by which runs are compared; the options of a task may change it."""

    batch_kind: ClassVar[str | None] = None
    """What batches hold, in a word that data modules use too; None takes batches of any data module."""

    logged_metrics: ClassVar[tuple[str, ...] | None] = None
    """All metrics that the steps may log in a fit, so that a callback that monitors another one is an error before
    training; None if they are not known. It holds for the class that sets it, not for its subclasses."""

    def __init__(self, optimizer: OptimizerFactory | None = None, schedule: Schedule | None = None) -> None:
        super().__init__()
        for name, given, kind in (("optimizer", optimizer, OptimizerFactory), ("schedule", schedule, Schedule)):
            if given is not None and not isinstance(given, kind):  # jsonargparse builds annotated arguments
                raise ValueError(
                    f"{type(self).__name__}: {name} must be of the class {kind.__name__}, not {type(given).__name__}; "
                    f"annotate it in __init__: `{name}: {kind.__name__} | None = None`"
                )
        self.optimizer_factory = optimizer or factory.AdamMini()
        self.schedule = schedule or Schedule()
        self.model: nn.Module | None = None
        self._seed = 0
        self._batch_of_step = (-1, 0)
        self._keeps_after_forward = True
        self.before_update: Callable[[], None] | None = None
        """Called between clipping and the optimizer's own step; set by `PerformanceMonitor`, which times the step."""

    def batch_units(self, batch: Any) -> int:
        """How many units (`unit`) a training batch of this rank holds; by default its samples."""
        return num_samples(batch)

    def flops_per_unit(self, batch: Any) -> float | None:
        """FLOPs of a forward and backward pass for one unit; None if there is no formula."""
        return None

    def build(
        self,
        whole: Callable[[], nn.Module],
        *,
        on_meta: Callable[[], nn.Module] | None = None,
        initialise: Callable[[nn.Module], None] | None = None,
        is_trained: bool = False,
        compile: bool = False,  # noqa: A002 - the field's word
    ) -> None:
        """Build the network, `self.model`, and shard it if the trainer's strategy does.

        Args:
            whole: Builds it with its weights, on the CPU.
            on_meta: Builds it on the meta device; None if the network is never large.
            initialise: Draws all weights and sets all buffers in place, once a network of the meta device has memory.
            is_trained: Whether `whole` reads its weights from a file.
            compile: Compile it with torch.compile; block by block if it is sharded.

        Raises:
            ValueError: The strategy cannot shard this network.
        """
        strategy = None if self._trainer is None else self.trainer.strategy
        self.model = build_for(strategy, whole, on_meta=on_meta, initialise=initialise, is_trained=is_trained)
        self.model.train()
        if compile:
            for module in repeated_blocks(self.model).values() if self.is_sharded else (self.model,):
                module.compile()

    @property
    def is_sharded(self) -> bool:
        """Whether ranks hold parts of the network, so that all ranks have to take part in each forward pass."""
        return self._trainer is not None and isinstance(self.trainer.strategy, FSDP2 | FSDPStrategy)

    @property
    def data_rank(self) -> int:
        """The position of this rank among those that read different data."""
        replicas = self.trainer.distributed_sampler_kwargs
        return 0 if replicas is None else int(replicas["rank"])

    def configure_meta_model(self, data: LightningDataModule, device: str = "meta") -> list[str]:
        """Build the network without reading data, for commands that need its shapes alone.

        Args:
            data: The data module of the recipe, before its setup.
            device: The meta device; or another one, for a network with random weights.

        Returns:
            What may differ in a run, one sentence each.
        """
        with torch.device(device):
            self.configure_model()
        return []

    def check_data(self, data: Any) -> None:
        """Reject data whose `batch_kind` is not this task's; without one, any data are accepted.

        Args:
            data: The data module, or None.

        Raises:
            ValueError: The message names the data modules that fit.
        """
        kind = getattr(data, "batch_kind", None)
        if None in (kind, self.batch_kind) or kind == self.batch_kind:
            return
        fitting = _data_modules(type(self))
        remedy = f"; give --data {' or '.join(fitting)}" if fitting else ""
        raise ValueError(
            f"{type(self).__name__} takes {self.batch_kind}, and {type(data).__name__} gives {kind}{remedy}, or "
            "another --model"
        )

    def summary(self) -> dict[str, str]:
        """Lines for the report after training, by name."""
        return {}

    def pictures(self, folder: Path) -> dict[str, Path]:
        """Draw pictures for the report, on rank zero after training.

        Args:
            folder: The run folder.

        Returns:
            The files by their names in the report.
        """
        return {}

    def setup(self, stage: str) -> None:
        """Check strategy and data, and log evaluations under the step of their checkpoint, or 0 without one.

        Raises:
            ValueError: The strategy cannot do what is asked of it, or the data are of another kind.
        """
        check_strategy(self.trainer)
        self.check_data(self.data_module())
        if stage != "fit":
            self._log_after(0)

    def on_fit_start(self) -> None:
        """Keep the seed of the run, from which the seed of every step is derived."""
        self._seed = torch.initial_seed()

    def on_train_start(self) -> None:
        """Warn if checkpoints would fall within a step, whose accumulated gradients are not saved."""
        accumulated, interval = self.trainer.accumulate_grad_batches, self.trainer.val_check_batch
        if isinstance(interval, int) and interval % accumulated:
            rank_zero_warn(
                f"validation every {interval} batches falls within the {accumulated} batches of a step: a run that is "
                "resumed from its checkpoint differs in that step; make val_check_interval a multiple of "
                "accumulate_grad_batches"
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the random numbers of the step, such as dropout, by seed, step, batch of the step and rank alone.

        So a resumed run draws what the uninterrupted one would have drawn, and validation does not change what training
        draws.
        """
        step = self.trainer.global_step
        self._log_after(step + 1)
        self._keep_after_forward(True)
        # Lightning's batch_idx differs where a run is resumed at the end of an epoch.
        self._batch_of_step = (step, self._batch_of_step[1] + 1 if self._batch_of_step[0] == step else 0)
        # Ranks of one tensor-parallel group draw the same.
        position = (self._seed, *self._batch_of_step, self.data_rank)
        torch.manual_seed(seed_of(*position))

    def on_after_backward(self) -> None:
        """Give all ranks the same batch-norm statistics, as DDP does and FSDP2 here: evaluations need it."""
        is_fsdp1 = self._trainer is not None and isinstance(self.trainer.strategy, FSDPStrategy)
        if is_fsdp1 and self.model is not None and (statistics := running_statistics(self.model)):
            share_running_statistics(statistics)

    def on_validation_start(self) -> None:
        """Free gathered parameters after forward passes, since no backward pass does."""
        self._keep_after_forward(False)

    def on_test_start(self) -> None:
        """See `on_validation_start`."""
        self.on_validation_start()

    def on_predict_start(self) -> None:
        """See `on_validation_start`."""
        self.on_validation_start()

    def on_test_epoch_start(self) -> None:
        """A test is a validation on other data: see `on_validation_epoch_start`."""
        self.on_validation_epoch_start()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """See `validation_step`."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """See `on_validation_epoch_end`."""
        self.on_validation_epoch_end()

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients, then call `before_update`."""
        by_norm = gradient_clip_val and gradient_clip_algorithm in (None, "norm")
        if by_norm and self.is_sharded:
            self._clip_sharded(optimizer, cast("float", gradient_clip_val))
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if self.before_update is not None:
            self.before_update()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the options of the optimizer, and the record of the data."""
        if isinstance(data := self.data_module(), SampledDataModule):
            checkpoint[DATA_RECORD] = data.record()
        options = asdict(self.optimizer_factory)
        checkpoint["optimizer_factory"] = {"name": type(self.optimizer_factory).__name__, **options}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Reject a checkpoint of other data, another model or another optimizer before anything is overwritten.

        Raises:
            ValueError: The message names the first difference.
        """
        if isinstance(data := self.data_module(), SampledDataModule):
            evaluates = self.trainer.validating or self.trainer.testing
            data.check_record(checkpoint.get(DATA_RECORD), resumes=self._is_training(), evaluates=evaluates)
        if self._trainer is None or not isinstance(self.trainer.strategy, FSDPStrategy):  # it has local parts
            _check_weights(checkpoint.get("state_dict", {}), self.state_dict())
        averages = self._trainer is not None and any(
            isinstance(c, WeightAveraging) for c in cast("Any", self.trainer).callbacks
        )
        if self._is_training() and "current_model_state" in checkpoint and not averages:
            raise ValueError(
                "the checkpoint holds averaged weights, and this run averages none: continue with the model.ema_decay "
                "that it was trained with, or start a new run"
            )
        if not self._is_training():
            self._log_after(checkpoint.get("global_step", 0))
            return
        saved = checkpoint.get("optimizer_factory")
        if saved is None:
            return
        name = type(self.optimizer_factory).__name__
        if saved["name"] != name:
            raise ValueError(
                f"the checkpoint was saved with the optimizer {saved['name']}, but this run uses {name}; continue with "
                f"--optimizer {saved['name']}, or start from its weights alone in a new run folder"
            )
        changed = {}
        for option, value in asdict(self.optimizer_factory).items():
            if option in saved and saved[option] != value and option in ("lr", "betas", "eps", "weight_decay"):
                changed[option] = saved[option]
                rank_zero_warn(
                    f"the checkpoint's {option} = {saved[option]} continues; {value} from this command is not used"
                )
        # The next checkpoint saves the options in use.
        self.optimizer_factory = replace(self.optimizer_factory, **changed)

    def _log_after(self, steps: int) -> None:
        """Set the step number of logged rows, from 0; Lightning's own drifts when a run is resumed."""
        if self._trainer is not None:
            self._trainer.fit_loop.epoch_loop._batches_that_stepped = steps - 1

    def _clip_sharded(self, optimizer: Optimizer, max_norm: float) -> None:
        """Clip gradients of which each rank holds parts."""
        if isinstance(self.trainer.strategy, FSDPStrategy):  # FSDP1, whose flattened parameters are no DTensors
            cast("Any", self.trainer.strategy.model).clip_grad_norm_(max_norm)
        else:
            clip_grad_norm_((p for group in optimizer.param_groups for p in group["params"]), max_norm)

    def _keep_after_forward(self, keep: bool) -> None:
        """Without `reshard_after_forward`, keep gathered parameters in training alone."""
        strategy = self.trainer.strategy
        if isinstance(strategy, FSDP2) and not strategy.reshard_after_forward and keep != self._keeps_after_forward:
            assert self.model is not None
            keep_after_forward(self.model, keep)
            self._keeps_after_forward = keep

    def given_meaning(self) -> dict[str, Any]:
        """The `SampledDataModule.meaning` that belongs to pretrained weights of a new run."""
        return {}

    def data_module(self) -> Any:
        """The data module of the trainer, or None."""
        return getattr(self._trainer, "datamodule", None)

    def _is_training(self) -> bool:
        trainer = self._trainer
        return trainer is not None and trainer.training


def _data_modules(task: type[Task]) -> list[str]:
    """Names of the data modules in the domain of a task that have its `batch_kind`."""
    owner = next(cls for cls in task.__mro__ if vars(cls).get("batch_kind") is not None)
    try:
        domain = import_module(f"{owner.__module__.rpartition('.')[0]}.data")
    except ImportError:
        return []
    known = {name: getattr(domain, name) for name in getattr(domain, "__all__", ())}
    return sorted(
        name
        for name, cls in known.items()
        if getattr(cls, "batch_kind", None) == task.batch_kind and not isabstract(cls)
    )


def num_samples(batch: Any) -> int:
    """Samples of a batch of any form: the first dimension of its first tensor.

    Args:
        batch: A tensor, or tensors within sequences, mappings, dataclasses or graphs of torch_geometric. The samples of
            a batch of graphs are its graphs; without any tensor they are the items of the first list, or else one.
    """
    found = _first_length(batch)
    return 1 if found is None else found


def _first_length(value: Any) -> int | None:
    if isinstance(value, Tensor):
        return value.shape[0] if value.dim() else None
    if isinstance(graphs := getattr(value, "num_graphs", None), int):
        return graphs
    parts: list[Any] = []
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif is_dataclass(value):
        parts = list(vars(value).values())
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        parts = list(value)
    elif callable(to_dict := getattr(value, "to_dict", None)):  # torch_geometric's Data
        parts = list(to_dict().values())
    found = (length for part in parts if (length := _first_length(part)) is not None)
    lists = (len(part) for part in parts if isinstance(part, list))
    own = len(value) if isinstance(value, list) else None
    return next(found, next(lists, own))


def _check_weights(saved: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Raise if two state dicts have different names or shapes."""
    if missing := [name for name in own if name not in saved]:
        raise ValueError(_other_model(f"it has no {missing[0]!r} ({len(missing)} such parameters)"))
    if unexpected := [name for name in saved if name not in own]:
        raise ValueError(_other_model(f"this model has no {unexpected[0]!r} ({len(unexpected)} such parameters)"))
    for name, tensor in own.items():
        if saved[name].shape != tensor.shape:
            shapes = f"{name!r} has shape {tuple(saved[name].shape)} there and {tuple(tensor.shape)} here"
            raise ValueError(_other_model(shapes))


def _other_model(difference: str) -> str:
    return f"the checkpoint belongs to another model: {difference}; give the recipe or options that it was trained with"
