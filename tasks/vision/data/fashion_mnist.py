"""Fashion-MNIST as Debian's package lays it out, or as its authors give it away."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .image_sets import ImageSet, ImageTensors
from .in_memory import InMemoryImages
from .module import settled
from .transforms import Transforms

__all__ = ["FashionMnist"]


class FashionMnist(InMemoryImages):
    """Fashion-MNIST (Xiao et al. 2017): 60,000 and 10,000 images of clothes, 28x28 with one channel, 10 classes.

    Args:
        path: Folder of the four files `train-images-idx3-ubyte.gz` and so on, also unpacked; Debian's by default.
        transforms: Crops, augmentation and normalisation; by default shifts of up to two pixels, and flips.
        batch_size: Images in a batch of one rank.
        num_workers: Processes that read ahead, for each loader; 0 reads in the training process.
        seed: Picks the order of training images and their augmentation, and nothing else.
        predict_path: An image, or a folder of images, for `predict`; by default the validation images.

    Raises:
        ValueError: A number is out of range.
    """

    _classes = (
        "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
    )  # fmt: skip

    def __init__(
        self,
        *,
        path: str = "/usr/share/datasets/fashion-mnist",
        transforms: Transforms = Transforms(),  # noqa: B008 - frozen
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        predict_path: str | None = None,
    ) -> None:
        super().__init__(
            transforms=settled(transforms, size=28, padding=2, flip=0.5, mean=(0.2860,), std=(0.3530,)),
            channels=1,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            predict_path=predict_path,
        )
        self.path = Path(path).expanduser()

    def open_images(self) -> dict[str, ImageSet]:
        """See `ImageDataModule`.

        Raises:
            ValueError: A file is missing or damaged.
        """
        return {part: self._read(prefix) for part, prefix in (("train", "train"), ("val", "t10k"))}

    def _read(self, prefix: str) -> ImageTensors:
        images = _read_idx(self.path / f"{prefix}-images-idx3-ubyte")
        labels = _read_idx(self.path / f"{prefix}-labels-idx1-ubyte")
        if images.ndim != 3 or images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{self.path}/{prefix}-*: images {tuple(images.shape)} and labels {tuple(labels.shape)} do not belong "
                "together; Fashion-MNIST has (N, 28, 28) and (N,)"
            )
        if len(labels) and int(labels.max()) >= self.num_classes:
            raise ValueError(f"{self.path}/{prefix}-labels-idx1-ubyte: a label is {int(labels.max())}, above 9")
        return ImageTensors(images[:, None], labels)


def _read_idx(path: Path) -> Tensor:
    """An array of bytes in the IDX format: zeros, the type 8, the number of dimensions, their sizes, the values.

    Raises:
        ValueError: Neither the file nor its `.gz` can be read.
    """
    packed = path.with_name(f"{path.name}.gz")
    file = path if path.is_file() else packed
    try:
        content = file.read_bytes()
        if file is packed:
            content = gzip.decompress(content)
    except FileNotFoundError as error:
        raise ValueError(
            f"there is no {packed}; install Debian's package dataset-fashion-mnist (apt install dataset-fashion-mnist),"
            " or give data.path the folder of the four files"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {file}: {error}; replace the file") from error
    start = 4 + 4 * content[3] if len(content) > 3 else 4
    shape = np.frombuffer(content[4:start], ">i4").tolist() if len(content) >= start else []
    if content[:3] != b"\0\0\x08" or not shape or len(content) != start + math.prod(shape):
        raise ValueError(f"{file} is no whole IDX file of bytes; replace the file")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).copy()).reshape(shape)
