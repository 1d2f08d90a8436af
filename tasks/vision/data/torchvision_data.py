"""Small sets of torchvision that lie on disk already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from .image_sets import ImageSet, ImageTensors
from .in_memory import InMemoryImages
from .module import settled
from .transforms import Transforms

__all__ = ["TorchvisionData"]

DataSetName = Literal["CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "STL10", "SVHN"]


@dataclass(frozen=True, kw_only=True)
class _Known:
    """What must be known of a set before it is read."""

    files: str
    """What torchvision looks for below its root."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: int = 10
    size: int = 32
    flip: float = 0.0
    by_split: bool = False
    """Whether its parts are chosen by `split`, and not by `train`."""


_SETS = {
    "CIFAR10": _Known(
        files="cifar-10-batches-py/", mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), flip=0.5
    ),
    "CIFAR100": _Known(
        files="cifar-100-python/", mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762), flip=0.5, classes=100
    ),
    "FashionMNIST": _Known(files="FashionMNIST/raw/", mean=(0.2860,), std=(0.3530,), size=28, flip=0.5),
    "KMNIST": _Known(files="KMNIST/raw/", mean=(0.1918,), std=(0.3483,), size=28),
    "MNIST": _Known(files="MNIST/raw/", mean=(0.1307,), std=(0.3081,), size=28),
    "STL10": _Known(
        files="stl10_binary/", mean=(0.4467, 0.4398, 0.4066), std=(0.2603, 0.2566, 0.2713), size=96, flip=0.5,
        by_split=True,
    ),
    "SVHN": _Known(
        files="train_32x32.mat and test_32x32.mat", mean=(0.4377, 0.4438, 0.4728), std=(0.1980, 0.2010, 0.1970),
        by_split=True,
    ),
}  # fmt: skip


class TorchvisionData(InMemoryImages):
    """A set of torchvision that lies on disk; nothing is downloaded.

    Args:
        name: Its class in `torchvision.datasets`.
        root: The folder that torchvision calls root.
        transforms: Crops, augmentation and normalisation; by default shifts of up to four pixels, and flips where the
            classes are no digits or letters.
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
        name: DataSetName = "CIFAR10",
        root: str = "data",
        transforms: Transforms = Transforms(),  # noqa: B008 - frozen
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        predict_path: str | None = None,
    ) -> None:
        if name not in _SETS:
            raise ValueError(f"data.name: {name!r} is not one of {', '.join(_SETS)}")
        known = _SETS[name]
        super().__init__(
            transforms=settled(transforms, size=known.size, flip=known.flip, mean=known.mean, std=known.std),
            channels=len(known.mean),
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            predict_path=predict_path,
        )
        self.set_name = name
        self.root = Path(root).expanduser()
        self._classes = tuple(map(str, range(known.classes)))

    def open_images(self) -> dict[str, ImageSet]:
        """See `ImageDataModule`.

        Raises:
            ValueError: The files are missing or damaged.
        """
        parts = {part: self._open(part) for part in ("train", "test")}
        names = parts["train"][1]
        if len(names) == len(self._classes):
            self._classes = tuple(map(str, names))
        return {"train": parts["train"][0], "val": parts["test"][0]}

    def _open(self, part: str) -> tuple[ImageTensors, Sequence[str]]:
        """Images of a part, and the names of their classes where the set tells them."""
        import torchvision.datasets

        known = _SETS[self.set_name]
        options: dict[str, Any] = {"split": part} if known.by_split else {"train": part == "train"}
        try:
            data = getattr(torchvision.datasets, self.set_name)(str(self.root), download=False, **options)
            return _tensors(data), getattr(data, "classes", None) or ()
        except ModuleNotFoundError as error:
            raise ValueError(f"{self.set_name} needs the package {error.name}; install it with pip") from error
        except Exception as error:
            # torchvision asserts without a word what it expects of a file; pickle, gzip and scipy have errors of their
            # own.
            told = " ".join(str(error).split())[:160] or "a file is cut off or no part of the set"
            raise ValueError(
                f"cannot read {self.set_name} ({told}): data.root = {self.root} must hold {known.files} whole, as "
                f'`torchvision.datasets.{self.set_name}("{self.root}", ..., download=True)` leaves it'
            ) from error


def _tensors(data: Any) -> ImageTensors:
    """Images `(N, C, H, W)` and labels of a set of torchvision, which keeps them in one of three ways."""
    images = torch.as_tensor(data.data)
    labels = torch.as_tensor(data.targets if hasattr(data, "targets") else data.labels)
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2)
    return ImageTensors(images, labels)
