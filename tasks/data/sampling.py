"""Which samples a rank reads, in which order, so that a run resumes after any batch and on any number of ranks.

A run counts its training samples over all ranks. Global batch `n` holds the samples `n * G` to `(n + 1) * G`, with `G`
the batch size of a rank times the number of ranks, and each rank takes one slice. So the samples of an optimizer step
depend on the global batch alone, however ranks, workers and accumulation divide it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

__all__ = [
    "PaddedItems",
    "ResumableLoader",
    "ShuffledSamples",
    "SizedDataset",
    "TrainSampler",
    "ValidationSampler",
    "collate_padded",
    "seed_of",
]


def seed_of(*position: int | str) -> int:
    """A 64-bit seed that depends on a position alone: the seed of a run, and where in the run something is drawn."""
    return int.from_bytes(blake2b(repr(position).encode(), digest_size=8).digest())


class SizedDataset(Sized, Protocol):
    """Items by index, and their number."""

    def __getitem__(self, index: int, /) -> Any: ...


class TrainSampler(DistributedSampler[Any]):
    """Sample numbers of one rank, counted from `samples_seen` over all epochs.

    It is a `DistributedSampler` because Lightning wraps every other sampler in one, which would shuffle and divide once
    more.

    Args:
        dataset: Its length is the number of samples in an epoch.
        batch_size: Samples in a batch of one rank.
        num_replicas: Ranks that read different data.
        rank: This rank among them.
        samples_seen: Samples that all ranks together have read already.
    """

    def __init__(
        self, dataset: Dataset[Any], *, batch_size: int, num_replicas: int, rank: int, samples_seen: int = 0
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)
        self.batch_size = batch_size
        self.samples_seen = samples_seen

    @property
    def global_batch_size(self) -> int:
        """Samples in a batch of all ranks."""
        return self.batch_size * self.num_replicas

    @property
    def num_batches(self) -> int:
        """Batches in an epoch, at least one."""
        return max(1, len(self.dataset) // self.global_batch_size)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return self.num_batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        # A full epoch from here, even in the middle of one: Lightning ends epochs by its own count, which a limit on
        # the batches or another number of ranks may have shifted.
        first = self.samples_seen + self.rank * self.batch_size
        for batch in range(self.num_batches):
            start = first + batch * self.global_batch_size
            yield from range(start, start + self.batch_size)


class ValidationSampler(DistributedSampler[Any]):
    """Indices of one rank: the same number on every rank, and none twice.

    The last batch may run past the end of the dataset, whose items are empty there: collectives in the model need the
    same number of batches on all ranks.

    Args:
        dataset: Gives an empty item for an index past its length.
        batch_size: Items in a batch of one rank.
        num_replicas: Ranks that read different data.
        rank: This rank among them.
    """

    def __init__(self, dataset: Dataset[Any], *, batch_size: int, num_replicas: int, rank: int) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)
        num_batches = -(-len(dataset) // (batch_size * num_replicas))  # type: ignore[arg-type]
        self.num_samples = num_batches * batch_size

    def __iter__(self) -> Iterator[int]:
        # Interleaved, so that the ranks' parts of the last batch differ by one item at most.
        return iter(range(self.rank, self.num_samples * self.num_replicas, self.num_replicas))


class ResumableLoader(DataLoader[Any]):
    """A loader whose state is the number of samples that were read, over all ranks.

    Batches that workers have prepared and the loop has not taken do not count. The state is the same on every rank, and
    valid for another number of ranks.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            # Before the batch is yielded: a checkpoint may be saved while the loop still works on it.
            if isinstance(self.sampler, TrainSampler):
                self.sampler.samples_seen += self.sampler.global_batch_size
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The number of samples read; empty if Lightning has replaced the sampler (`overfit_batches`)."""
        return {"samples_seen": self.sampler.samples_seen} if isinstance(self.sampler, TrainSampler) else {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue after the samples of a checkpoint."""
        if isinstance(self.sampler, TrainSampler) and state_dict:
            self.sampler.samples_seen = state_dict["samples_seen"]


class ShuffledSamples(Dataset[Any]):
    """Maps the running number of a training sample to an item: each item once an epoch, in random order.

    The order of an epoch depends on the seed and the epoch alone. The random numbers that an item draws (from torch's
    global generator, as torchvision's transforms do) depend on the seed and the sample number alone, not on ranks,
    workers, or what was drawn before. So a resumed run sees the same images, cropped and flipped in the same way.

    Args:
        dataset: The items.
        seed: Of the orders and of what items draw.

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
        """The item of a sample, of any epoch."""
        generator = torch.default_generator  # forking and seeding all generators takes 40 times as long
        state = generator.get_state()
        try:
            generator.manual_seed(seed_of(self.seed, "sample", sample))
            return self.dataset[self.index(sample)]
        finally:
            generator.set_state(state)

    def index(self, sample: int) -> int:
        """The index of a sample in the dataset."""
        epoch, position = divmod(sample, len(self))
        if epoch != self._epoch:
            order = torch.randperm(
                len(self), generator=torch.Generator().manual_seed(seed_of(self.seed, "epoch", epoch))
            )
            self._epoch, self._order = epoch, order.numpy()
        return int(self._order[position])


class PaddedItems(Dataset[Any]):
    """Items with their index, and past the end of the dataset items that do not count.

    Args:
        dataset: The items, at least one.

    Raises:
        ValueError: The data set is empty.
    """

    def __init__(self, dataset: SizedDataset) -> None:
        if not len(dataset):
            raise ValueError("there is nothing to evaluate: the validation part holds no items")
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        """The index and an item; past the end -1 and the first item, which has the right shapes."""
        return (index, self.dataset[index]) if index < len(self) else (-1, self.dataset[0])


def collate_padded(items: list[tuple[int, Any]]) -> tuple[torch.Tensor, Any]:
    """Indices `(B,)` and the batch of the items that count, which may be none.

    A batch of no items keeps shapes and dtypes, so that the model runs on it, as collectives need.
    """
    counted = [item for item in items if item[0] >= 0]
    batch = default_collate([item for _, item in counted or items[:1]])
    if not counted:
        batch = _first(batch, 0)
    return torch.tensor([index for index, _ in counted], dtype=torch.int64), batch


def _first(batch: Any, number: int) -> Any:
    """The first items of a collated batch."""
    if isinstance(batch, dict):
        return {name: _first(value, number) for name, value in batch.items()}
    if isinstance(batch, list | tuple) and not isinstance(batch[0], str):
        return type(batch)(_first(value, number) for value in batch)
    return batch[:number]
