"""The settings that all studies on text have in common, and the run of one optimizer with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial

from torch import nn
from torch.optim import Optimizer

from .checks import check_least
from .common.training import NUM_BYTES, TextSizes, TextTask
from .training import DivergedError, Training, train

__all__ = ["TextSettings", "final_loss"]

CHANCE = math.log(NUM_BYTES)
"""Loss of a model that knows nothing, in nats a byte."""


@dataclass(frozen=True)
class TextSettings(TextSizes):
    """Sizes of the small Llama and its data, and the length of a run.

    Args:
        seeds: Of weights and batches.
        steps: Of a run; the learning rate falls to 0 along a cosine.
    """

    seeds: list[int]
    steps: int

    def __post_init__(self) -> None:
        """Check what is common to all."""
        check_least(self, 1, "steps", *(field.name for field in fields(TextSizes)))
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width {self.width} must be a multiple of {2 * self.heads}, twice the heads, so that a head is even"
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
    try:
        train(model, optimizers(model), partial(task.loss, model, seed), Training(settings.steps, clip=None))
    except DivergedError:
        return CHANCE
    loss = task.validation_loss(model)
    return min(loss, CHANCE) if math.isfinite(loss) else CHANCE
