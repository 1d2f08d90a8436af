"""Mixup and cutmix of whole batches, on their device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["BatchMixing"]


class BatchMixing:
    """Mixes each image of a batch with its neighbour: by mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019).

    Draws from torch's generator of the CPU, so that no step waits for the device. Where both are on, each batch takes
    one of them by a coin.

    Args:
        mixup_alpha: Of the Beta distribution of mixup's weight; 0 for no mixup.
        cutmix_alpha: Of the Beta distribution of cutmix's area; 0 for no cutmix.
        probability: That a batch is mixed; None for 1, and where nothing mixes.
        num_classes: Number of classes.

    Raises:
        ValueError: See `check_mixing`.
    """

    def __init__(self, *, mixup_alpha: float, cutmix_alpha: float, probability: float | None, num_classes: int) -> None:
        check_mixing(mixup_alpha, cutmix_alpha, probability)
        from torchvision.transforms import v2

        kinds = ((v2.MixUp, mixup_alpha), (v2.CutMix, cutmix_alpha))
        self.transforms: list[Any] = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha > 0]
        self.probability = 1.0 if probability is None else probability

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Args:
            images: `(B, C, H, W)`.
            labels: `(B,)`, int64.

        Returns:
            The images, and their labels: as they were, or as shares of the classes `(B, num_classes)`.
        """
        if not self.transforms or torch.rand(()) >= self.probability:
            return images, labels
        chosen = int(torch.randint(len(self.transforms), ()))
        return self.transforms[chosen](images, labels)


def check_mixing(mixup_alpha: float, cutmix_alpha: float, probability: float | None) -> None:
    """Check the options of mixing, before any data are read.

    Args:
        mixup_alpha: See `BatchMixing`.
        cutmix_alpha: See `BatchMixing`.
        probability: See `BatchMixing`.

    Raises:
        ValueError: A number is out of range, or a probability is given and nothing mixes.
    """
    for name, alpha in {"mixup_alpha": mixup_alpha, "cutmix_alpha": cutmix_alpha}.items():
        if not 0.0 <= alpha < float("inf"):
            raise ValueError(f"model.{name} must be a number of at least 0, not {alpha}; 0 turns it off")
    if probability is None:
        return
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"model.mix_probability is a probability in [0, 1], not {probability}")
    if not mixup_alpha and not cutmix_alpha:
        raise ValueError(
            "model.mix_probability is for mixup and cutmix: set mixup_alpha or cutmix_alpha too, or leave it out"
        )
