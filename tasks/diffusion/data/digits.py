"""Handwritten digits that come with scikit-learn: real images on every machine."""

from __future__ import annotations

from typing import Any

import torch

from lightning_adam_mini.hints import require_package

from .module import ImageData, Parts

__all__ = ["DigitImages"]


class DigitImages(ImageData):
    """The 1,797 grey digits of 8 x 8 pixels in scikit-learn (UCI, Alpaydin and Kaynak 1998).

    The split is always the same: 1,527 images for training and 270 for validation.

    Args:
        batch_size: See `ImageData`, also below.
        num_workers: Not needed: the images lie in memory.
        val_images: Images of one validation.
        num_images: Images that `predict` makes.
        image_seed: Seed of the first of them.
        seed: Of the order of the training images.

    Raises:
        ValueError: scikit-learn is missing.
    """

    def __init__(
        self,
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        val_images: int | None = None,
        num_images: int = 16,
        image_seed: int = 0,
        seed: int = 0,
    ) -> None:
        options: dict[str, Any] = {"num_images": num_images, "image_seed": image_seed, "seed": seed}
        super().__init__(
            image_size=8,
            channels=1,
            batch_size=batch_size,
            num_workers=num_workers,
            flip=False,  # a mirrored digit is none
            val_images=val_images,
            **options,
        )

    def open_parts(self) -> Parts:
        """See `ImageData.open_parts`."""
        require_package("sklearn", type(self).__name__, extra="diffusion", package="scikit-learn")
        from sklearn.datasets import load_digits

        images = torch.tensor(load_digits().images / 8 - 1, dtype=torch.float32)[:, None]
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        held_out = len(images) * 15 // 100 + 1
        return Parts(list(images[order[held_out:]]), list(images[order[:held_out]]))
