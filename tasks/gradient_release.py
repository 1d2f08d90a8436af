"""Gradient release: each parameter is updated within the backward pass, and its gradient freed at once.

So a model's gradients never stand in memory together (Lv et al. 2023, "Full Parameter Fine-tuning for Large Language
Models with Limited Resources", Sec. 3.1). What needs all gradients before the first update cannot be had with it.
"""

from __future__ import annotations

from typing import Any, cast

from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_adam_mini import factory
from lightning_adam_mini.factory import OptimizerFactory
from lightning_adam_mini.optim import AdamMini

__all__ = ["check_release", "release_gradients"]


def check_release(trainer: Trainer, optimizer_factory: OptimizerFactory) -> None:
    """Raise where a run needs gradients that are released.

    Args:
        trainer: Of the run.
        optimizer_factory: Of its optimizer.

    Raises:
        ValueError: With what does not go with it.
    """
    what = "model.gradient_release updates each parameter as soon as it has its gradient"
    options = cast("Any", trainer)
    if not isinstance(optimizer_factory, factory.AdamMini):
        raise ValueError(f"{what}, which {type(optimizer_factory).__name__} cannot: use --optimizer AdamMini")
    if options.world_size > 1:
        raise ValueError(f"{what}, before ranks have averaged it: train on one device, or leave it out")
    if options.gradient_clip_val:
        raise ValueError(f"{what}, before the norm of all is known: set trainer.gradient_clip_val to 0")
    if options.accumulate_grad_batches != 1:
        raise ValueError(f"{what} of one batch: set trainer.accumulate_grad_batches to 1")
    if options.precision == "16-mixed":
        raise ValueError(f"{what}, before a scaled loss is known to be finite: use --trainer.precision bf16-mixed")


def release_gradients(optimizer: AdamMini) -> list[RemovableHandle]:
    """Have every backward pass update the optimizer's parameters, until the handles are removed."""

    def update(parameter: Tensor) -> None:
        optimizer.step_parameter(parameter)
        parameter.grad = None

    return [
        parameter.register_post_accumulate_grad_hook(update)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad
    ]
