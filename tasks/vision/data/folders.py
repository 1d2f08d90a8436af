"""Image files in one folder per class, the layout of ImageNet."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from ...data.sources import IMAGE_SUFFIXES
from .module import DecodedFiles, ImageDataModule, ImageSet, settled
from .transforms import IMAGENET_MEAN, IMAGENET_STD, Transforms

__all__ = ["ImageFolders"]


class ImageFolders(ImageDataModule):
    """Images in `train/CLASS/` and `val/CLASS/` below one folder, and in `test/CLASS/` if it exists.

    The classes are the folders of `train`, sorted by name; with a checkpoint, the classes of its run.

    Args:
        root: The folder that contains `train` and `val`.
        transforms: Crops, augmentation and normalisation.
        grayscale: Read images with one channel.
        kwargs: See `ImageDataModule`.

    Raises:
        ValueError: A number is out of range, or the transforms do not fit the channels.
    """

    def __init__(
        self,
        *,
        root: str,
        transforms: Transforms = Transforms(size=224, crop="resized", resize=256),  # noqa: B008 - frozen
        grayscale: bool = False,
        **kwargs: Any,
    ) -> None:
        mean, std = ((sum(values) / 3,) if grayscale else values for values in (IMAGENET_MEAN, IMAGENET_STD))
        super().__init__(
            transforms=settled(transforms, size=224, flip=0.5, mean=mean, std=std),
            channels=1 if grayscale else 3,
            **kwargs,
        )
        self.root = Path(root).expanduser()
        self._classes: tuple[str, ...] = ()

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the folders of `train`, or the classes of the run that the checkpoint belongs to."""
        if "classes" in self.kept:
            return tuple(self.kept["classes"])
        if not self._classes:
            self._classes = _folders(self.root / "train", self.root)
        return self._classes

    @property
    def planned_num_classes(self) -> int | None:
        """See `ImageDataModule`; None if the folder does not exist."""
        return self.num_classes if (self.root / "train").is_dir() else None

    def open_images(self) -> dict[str, ImageSet]:
        """See `ImageDataModule`.

        Raises:
            ValueError: A folder is missing or contains no images, a class has no training image, or the classes of the
                parts differ.
        """
        mode = "L" if self.channels == 1 else "RGB"
        parts: dict[str, ImageSet] = {}
        for name in ("train", "val", "test"):
            folder = self.root / name
            if name == "test" and not folder.is_dir():
                continue
            self._check_classes(folder)
            images = _read_part(folder, self.class_names, mode)
            self._check_counts(folder, name, images.labels.bincount(minlength=self.num_classes).tolist())
            parts[name] = images
        return parts

    def _check_counts(self, folder: Path, part: str, counts: list[int]) -> None:
        empty = [name for name, count in zip(self.class_names, counts, strict=True) if not count]
        if not empty:
            return
        problem = f"{folder / empty[0]} contains no images ({len(empty)} such classes)"
        if part == "train":
            raise ValueError(f"{problem}; give each class images to learn from, or remove its folder from all parts")
        rank_zero_warn(f"{problem}: the accuracy says nothing about them")

    def _check_classes(self, folder: Path) -> None:
        known, own = set(self.class_names), set(_folders(folder, self.root))
        of_run = "classes" in self.kept
        whose = "the run" if of_run else self.root / "train"
        if missing := sorted(known - own):
            remedy = self.other_data if of_run else "give it the same folders"
            new = f", and {min(own - known)!r} is not one of them" if own - known else ""
            raise ValueError(
                f"{folder} has no folder {missing[0]!r} ({len(missing)} such classes of {whose}){new}; {remedy}"
            )
        if unknown := sorted(own - known):
            remedy = self.other_data if of_run else "move its images into the folders of their classes"
            raise ValueError(f"{folder / unknown[0]} is not a class of {whose} ({len(unknown)} such folders); {remedy}")


def _folders(folder: Path, root: Path) -> tuple[str, ...]:
    """Names of the folders in a part, sorted."""
    if not folder.is_dir():
        missing = folder if root.is_dir() else root
        raise ValueError(
            f"there is no folder {missing}; data.root must contain train/CLASS/*.jpg and val/CLASS/*.jpg (for ImageNet "
            "train/n01440764/... and val/n01440764/...)"
        )
    names = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))
    if not names:
        raise ValueError(f"{folder} contains no folders; put the images of each class into one named after the class")
    return names


def _read_part(folder: Path, classes: Sequence[str], mode: str) -> DecodedFiles:
    from torchvision.datasets.folder import make_dataset

    numbers = {name: number for number, name in enumerate(classes)}
    suffixes, start = tuple(IMAGE_SUFFIXES), len(str(folder))

    def is_image(path: str) -> bool:
        return path.lower().endswith(suffixes) and f"{os.sep}." not in path[start:]  # macOS leaves hidden `._x.jpg`

    samples = make_dataset(str(folder), numbers, is_valid_file=is_image, allow_empty=True)
    if not samples:
        raise ValueError(f"{folder} contains no images (*{', *'.join(sorted(IMAGE_SUFFIXES))}) in its class folders")
    return DecodedFiles([path for path, _ in samples], [number for _, number in samples], mode, folder)
