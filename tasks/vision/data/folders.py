"""Image files in one folder for each class, as ImageNet is laid out for training."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from ...data.sources import IMAGE_SUFFIXES
from .image_sets import DecodedFiles, ImageSet
from .module import ImageDataModule, settled
from .transforms import IMAGENET_MEAN, IMAGENET_STD, Transforms

__all__ = ["ImageFolders"]


class ImageFolders(ImageDataModule):
    """Images in `train/CLASS/` and `val/CLASS/` below one folder; `test/CLASS/` too, where it exists.

    The classes are the folders of `train` in the order of their names; with a checkpoint, those of the run.

    Args:
        root: The folder that holds `train` and `val`.
        transforms: Crops, augmentation and normalisation.
        grayscale: Read images with one channel.
        batch_size: Images in a batch of one rank.
        num_workers: Processes that read ahead, for each loader; 0 reads in the training process.
        seed: Picks the order of training images and their augmentation, and nothing else.
        predict_path: An image, or a folder of images, for `predict`; by default the validation images.

    Raises:
        ValueError: A number is out of range, or the transforms do not fit the channels.
    """

    def __init__(
        self,
        *,
        root: str,
        transforms: Transforms = Transforms(size=224, crop="resized", resize=256),  # noqa: B008 - frozen
        grayscale: bool = False,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        predict_path: str | None = None,
    ) -> None:
        mean, std = ((sum(values) / 3,) if grayscale else values for values in (IMAGENET_MEAN, IMAGENET_STD))
        super().__init__(
            transforms=settled(transforms, size=224, flip=0.5, mean=mean, std=std),
            channels=1 if grayscale else 3,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            predict_path=predict_path,
        )
        self.root = Path(root).expanduser()
        self._classes: tuple[str, ...] = ()

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the folders of `train`, or the classes of the run at hand."""
        if "classes" in self.kept:
            return tuple(self.kept["classes"])
        if not self._classes:
            self._classes = _folders(self.root / "train", self.root)
        return self._classes

    @property
    def planned_num_classes(self) -> int | None:
        """See `ImageDataModule`; None where the folder is not there."""
        return self.num_classes if (self.root / "train").is_dir() else None

    def open_images(self) -> dict[str, ImageSet]:
        """See `ImageDataModule`.

        Raises:
            ValueError: A folder is missing or holds no images, a class has no image to train with, or the classes of
                the parts differ.
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
        told = f"{folder / empty[0]} holds no images ({len(empty)} such classes)"
        if part == "train":
            raise ValueError(f"{told}; give each class images to learn from, or remove its folder from all parts")
        rank_zero_warn(f"{told}: the accuracy says nothing about them")

    def _check_classes(self, folder: Path) -> None:
        known, own = set(self.class_names), set(_folders(folder, self.root))
        of_run = "classes" in self.kept
        whose = "the run" if of_run else self.root / "train"
        if missing := sorted(known - own):
            remedy = self.other_data if of_run else "give it the same folders"
            new = f", and {min(own - known)!r} is none" if own - known else ""
            raise ValueError(
                f"{folder} has no folder {missing[0]!r} ({len(missing)} such classes of {whose}){new}; {remedy}"
            )
        if unknown := sorted(own - known):
            remedy = self.other_data if of_run else "move its images into the folders of their classes"
            raise ValueError(f"{folder / unknown[0]} is no class of {whose} ({len(unknown)} such folders); {remedy}")


def _folders(folder: Path, root: Path) -> tuple[str, ...]:
    """Names of the folders in a part, sorted."""
    if not folder.is_dir():
        missing = folder if root.is_dir() else root
        raise ValueError(
            f"there is no folder {missing}; data.root must hold train/CLASS/*.jpg and val/CLASS/*.jpg (of ImageNet: "
            "train/n01440764/..., val/n01440764/...)"
        )
    names = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))
    if not names:
        raise ValueError(f"{folder} holds no folders; put the images of each class into one, named after the class")
    return names


def _read_part(folder: Path, classes: Sequence[str], mode: str) -> DecodedFiles:
    from torchvision.datasets.folder import make_dataset

    numbers = {name: number for number, name in enumerate(classes)}
    suffixes, start = tuple(IMAGE_SUFFIXES), len(str(folder))

    def is_image(path: str) -> bool:
        return path.lower().endswith(suffixes) and f"{os.sep}." not in path[start:]  # not macOS's hidden `._x.jpg`

    samples = make_dataset(str(folder), numbers, is_valid_file=is_image, allow_empty=True)
    if not samples:
        raise ValueError(f"{folder} holds no images (*{', *'.join(sorted(IMAGE_SUFFIXES))}) in its class folders")
    return DecodedFiles([path for path, _ in samples], [number for _, number in samples], mode, folder)
