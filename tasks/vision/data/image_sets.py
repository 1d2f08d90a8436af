"""Labelled images as data sets: in memory, or as files that are decoded when they are asked for.

Shapes: `N` images, `C` channels, `H` and `W` height and width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ...data.module import hash_paths, hash_tensors
from ...data.sources import read_image

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["DecodedFiles", "ImageSet", "ImageTensors", "TransformedImages", "hash_images"]


class ImageSet(Protocol):
    """Images by index, with labels `(N,)` and names that predictions tell."""

    @property
    def labels(self) -> Tensor:
        """Class numbers, int64; -1 where the class is unknown."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...

    def name(self, index: int) -> str | int:
        """What predictions call the image: its path or its index."""


class ImageTensors:
    """Images in memory.

    Args:
        images: `(N, C, H, W)`, uint8.
        labels: `(N,)`, int64.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        assert images.dtype == torch.uint8
        assert images.ndim == 4
        assert len(images) == len(labels)
        self.images = images.contiguous()
        self.labels = labels.long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]

    def name(self, index: int) -> int:
        """The index."""
        return index


class DecodedFiles:
    """Image files, decoded by Pillow.

    Args:
        paths: The files.
        labels: Class number of each; -1 where unknown.
        mode: Pillow's mode, `RGB` or `L`.
        root: The folder that they lie in.
    """

    def __init__(self, paths: Sequence[str | Path], labels: Sequence[int], mode: str, root: Path) -> None:
        # One array and no list of a million objects, whose counters every worker would write to and so copy.
        self._paths = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.mode = mode
        self.root = root

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Image:
        return read_image(self.name(index), self.mode)

    def name(self, index: int) -> str:
        """The path."""
        return os.fsdecode(self._paths[index])


def hash_images(images: ImageSet) -> str:
    """A hash that other images, labels or another order change: of pixels in memory, of names of files, of labels."""
    if isinstance(images, ImageTensors):
        return hash_tensors(images.images, images.labels)
    if isinstance(images, DecodedFiles):
        return hash_paths([images.name(index) for index in range(len(images))], images.root, images.labels.tolist())
    return hash_tensors(images.labels)


class TransformedImages:
    """Items of a batch: `{"image": uint8 (C, H, W), "label": int}`.

    Args:
        images: The images.
        transform: Makes a tensor of the model's size from one.
    """

    def __init__(self, images: ImageSet, transform: Callable[[Any], Tensor]) -> None:
        self.images = images
        self.transform = transform
        self._labels = images.labels.tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.transform(self.images[index]), "label": self._labels[index]}
