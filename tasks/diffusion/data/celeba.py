"""Faces: CelebA, in the layout of torchvision."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from ...data.module import hash_paths
from .celeba_layout import PARTITION, find_folder, list_images, read_partition
from .image_files import ScaledImages, split_by_name
from .module import ImageData, Parts

__all__ = ["CelebA"]

_say = rank_zero_only(logging.getLogger(__name__).info)


class CelebA(ImageData):
    """The 202,599 aligned faces of CelebA (Liu et al. 2015), or some of them, with the authors' split.

    Read are `celeba/img_align_celeba/*.jpg`, `celeba/list_eval_partition.txt` and, to check that all belongs together,
    `celeba/list_attr_celeba.txt`. Where the partition file is missing, a fixed twentieth is held out by hashes of the
    names, which is told.

    Args:
        path: The folder in which torchvision has its `celeba`; or that folder, or the one of the images.
        image_size: Pixels a side.
        crop: Pixels a side of the square in the middle of the 178 x 218 that is scaled to `image_size`. 178 is all of
            the width, as in the code base denoising-diffusion-pytorch; 140 the face, as in Song et al. 2021
            (score_sde).
        batch_size: See `ImageData`, also below.
        num_workers: Processes that read ahead.
        flip: Mirror every second training image.
        val_images: Images of one validation.
        num_images: Images that `predict` makes.
        image_seed: Seed of the first of them.
        seed: Of the order of the training images.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        path: str,
        *,
        image_size: int = 64,
        crop: int = 178,
        batch_size: int = 128,
        num_workers: int = 4,
        flip: bool = True,
        val_images: int | None = None,
        num_images: int = 16,
        image_seed: int = 0,
        seed: int = 0,
    ) -> None:
        options: dict[str, Any] = {"num_images": num_images, "image_seed": image_seed, "seed": seed}
        super().__init__(
            image_size=image_size,
            channels=3,
            batch_size=batch_size,
            num_workers=num_workers,
            flip=flip,
            val_images=val_images,
            **options,
        )
        if crop < 1:
            raise ValueError(f"`crop` must be at least 1, got {crop}.")
        self.path = Path(path).expanduser()
        self.crop = crop

    def open_parts(self) -> Parts:
        """See `ImageData.open_parts`.

        Raises:
            ValueError: A folder or a file is missing or does not belong to the images.
        """
        folder = find_folder(self.path)
        names = list_images(folder)
        parts = read_partition(folder.parent, names)
        if parts is None:
            train, val = split_by_name([folder / name for name in names], 0.05, root=folder)
            _say("no %s: %d images for training and %d for validation, by hashes", PARTITION, len(train), len(val))
            return Parts(self._scaled(train), self._scaled(val))
        train, val, test = ([folder / name for name in names if parts[name] == part] for part in range(3))
        if not train or not val:
            raise ValueError(
                f"{folder.parent / PARTITION} has {len(train)} images for training (0) and {len(val)} for validation "
                "(1); each needs at least one"
            )
        return Parts(self._scaled(train), self._scaled(val), self._scaled(test) if test else None)

    def digest(self, images: ScaledImages) -> str:
        """See `ImageData.digest`: of names and sizes of the files."""
        return hash_paths(images.paths, images.paths[0].parent)

    def _scaled(self, paths: list[Path]) -> ScaledImages:
        return ScaledImages(paths, image_size=self.image_size, channels=3, crop=self.crop)
