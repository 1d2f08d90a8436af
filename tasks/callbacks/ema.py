"""An exponential moving average of the weights."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

__all__ = ["WeightEMA"]


class WeightEMA(WeightAveraging):
    """Lightning's WeightAveraging as an exponential moving average, with a decay that grows in the first steps.

    Validation, prediction and the `state_dict` of checkpoints have the averaged weights, all of `on_validation_*`
    included; training goes on from the raw ones. Buffers, such as the statistics of batch norm, are averaged too.

    Args:
        decay: Weight of the average in an update.
        warmup: Use `min(decay, (1 + s) / (10 + s))` in update `s`, so that the random first weights are soon forgotten
            (as TensorFlow's ExponentialMovingAverage does with `num_updates`).

    Raises:
        ValueError: The decay is not in (0, 1).
    """

    def __init__(self, decay: float = 0.9999, warmup: bool = True) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"the decay of the weights' average must be in (0, 1), not {decay}")
        super().__init__(multi_avg_fn=self._average)
        self.decay = decay
        self.warmup = warmup
        self._training_is_over = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the average in a fit.

        Raises:
            ValueError: The weights would be averaged in a precision in which a small step is lost, or in another one
                than theirs.
        """
        if stage == "fit" and trainer.precision in ("bf16-true", "16-true", "64-true"):
            raise ValueError(
                f"an average of the weights needs trainer.precision 32-true, bf16-mixed or 16-mixed, not "
                f"{trainer.precision}; or set model.ema_decay to null"
            )
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:  # else each step would wait for the device three times to read the count
            self._average_model.n_averaged = self._average_model.n_averaged.cpu()

    @torch.no_grad()
    def _average(self, averaged: list[Tensor], current: list[Tensor], updates: Tensor | int) -> None:
        """Update all tensors of one dtype."""
        if not averaged[0].is_floating_point():  # counters, such as those of batch norm
            torch._foreach_copy_(averaged, current)
            return
        assert self._average_model is not None
        seen = int(self._average_model.n_averaged)  # not `updates`, which torch has moved to the device
        decay = min(self.decay, (1 + seen) / (10 + seen)) if self.warmup else self.decay
        torch._foreach_lerp_(averaged, current, 1.0 - decay)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the averaged weights: what the task does at the end of a validation belongs to it."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the raw weights back, before a checkpoint is saved."""
        super().on_validation_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the averaged weights in the module, and keep the raw ones for a checkpoint that is saved after this."""
        self._swap_models(pl_module)
        self._training_is_over = True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the average as `state_dict` and the raw weights as `current_model_state`, whichever stands where."""
        if self._average_model is None:
            return
        if trainer.training and not self._training_is_over:
            # Whoever saves after a step may have its turn before this callback: the step belongs to the average.
            self.on_train_batch_end(trainer, pl_module, None, None, 0)
            if self.state_key in checkpoint.get("callbacks", {}):
                checkpoint["callbacks"][self.state_key] = self.state_dict()
        averaged = checkpoint["state_dict"]
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._training_is_over:
            checkpoint["current_model_state"], checkpoint["state_dict"] = checkpoint["state_dict"], averaged

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore both in a fit; anywhere else the averaged weights are all that is needed."""
        if self._average_model is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
