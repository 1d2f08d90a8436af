"""The base of data modules whose training samples are counted on over a run, so that it resumes after any batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from .sampling import ResumableLoader, TrainSampler, ValidationSampler

__all__ = ["SampledDataModule"]


class SampledDataModule(LightningDataModule):
    """Loaders for training and evaluation, and a checkpoint that holds how many samples were handed out.

    A subclass opens its data in `setup` (after this one's) and makes its loaders by `train_loader` and
    `evaluation_loader`.

    Args:
        batch_size: Samples in a batch of one rank, B.
        num_workers: Processes that read ahead, for each loader; 0 reads in the training process.
        seed: Picks the training samples and how they are augmented, and nothing else.

    Raises:
        ValueError: A number is out of range.
    """

    batch_kind: ClassVar[str | None] = None
    """What its batches hold, in the words of the tasks that take them."""

    def __init__(self, *, batch_size: int, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        for name, value in {"num_workers": num_workers, "seed": seed}.items():
            if value < 0:
                raise ValueError(f"`{name}` must be at least 0, got {value}.")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._samples_before = 0
        self._train_sampler: TrainSampler | None = None

    def setup(self, stage: str | None = None) -> None:
        """Count the samples of a new fit from where the trainer stands."""
        if stage in (None, "fit"):
            # A second `fit` of the same trainer goes on; a new trainer starts from the first sample.
            batches_before = self.trainer.fit_loop.total_batch_idx + 1 if self.trainer is not None else 0
            self._samples_before = batches_before * self.batch_size * self.replicas()["num_replicas"]
            self._train_sampler = None

    def state_dict(self) -> dict[str, int]:
        """The samples that were handed out, for checkpoints at the end of an epoch.

        Between two epochs Lightning does not load the state of the loader itself.
        """
        sampler = self._train_sampler
        return {"samples_seen": self._samples_before if sampler is None else sampler.samples_seen}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on after the samples of a checkpoint."""
        self._samples_before = state_dict["samples_seen"]

    def train_loader(
        self, dataset: Dataset[Any], *, collate: Callable[[list[Any]], Any] | None = None
    ) -> DataLoader[Any]:
        """A loader that counts its samples on over the run.

        Args:
            dataset: Items by the running number of a sample, which goes on past its length; the length is an epoch.
            collate: Makes a batch from a list of items; torch's default otherwise.
        """
        # A trainer that reloads its loaders every epoch must not read the first epoch again.
        samples_seen = self._samples_before if self._train_sampler is None else self._train_sampler.samples_seen
        sampler = TrainSampler(dataset, batch_size=self.batch_size, samples_seen=samples_seen, **self.replicas())
        self._train_sampler = sampler
        return ResumableLoader(dataset, sampler=sampler, collate_fn=collate, **self._loader_settings())

    def evaluation_loader(
        self, dataset: Dataset[Any], *, collate: Callable[[list[Any]], Any] | None = None
    ) -> DataLoader[Any]:
        """A loader that reads each item once, and runs as often on every rank.

        Args:
            dataset: Items by index, empty ones past its length.
            collate: Makes a batch from a list of items, of which some may be empty.
        """
        sampler = ValidationSampler(dataset, batch_size=self.batch_size, **self.replicas())
        return DataLoader(dataset, sampler=sampler, collate_fn=collate, **self._loader_settings())

    def replicas(self) -> dict[str, int]:
        """Ranks that read different data, `num_replicas`, and this one among them, `rank`."""
        # The strategy knows which ranks share their data: under tensor parallelism that is not the world size.
        replicas = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return {"num_replicas": 1, "rank": 0} if replicas is None else dict(replicas)

    def _loader_settings(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": False,
            "pin_memory": self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            # Loaders draw a seed for their workers: from here, so that reading data leaves the model's dropout alone.
            "generator": torch.Generator(),
        }
