"""Samples of a finite data set by their running number: each once an epoch, augmented as the number alone says."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from ..seeds import seed_of

__all__ = ["ShuffledSamples"]


class SizedDataset(Sized, Protocol):
    """Items by index, and how many there are."""

    def __getitem__(self, index: int, /) -> Any: ...


class ShuffledSamples(Dataset[Any]):
    """Maps the running number of a training sample to an item, each item once an epoch in a random order.

    The order of an epoch depends on the seed and the epoch alone, and what an item draws (from torch's global
    generator, as torchvision's transforms do) on the seed and the sample's number alone: not on ranks, workers, or what
    was drawn before. So a resumed run sees the same images, cropped and flipped in the same way.

    Args:
        dataset: The items.
        seed: Picks the orders and what items draw.

    Raises:
        ValueError: The data set is empty.
    """

    def __init__(self, dataset: SizedDataset, *, seed: int) -> None:
        if not len(dataset):
            raise ValueError("there is nothing to train on: the training part holds no items")
        self.dataset = dataset
        self.seed = seed
        self._epoch = -1
        self._order: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, sample: int) -> Any:
        """Item of sample number `sample`, which may lie in any epoch."""
        generator = torch.default_generator  # itself: forking and seeding all generators takes 40 times as long
        state = generator.get_state()
        try:
            generator.manual_seed(seed_of(self.seed, "sample", sample))
            return self.dataset[self.index(sample)]
        finally:
            generator.set_state(state)

    def index(self, sample: int) -> int:
        """Index in the data set of sample number `sample`."""
        epoch, position = divmod(sample, len(self))
        if epoch != self._epoch:
            order = torch.randperm(
                len(self), generator=torch.Generator().manual_seed(seed_of(self.seed, "epoch", epoch))
            )
            self._epoch, self._order = epoch, order.numpy()
        return int(self._order[position])
