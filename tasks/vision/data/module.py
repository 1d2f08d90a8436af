"""The base of data modules of labelled images: image sets, loaders, normalisation on the device.

Shapes: `N` images, `B` images in a batch, `C` channels, `H` and `W` height and width.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ...data.module import SampledDataModule, hash_paths, hash_tensors
from ...data.sampling import PaddedItems, ShuffledSamples, collate_padded
from ...data.sources import find_images, read_image
from .transforms import Transforms

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["DecodedFiles", "ImageDataModule", "ImageSet", "ImageTensors", "hash_images", "settled"]


class ImageSet(Protocol):
    """Images by index, with labels `(N,)` and the names that predictions show."""

    @property
    def labels(self) -> Tensor:
        """Class numbers, int64; -1 for an unknown class."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...

    def name(self, index: int) -> str | int:
        """The name of an image in predictions: its path or its index."""


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
        labels: Class number of each; -1 if unknown.
        mode: Pillow's mode, `RGB` or `L`.
        root: The folder that contains them.
    """

    def __init__(self, paths: Sequence[str | Path], labels: Sequence[int], mode: str, root: Path) -> None:
        # One array instead of a list of a million objects: workers would write to the reference counts of a list, and
        # so copy the pages that they share with the main process.
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
    """A hash that changes with the images, their labels or their order: of pixels in memory, or of names of files."""
    if isinstance(images, ImageTensors):
        return hash_tensors(images.images, images.labels)
    if isinstance(images, DecodedFiles):
        return hash_paths([images.name(index) for index in range(len(images))], images.root, images.labels.tolist())
    return hash_tensors(images.labels)


class TransformedImages:
    """Items of a batch: `{"image": uint8 (C, H, W), "label": int}`.

    Args:
        images: The images.
        transform: Turns one into a tensor of the model's size.
    """

    def __init__(self, images: ImageSet, transform: Callable[[Any], Tensor]) -> None:
        self.images = images
        self.transform = transform
        self._labels = images.labels.tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.transform(self.images[index]), "label": self._labels[index]}


class ImageDataModule(SampledDataModule, ABC):
    """Batches of labelled images.

    A batch is `{"image": (B, C, H, W), "label": (B,)}`: float32, normalised by `mean` and `std`, and int64. Evaluation
    batches also have `index` `(B,)`, and are empty on a rank that has run out of images.

    Args:
        transforms: Crops, augmentation and normalisation.
        channels: Channels of an image, C.
        batch_size: Images in a batch of one rank, B.
        num_workers: Processes that read ahead, for each loader; 0 reads in the training process.
        seed: Determines the order and the augmentation of training images, and nothing else.
        predict_path: An image or a folder of images for `predict`; the validation images by default.

    Raises:
        ValueError: A number is out of range, or the transforms do not fit the channels.
    """

    batch_kind = "labelled images"
    other_data = "give data of the same classes in the same order, or start a new run"
    _classes: Sequence[str] = ()

    def __init__(
        self,
        *,
        transforms: Transforms,
        channels: int,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        predict_path: str | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        assert transforms.mean is not None
        assert transforms.std is not None
        for name, values in {"mean": transforms.mean, "std": transforms.std}.items():
            if len(values) != channels:
                raise ValueError(
                    f"transforms.{name} has {len(values)} values for images of {channels} channels; give one for each"
                )
        if transforms.policy == "autoaugment" and channels != 3:
            raise ValueError("transforms.policy: autoaugment is for RGB images; use randaugment or trivialaugment")
        self.transforms = transforms
        self.channels = channels
        self.predict_path = predict_path
        self._sets: dict[str, ImageSet] = {}
        self._scaling: tuple[Tensor, Tensor] | None = None

    @abstractmethod
    def open_images(self) -> dict[str, ImageSet]:
        """The parts `train` and `val`, and `test` if the data have one."""

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the classes, by their number."""
        return self._classes

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def planned_num_classes(self) -> int | None:
        """Number of classes that the settings imply before any data are read; None if they do not."""
        return self.num_classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of training images, known before any data are read."""
        assert self.transforms.size is not None
        return self.channels, self.transforms.size, self.transforms.size

    @property
    def evaluation_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of validation images."""
        size = self.transforms.eval_size or self.image_shape[1]
        return self.channels, size, size

    def meaning(self) -> dict[str, Any]:
        """See `SampledDataModule.meaning`: the classes, and the normalisation of pixels."""
        scaling = {"data.transforms.mean": self.transforms.mean, "data.transforms.std": self.transforms.std}
        return {"classes": list(self.class_names), **{name: list(values or ()) for name, values in scaling.items()}}

    def samples(self) -> dict[str, Any]:
        """See `SampledDataModule.samples`."""
        parts = {"training images": self.part("train"), "validation images": self.part("val")}
        counts = {f"number of {name}": len(images) for name, images in parts.items()}
        return counts | {name: hash_images(images) for name, images in parts.items()}

    def setup(self, stage: str | None = None) -> None:
        """Open the images, on every rank."""
        super().setup(stage)
        predicts_files = stage == "predict" and self.predict_path is not None
        if predicts_files and (classes := self.kept.get("classes")):  # the training images are not needed then
            self._classes = tuple(classes)
        elif not self._sets.keys() - {"predict"}:
            self._sets |= self.open_images()
        if predicts_files:
            self.part("predict")  # a wrong path raises before the network is built

    def part(self, name: str) -> ImageSet:
        """The images of `train`, `val`, `test` or `predict`, after `setup`."""
        if name == "predict" and self.predict_path is not None and name not in self._sets:
            self._sets[name] = _files_to_predict(self.predict_path, "L" if self.channels == 1 else "RGB")
        if not self._sets:
            raise RuntimeError(f"{type(self).__name__} is not set up: call `setup()` first.")
        return self._sets[name if name in self._sets else "val"]

    def baseline(self) -> tuple[str, float]:
        """What is easily reached on the validation images: the method, and its top-1 accuracy."""
        counts = self.part("train").labels.bincount(minlength=self.num_classes)
        share = (self.part("val").labels == counts.argmax()).double().mean()
        return "the largest class", float(share)

    def train_dataloader(self) -> DataLoader[Any]:
        """Each image once an epoch, in random order, counted over the whole run."""
        images = TransformedImages(self.part("train"), self.transforms.training())
        return self.train_loader(ShuffledSamples(images, seed=self.seed))

    def val_dataloader(self) -> DataLoader[Any]:
        """Each validation image once."""
        return self._evaluate("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Each test image once; the validation images if the data have no others."""
        return self._evaluate("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Each image of `predict_path` once."""
        return self._evaluate("predict")

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        """Normalise the images on the device."""
        images = batch["image"]
        if self._scaling is None or self._scaling[0].device != images.device:
            factors = (self.transforms.mean, self.transforms.std)
            mean, std = (255 * torch.tensor(values, device=images.device)[:, None, None] for values in factors)
            self._scaling = mean, std
        mean, std = self._scaling
        images = images.float().sub_(mean).div_(std)
        if self.trainer is not None:
            images = self.trainer.precision_plugin.convert_input(images)
        return {**batch, "image": images}

    def _evaluate(self, part: str) -> DataLoader[Any]:
        images = TransformedImages(self.part(part), self.transforms.evaluation())
        return self.evaluation_loader(PaddedItems(images), collate=_collate)


def settled(transforms: Transforms, **defaults: Any) -> Transforms:
    """The transforms with the data set's defaults in place of None; its `padding` only if the crop is `padded`."""
    if transforms.crop != "padded":
        defaults.pop("padding", None)
    return replace(transforms, **{name: value for name, value in defaults.items() if getattr(transforms, name) is None})


def _collate(items: list[tuple[int, Any]]) -> dict[str, Tensor]:
    index, batch = collate_padded(items)
    return {"index": index, **batch}


def _files_to_predict(path: str, mode: str) -> DecodedFiles:
    """An image, or the images below a folder sorted by name."""
    root = Path(path).expanduser()
    files = [root] if root.is_file() else find_images(root)
    if not files:
        problem = "contains no images" if root.is_dir() else "does not exist"
        raise ValueError(f"data.predict_path: {root} {problem}; give an image, or a folder of images")
    return DecodedFiles(files, [-1] * len(files), mode, root)
