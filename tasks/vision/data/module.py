"""The base of data modules of labelled images: loaders, normalisation on the device, what the task asks for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ...data.module import SampledDataModule
from ...data.sampling import PaddedItems, ShuffledSamples, collate_padded
from ...data.sources import find_images
from .image_sets import DecodedFiles, ImageSet, TransformedImages, hash_images
from .transforms import Transforms

__all__ = ["ImageDataModule"]


class ImageDataModule(SampledDataModule, ABC):
    """Batches of labelled images.

    A batch is `{"image": (B, C, H, W), "label": (B,)}`: float32, normalised by `mean` and `std`, and int64. Batches of
    evaluation also hold `index` `(B,)`, and may hold no image on a rank that has run out.

    Args:
        transforms: Crops, augmentation and normalisation.
        batch_size: Images in a batch of one rank, B.
        num_workers: Processes that read ahead, for each loader; 0 reads in the training process.
        seed: Picks the order of training images and their augmentation, and nothing else.
        predict_path: An image, or a folder of images, for `predict`; by default the validation images.

    Raises:
        ValueError: A number is out of range, or the transforms do not fit the channels.
    """

    batch_kind = "labelled images"

    def __init__(
        self,
        *,
        transforms: Transforms,
        channels: int,
        batch_size: int,
        num_workers: int,
        seed: int,
        predict_path: str | None,
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
            raise ValueError("transforms.policy: autoaugment is for RGB images; take randaugment or trivialaugment")
        self.transforms = transforms
        self.channels = channels
        self.predict_path = predict_path
        self._sets: dict[str, ImageSet] = {}
        self._scaling: tuple[Tensor, Tensor] | None = None

    _classes: Sequence[str] = ()
    other_data = "give data of the same classes in the same order, or start a new run"

    @abstractmethod
    def open_images(self) -> dict[str, ImageSet]:
        """The parts `train` and `val`, and `test` where there is one of its own."""

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
        """Number of classes as far as the settings tell before any data are read; None where they do not."""
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
        """See `SampledDataModule.meaning`: the classes, and how pixels become numbers."""
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
        if predicts_files and (classes := self.kept.get("classes")):  # images of training are not needed then
            self._classes = tuple(classes)
        elif not self._sets.keys() - {"predict"}:
            self._sets |= self.open_images()
        if predicts_files:
            self.part("predict")  # what is wrong with its path is told before the network is made

    def part(self, name: str) -> ImageSet:
        """The images of `train`, `val`, `test` or `predict`, after `setup`."""
        if name == "predict" and self.predict_path is not None and name not in self._sets:
            self._sets[name] = _files_to_predict(self.predict_path, "L" if self.channels == 1 else "RGB")
        if not self._sets:
            raise RuntimeError(f"{type(self).__name__} is not set up: call `setup()` first.")
        return self._sets[name if name in self._sets else "val"]

    def baseline(self) -> tuple[str, float]:
        """What is easily reached on the validation images: how, and its top-1 accuracy."""
        counts = self.part("train").labels.bincount(minlength=self.num_classes)
        share = (self.part("val").labels == counts.argmax()).double().mean()
        return "the largest class", float(share)

    def train_dataloader(self) -> DataLoader[Any]:
        """Each image once an epoch, in random order, counted on over the run."""
        images = TransformedImages(self.part("train"), self.transforms.training())
        return self.train_loader(ShuffledSamples(images, seed=self.seed))

    def val_dataloader(self) -> DataLoader[Any]:
        """Each validation image once."""
        return self._evaluate("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Each test image once: the validation images, where the data have no other ones."""
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


def settled(transforms: Transforms, **own: Any) -> Transforms:
    """The transforms with the data set's own values in place of None; its padding where the crop is padded."""
    if transforms.crop != "padded":
        own.pop("padding", None)
    return replace(transforms, **{name: value for name, value in own.items() if getattr(transforms, name) is None})


def _collate(items: list[tuple[int, Any]]) -> dict[str, Tensor]:
    index, batch = collate_padded(items)
    return {"index": index, **batch}


def _files_to_predict(path: str, mode: str) -> DecodedFiles:
    """An image, or the images below a folder in the order of their names."""
    root = Path(path).expanduser()
    files = [root] if root.is_file() else find_images(root)
    if not files:
        problem = "holds no images" if root.is_dir() else "does not exist"
        raise ValueError(f"data.predict_path: {root} {problem}; give an image, or a folder of images")
    return DecodedFiles(files, [-1] * len(files), mode, root)
