"""A size of the gradient for each block, from a probe, so that one factor sets a rate for every block."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from lightning_adam_mini.factory import AdamW

from .common.training import TextTask
from .text_settings import TextSettings
from .training import Training, train

__all__ = ["gradient_sizes", "matrices"]


def matrices(model: nn.Module) -> list[str]:
    """Names of the blocks: PyTorch's default partition, without vectors."""
    return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]


def gradient_sizes(task: TextTask, settings: TextSettings, seed: int, rate: float) -> dict[str, float]:
    """Root mean square of each parameter's gradient over a run of AdamW, which is thrown away.

    The first gradient alone would not do: those of query and key are next to nothing before values are learned.

    Args:
        task: The task of the settings.
        settings: Length and sizes.
        seed: Of weights and batches.
        rate: Learning rate of AdamW.

    Raises:
        DivergedError: The run does not end.
    """
    model = task.build(seed)
    squares = {name: torch.zeros(()) for name, _ in model.named_parameters()}

    def add(steps: int) -> None:
        for name, parameter in model.named_parameters() if steps else ():
            assert parameter.grad is not None
            squares[name] += parameter.grad.square().mean()

    optimizer, loss_of = AdamW(lr=rate, weight_decay=0.0).build(model), partial(task.loss, model, seed)
    train(model, [optimizer], loss_of, Training(settings.steps, clip=None), add)
    return {name: float((total / settings.steps).sqrt()) for name, total in squares.items()}
