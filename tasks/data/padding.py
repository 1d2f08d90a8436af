"""Evaluation sets that any number of ranks reads exactly once, in as many batches each."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset, default_collate

from .shuffling import SizedDataset

__all__ = ["PaddedItems", "collate_padded"]


class PaddedItems(Dataset[Any]):
    """Items with their index, and past the end of the data set items that do not count.

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
        """The index, -1 past the end, and an item; past the end the first, so that shapes are known."""
        return (index, self.dataset[index]) if index < len(self) else (-1, self.dataset[0])


def collate_padded(items: list[tuple[int, Any]]) -> tuple[torch.Tensor, Any]:
    """Indices `(B,)` and the batch of the items that count; of zero items where none does.

    A batch without items keeps shapes and dtypes: the model runs on it as on any other, which collectives need.
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
