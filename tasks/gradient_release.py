"""Gradient release: each parameter is updated within the backward pass, and its gradient freed at once.

So the gradients of a model are never in memory together (Lv et al. 2023, "Full Parameter Fine-tuning for Large Language
Models with Limited Resources", Sec. 3.1). Options that need all gradients before the first update do not work with it.
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
    """Raise if a run needs gradients that would be released.

    Args:
        trainer: The trainer of the run.
        optimizer_factory: The factory of its optimizer.

    Raises:
        ValueError: The message names the option that is in conflict.
    """
    what = "model.gradient_release updates each parameter as soon as it has its gradient"
    options = cast("Any", trainer)
    if not isinstance(optimizer_factory, factory.AdamMini):
        raise ValueError(f"{what}, which {type(optimizer_factory).__name__} cannot: use --optimizer AdamMini")
    if options.world_size > 1:
        raise ValueError(f"{what}, before the ranks average it: train on one device, or leave it out")
    if options.gradient_clip_val:
        raise ValueError(f"{what}, before the norm of all is known: set trainer.gradient_clip_val to 0")
    if options.accumulate_grad_batches != 1:
        raise ValueError(f"{what} of one batch: set trainer.accumulate_grad_batches to 1")
    if options.precision == "16-mixed":
        raise ValueError(f"{what}, before a scaled loss is known to be finite: use --trainer.precision bf16-mixed")


def release_gradients(optimizer: AdamMini) -> list[RemovableHandle]:
    """Update the optimizer's parameters in every backward pass, until the handles are removed."""

    def update(parameter: Tensor) -> None:
        optimizer.step_parameter(parameter)
        parameter.grad = None

    return [
        parameter.register_post_accumulate_grad_hook(update)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad
    ]
