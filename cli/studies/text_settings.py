"""The settings that all studies on text have in common, and the run of one optimizer with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from .text_task import NUM_BYTES, TextTask
from .training import Training, train

__all__ = ["CHANCE", "TextSettings", "final_loss"]

CHANCE = math.log(NUM_BYTES)
"""Loss of a model that knows nothing, in nats a byte."""


@dataclass(frozen=True)
class TextSettings:
    """The small Llama, its data and the length of a run.

    Args:
        seeds: Of weights and batches.
        steps: Of a run; the learning rate falls to 0 along a cosine.
        width: Of the model.
        layers: Of the model.
        heads: Of each attention.
        context: Bytes in a window.
        batch_size: Windows in a batch.
        validation_windows: Windows of the validation loss.
    """

    seeds: list[int]
    steps: int
    width: int
    layers: int
    heads: int
    context: int
    batch_size: int
    validation_windows: int

    def __post_init__(self) -> None:
        """Check what is common to all."""
        for name in ("steps", "context", "batch_size", "validation_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    def task(self) -> TextTask:
        """The model and its data."""
        return TextTask(
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            context=self.context,
            batch_size=self.batch_size,
            validation_windows=self.validation_windows,
        )


def final_loss(
    task: TextTask, settings: TextSettings, seed: int, optimizers: Callable[[nn.Module], Sequence[Optimizer]]
) -> float:
    """Validation loss in nats a byte after a run without clipping; that of chance where it diverged or ended above.

    Args:
        task: The task of the settings.
        settings: Length and sizes.
        seed: Of weights and batches.
        optimizers: Makes the optimizers of a fresh model.
    """
    model = task.build(seed)
    loss_of = lambda step: task.loss(model, task.batch(seed, step))  # noqa: E731
    finite = train(model, optimizers(model), loss_of, Training(settings.steps, clip=None))
    loss = task.validation_loss(model) if finite else math.inf
    return min(loss, CHANCE) if math.isfinite(loss) else CHANCE
