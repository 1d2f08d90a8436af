"""The base of data modules of unlabelled images: loaders, flips, seeds of new images. Subclasses open the images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...data.module import SampledDataModule, hash_tensors
from ...data.sampling import PaddedItems, ShuffledSamples, SizedDataset, collate_padded

__all__ = ["ImageData", "Parts"]


# Images that the hash of a part reads, because a subclass may have to decode them.
_HASHED_IMAGES = 1000


@dataclass(frozen=True)
class Parts:
    """The images of a subclass: `(C, H, W)` in [-1, 1] by index, not augmented.

    Args:
        train: Training images.
        val: Validation images.
        test: Test images; None to test on the validation images.
    """

    train: SizedDataset
    val: SizedDataset
    test: SizedDataset | None = None


class ImageData(SampledDataModule, ABC):
    """Batches of images `(B, C, H, W)`, float32 in [-1, 1].

    Training batches are the images alone, each once an epoch; evaluation batches are pairs of indices `(B,)` and
    images; `predict` batches are pairs of indices and the seeds `(B,)` of images to make, and need no images.

    Args:
        image_size: Pixels a side, H and W.
        channels: 3 for colour, 1 for grey.
        batch_size: Images in a batch of one rank, B.
        num_workers: Processes that read ahead, for each loader; 0 reads in the training process.
        flip: Mirror each training image with probability 1/2.
        val_images: Number of images in a validation, spread evenly over the validation part; all of it by default.
        num_images: Number of images that `predict` makes, over all ranks.
        image_seed: Seed of the first of them; the next images have the next seeds.
        seed: Determines the order of the training images and their flips, and nothing else.

    Raises:
        ValueError: A number is out of range.
    """

    batch_kind = "images"
    other_data = "give images of the run's size and colours, or start a new run"

    def __init__(
        self,
        *,
        image_size: int = 64,
        channels: Literal[1, 3] = 3,
        batch_size: int = 64,
        num_workers: int = 0,
        flip: bool = True,
        val_images: int | None = None,
        num_images: int = 16,
        image_seed: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        for name, value in {"image_size": image_size, "val_images": val_images, "num_images": num_images}.items():
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if image_seed < 0:
            raise ValueError(f"`image_seed` must be at least 0, got {image_seed}.")
        if channels not in (1, 3):
            raise ValueError(f"`channels` must be 3 for colour or 1 for grey, got {channels}.")
        self.image_size = image_size
        self.channels = channels
        self.flip = flip
        self.val_images = val_images
        self.num_images = num_images
        self.image_seed = image_seed
        self._parts: Parts | None = None

    @abstractmethod
    def open_parts(self) -> Parts:
        """Open the images; every rank calls this."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(C, H, W)`, known before anything is read."""
        return self.channels, self.image_size, self.image_size

    def meaning(self) -> dict[str, Any]:
        """See `SampledDataModule.meaning`: the shape of the images that the network makes."""
        return {"data.image_size": self.image_size, "data.channels": self.channels}

    def samples(self) -> dict[str, Any]:
        """See `SampledDataModule.samples`; empty after `setup` for `predict`, which opens no images."""
        if self._parts is None:
            return {}
        parts = {"training images": self._parts.train, "validation images": self._parts.val}
        counts = {f"number of {name}": len(images) for name, images in parts.items()}
        return counts | {name: self.digest(images) for name, images in parts.items()}

    def digest(self, images: Any) -> str:
        """A hash of a part: of some images, spread evenly; a subclass that has files hashes their names."""
        chosen = _spread(images, _HASHED_IMAGES)
        return hash_tensors(*(chosen[index] for index in range(len(chosen))))

    def setup(self, stage: str | None = None) -> None:
        """Open the images, on every rank, and read one, so that wrong options raise here and not in a worker.

        Raises:
            ValueError: That image cannot be read, or an option does not fit it.
        """
        super().setup(stage)
        if stage != "predict":
            self._parts = self.open_parts()
            images = self._parts.val if stage in ("validate", "test") else self._parts.train
            images[0]

    def train_dataloader(self) -> DataLoader[Any]:
        """Each image once an epoch, counted over the whole run."""
        images = self._opened.train
        return self.train_loader(ShuffledSamples(_Flipped(images) if self.flip else images, seed=self.seed))

    def val_dataloader(self) -> DataLoader[Any]:
        """The same images in every validation."""
        return self.evaluation_loader(PaddedItems(_spread(self._opened.val, self.val_images)), collate=collate_padded)

    def test_dataloader(self) -> DataLoader[Any]:
        """All images of the test part; without one, all images of the validation part, whatever `val_images` says."""
        images = self._opened.test or self._opened.val
        return self.evaluation_loader(PaddedItems(images), collate=collate_padded)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Seeds of images to make."""
        seeds = list(range(self.image_seed, self.image_seed + self.num_images))
        return self.evaluation_loader(PaddedItems(seeds), collate=collate_padded)

    def real_images(self, part: Literal["train", "val", "test"], limit: int) -> Tensor:
        """At most `limit` images `(N, C, H, W)` of a part, spread evenly over it, not augmented."""
        opened = self._opened
        images = {"train": opened.train, "val": opened.val, "test": opened.test or opened.val}[part]
        chosen = _spread(images, limit)
        return torch.stack([chosen[index] for index in range(len(chosen))])

    @property
    def _opened(self) -> Parts:
        if self._parts is None:
            raise RuntimeError(f"{type(self).__name__} is not set up: call `setup()` first.")
        return self._parts


class _Flipped(Dataset[Tensor]):
    """Images that are mirrored with probability 1/2, by torch's global generator."""

    def __init__(self, images: SizedDataset) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        image: Tensor = self.images[index]
        return image.flip(-1) if torch.rand(()) < 0.5 else image


class _Chosen(Dataset[Tensor]):
    """Some of the images."""

    def __init__(self, images: SizedDataset, indices: list[int]) -> None:
        self.images = images
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:
        image: Tensor = self.images[self.indices[index]]
        return image


def _spread(images: SizedDataset, limit: int | None) -> SizedDataset:
    """At most `limit` images, at even distances."""
    if limit is None or len(images) <= limit:
        return images
    return _Chosen(images, [index * len(images) // limit for index in range(limit)])
