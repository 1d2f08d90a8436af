"""Statistics of AdamW's second moment during training: what advice about a partition is made of."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_adam_mini.measure import SecondMomentRecord
from lightning_adam_mini.optim.distributed import is_dtensor
from lightning_adam_mini.partition import Layouts

__all__ = ["SecondMomentStatistics"]


class SecondMomentStatistics(Callback):
    """Observes the second moment of each matrix in a run with AdamW, Adam, or AdamMini's partition `element`.

    After the run, `record` has the statistics and what a rule advises:

        statistics = SecondMomentStatistics()
        Trainer(max_steps=300, callbacks=[statistics]).fit(task)
        print(statistics.record.overrides(slimadam_rule))

    Args:
        from_step: The first step that is observed: before, AdamW's second moment is that of a few gradients.
        every: Steps from one observation to the next. One takes some passes over the second moment in float64 for each
            structure.
        partition_layouts: Layouts for classes that the library does not know, as for AdamMini.

    Raises:
        ValueError: A number of steps below 1, a sharded model, or an optimizer that keeps no second moment for each
            element of a matrix.
    """

    def __init__(self, from_step: int = 100, every: int = 20, partition_layouts: Layouts | None = None) -> None:
        for name, number in {"from_step": from_step, "every": every}.items():
            if number < 1:
                raise ValueError(f"{name} is a number of steps of at least 1, not {number}")
        self.from_step, self.every, self.partition_layouts = from_step, every, partition_layouts
        self._record: SecondMomentRecord | None = None
        self._last_step = 0

    @property
    def record(self) -> SecondMomentRecord:
        """The statistics; of rank zero, if there are several.

        Raises:
            ValueError: No step was observed.
        """
        if self._record is None or not self._record.num_observations:
            raise ValueError(
                f"no second moment was observed: the run took {self._last_step} steps, and the first that is observed "
                f"is {self.from_step}; train longer, or lower from_step"
            )
        return self._record

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the structures of all matrices."""
        if getattr(pl_module, "is_sharded", False) or any(is_dtensor(p) for p in pl_module.parameters()):
            raise ValueError(
                "SecondMomentStatistics needs whole second moments, and ranks hold parts of them here: train on one "
                "device or with strategy 'ddp'"
            )
        self._record = SecondMomentRecord(pl_module, self.partition_layouts)
        self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Observe after each step whose turn it is."""
        step, before = trainer.global_step, self._last_step
        self._last_step = step
        is_due = step >= self.from_step and (step - self.from_step) % self.every == 0
        if self._record is not None and step != before and is_due and trainer.is_global_zero:
            self._record.observe(_second_moments(trainer, pl_module, self._record.names))


def _second_moments(trainer: Trainer, module: LightningModule, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The second moment of each matrix that has been updated.

    Raises:
        ValueError: The optimizer keeps none, or one of another shape.
    """
    states = {p: state for optimizer in trainer.optimizers for p, state in optimizer.state.items() if state}
    parameters = dict(module.named_parameters())
    found: dict[str, Tensor] = {}
    for name in names:
        parameter = parameters[name]
        state = states.get(parameter, {})
        v = state.get("exp_avg_sq")
        if v is not None and v.shape == parameter.shape:
            found[name] = v
        elif state or not states:
            kinds = ", ".join(dict.fromkeys(type(optimizer).__name__ for optimizer in trainer.optimizers))
            raise ValueError(
                f"{name}: {kinds} keeps no second moment for each element; train with AdamW, or with AdamMini's "
                "partition 'element'"
            )
    return found
