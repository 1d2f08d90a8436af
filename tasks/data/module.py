"""The base of data modules: runs resume after any batch, and checkpoints keep a record of the data.

The record is a dict of plain values, in every checkpoint under `data_record` and in the run folder as `data.json`:

- `kind`: the class of the data module.
- `meaning`: what outputs of the model mean, by name: the names of the classes, the tokenizer, the normalisation of
  pixels. It must be the same wherever the weights are used.
- `samples`: facts that differ if other samples are trained on. They must be the same where a run continues.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..atomic_files import write_text
from ..checkpoints.saving import read_without_tensors
from ..errors import on_all_ranks
from .sampling import ResumableLoader, TrainSampler, ValidationSampler

__all__ = [
    "DATA_RECORD",
    "TOKENIZER",
    "SampledDataModule",
    "hash_paths",
    "hash_tensors",
    "names_differ",
    "read_record",
    "values_differ",
    "write_record",
]

DATA_RECORD = "data_record"
"""Key of the record in checkpoints."""

TOKENIZER = "tokenizer"
"""The part of the meaning that holds files: text by name; in the run folder it is a folder."""

_FILE_NAME = "data.json"
_MAX_SIZES = 1000


class SampledDataModule(LightningDataModule):
    """Makes loaders for training and evaluation; its checkpoints hold how many samples were read.

    A subclass opens its data in `setup`, after this one's, and makes its loaders by `train_loader` and
    `evaluation_loader`. In `meaning` and `samples` it describes the data for the record that checkpoints of a `Task`
    keep.

    Args:
        batch_size: Samples in a batch of one rank, B.
        num_workers: Processes that read ahead, for each loader; 0 reads in the training process.
        seed: Picks the training samples and how they are augmented, and nothing else.

    Raises:
        ValueError: A number is out of range.
    """

    batch_kind: ClassVar[str | None] = None
    """What batches hold, in a word that tasks use too; see `Task.batch_kind`."""
    other_data: ClassVar[str] = "give data of the run's kind, or start a new run"
    """What to do about data with another meaning, for messages."""

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
        self.allow_changed = False
        """Whether a run may continue with other samples than it began with."""
        self.kept: dict[str, Any] = {}
        """The meaning in the record of a checkpoint, from `recall`; data are opened by it."""
        self._record: dict[str, Any] | None = None
        self._samples_before = 0
        self._train_sampler: TrainSampler | None = None

    def setup(self, stage: str | None = None) -> None:
        """Count the samples of a new fit from the trainer's position."""
        self._record = None
        if stage in (None, "fit"):
            # A second `fit` of the same trainer continues; a new trainer starts from the first sample.
            batches_before = self.trainer.fit_loop.total_batch_idx + 1 if self.trainer is not None else 0
            self._samples_before = batches_before * self.batch_size * self.replicas()["num_replicas"]
            self._train_sampler = None

    def meaning(self) -> dict[str, Any]:
        """The meaning of outputs, as JSON values by name; options are named `data.NAME`. Called after `setup`."""
        return {}

    def samples(self) -> dict[str, Any]:
        """Facts that identify the samples, as JSON values by name. Called after `setup`."""
        return {}

    def meaning_differs(self, saved: dict[str, Any]) -> str | None:
        """How the data differ from the meaning in a record, and what to do; None if they do not."""
        own = self.meaning()
        for name, value in saved.items():
            if name in own and own[name] != value:
                if isinstance(value, list) and value and isinstance(value[0], str) and isinstance(own[name], list):
                    return f"{names_differ(name, value, own[name])}; {self.other_data}"
                remedy = "set it to that" if name.startswith("data.") else self.other_data
                return f"{name}: {own[name]} here, {value} in the run; {remedy}"
        return None

    def describe(self) -> str:
        """The data in a few words, for messages."""
        return type(self).__name__

    def recall(self, checkpoint: str | Path, *, weights_only: bool | None = True) -> None:
        """Take over the meaning from a checkpoint, before `prepare_data` and `setup`.

        Args:
            checkpoint: File or folder.
            weights_only: As for `torch.load`.

        Raises:
            ValueError: It is no checkpoint, or was cut off.
        """
        record = read_record(checkpoint, weights_only=weights_only)
        self.kept = {} if record is None else record["meaning"]

    def record(self) -> dict[str, Any]:
        """The record of the data; see the head of this module."""
        if self._record is None:  # it may hash all samples
            self._record = {"kind": type(self).__name__, "meaning": self.meaning(), "samples": self.samples()}
        return self._record

    def check_record(self, record: dict[str, Any] | None, *, resumes: bool, evaluates: bool = True) -> None:
        """Compare the data with those of a checkpoint, after `setup`.

        Args:
            record: Of the checkpoint; None in one of an older version.
            resumes: Whether the run continues.
            evaluates: Whether metrics are computed on these data.

        Raises:
            ValueError: Outputs would have another meaning, or a run would continue with other samples.
        """
        if record is None:
            if self.meaning():
                rank_zero_warn(
                    "the checkpoint does not say what its outputs mean (an older version saved it): whether "
                    f"{', '.join(self.meaning())} of these data are the run's is not checked"
                )
            return
        if difference := self.meaning_differs(record["meaning"]):
            raise on_all_ranks(ValueError(f"the data {self.describe()} are not the run's: {difference}"))
        if not resumes and not evaluates:
            return
        difference = values_differ(record["samples"], self.record()["samples"])
        if difference is None:
            return
        if resumes and not self.allow_changed:
            raise on_all_ranks(
                ValueError(
                    f"the data {self.describe()} changed since the run began ({difference}): restore them, or "
                    "continue with these by --allow_changed_data true"
                )
            )
        if resumes:
            rank_zero_warn(f"the run continues with other data than it began with: {difference}")
        elif evaluates:
            rank_zero_warn(
                f"the data are not quite those of the run ({difference}): what is held out here may have trained there"
            )

    def state_dict(self) -> dict[str, int]:
        """The number of samples read, for checkpoints at the end of an epoch.

        Between two epochs Lightning does not load the state of the loader.
        """
        sampler = self._train_sampler
        return {"samples_seen": self._samples_before if sampler is None else sampler.samples_seen}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue after the samples of a checkpoint."""
        self._samples_before = state_dict["samples_seen"]

    def train_loader(
        self, dataset: Dataset[Any], *, collate: Callable[[list[Any]], Any] | None = None
    ) -> DataLoader[Any]:
        """A training loader that counts samples over the whole run.

        Args:
            dataset: Items by the running number of a sample, which exceeds its length after an epoch.
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
        """A loader that reads each item once, in the same number of batches on every rank.

        Args:
            dataset: Items by index, empty ones past its length.
            collate: Makes a batch from a list of items, of which some may be empty.
        """
        sampler = ValidationSampler(dataset, batch_size=self.batch_size, **self.replicas())
        return DataLoader(dataset, sampler=sampler, collate_fn=collate, **self._loader_settings())

    def replicas(self) -> dict[str, int]:
        """The number of ranks that read different data, `num_replicas`, and this one's position, `rank`."""
        # The strategy knows which ranks read the same data: under tensor parallelism, groups of them do.
        replicas = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return {"num_replicas": 1, "rank": 0} if replicas is None else dict(replicas)

    def _loader_settings(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": False,
            "pin_memory": self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            # Loaders draw a seed for their workers: here from a generator that dropout does not use.
            "generator": torch.Generator(),
        }


def read_record(checkpoint: str | Path, *, weights_only: bool | None = True) -> dict[str, Any] | None:
    """The record in a checkpoint file or folder, whose tensors stay on the disk; None if it has none.

    Raises:
        ValueError: It is no checkpoint, or was cut off.
    """
    return read_without_tensors(Path(checkpoint), weights_only=weights_only).get(DATA_RECORD)


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write `data.json`, and the tokenizer as a folder that `from_pretrained` takes, into a run folder."""
    meaning = dict(record["meaning"])
    if files := meaning.get(TOKENIZER):
        for name, text in files.items():
            write_text(folder / TOKENIZER / name, text)
        meaning[TOKENIZER] = f"{TOKENIZER}/"
    write_text(folder / _FILE_NAME, json.dumps({**record, "meaning": meaning}, indent=1, ensure_ascii=False) + "\n")


def names_differ(what: str, saved: Sequence[str], own: Sequence[str]) -> str:
    """How two lists of names differ, in words: what is missing or new, or the first with another number.

    Args:
        what: What has the names, such as `classes`.
        saved: Names of the run.
        own: Names of the data, which differ.
    """
    differences = []
    for names, others, verb in ((saved, own, "has no"), (own, saved, "has a new")):
        known = set(others)
        if left := [name for name in names if name not in known]:
            differences.append(f"{verb} {left[0]!r} ({len(left)} such)" if len(left) > 1 else f"{verb} {left[0]!r}")
    if not differences:
        moved = (at for at, pair in enumerate(zip(saved, own, strict=False)) if pair[0] != pair[1])
        if (number := next(moved, None)) is None:  # one list repeats a name
            return f"{what}: {len(saved)} in the run, {len(own)} here"
        return f"{what} number {number} is {own[number]!r}, and {saved[number]!r} in the run"
    return f"among the {what} it {' and '.join(differences)}"


def values_differ(saved: Mapping[str, Any], own: Mapping[str, Any]) -> str | None:
    """The first value, by name, that differs between two records; None if there is none.

    Names that only one of them has are ignored: another version may record other facts.
    """
    for name, value in saved.items():
        if name in own and own[name] != value:
            is_hash = isinstance(value, str) and len(value) >= 16
            return f"{name} changed" if is_hash else f"{name}: {value} in the run, {own[name]} here"
    return None


def hash_tensors(*tensors: Tensor) -> str:
    """SHA-256 of the values, shapes and dtypes of tensors on the CPU."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(tensor.contiguous().numpy().data)
    return total.hexdigest()


def hash_paths(paths: Sequence[str | Path], root: str | Path, labels: Sequence[int] = ()) -> str:
    """SHA-256 of the names of files below a folder, of their labels, and of the sizes of at most 1,000 files.

    Reading the bytes of a million images would take hours.
    """
    total, start = hashlib.sha256(), len(str(root))
    for path in paths:
        total.update(os.fsencode(str(path)[start:]) + b"\0")
    for path in paths[:: -(-len(paths) // _MAX_SIZES) or 1]:
        with contextlib.suppress(OSError):
            total.update(str(Path(path).stat().st_size).encode() + b"\0")
    total.update(np.asarray(labels, dtype="<i8").tobytes())
    return total.hexdigest()
