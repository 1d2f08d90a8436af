"""The one way of a tensor to C or Triton: its address, once it is what the kernel takes it for.

A kernel gets an address and believes what its plan says of the memory there. So each tensor comes through here, when a
plan is made (`address`) and each time that it is used again (`Memory`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import reduce
from operator import add, attrgetter, or_
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from lightning_adam_mini.optim.params import extent, lies_in_its_storage, shares_own_memory

try:  # compares dtypes, devices, shapes and strides of a list in one call, a tenth of the time of doing it here
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None  # type: ignore[assignment, misc]

__all__ = ["Memory", "address"]

_itemsize = attrgetter("itemsize")


def address(
    what: str, tensor: Tensor, *, dtypes: Collection[torch.dtype], numel: int, device: torch.device | None = None
) -> int:
    """The address of a tensor whose elements lie densely in memory.

    Args:
        what: What it is, for messages.
        tensor: The tensor.
        dtypes: Dtypes that the kernel takes it for.
        numel: Elements that the kernel reads or writes.
        device: Where the kernel runs; None for the CPU.

    Raises:
        ValueError: It is something else, or lies elsewhere.
    """
    where = device or torch.device("cpu")
    if (
        tensor.layout is not torch.strided
        or tensor.dtype not in dtypes
        or tensor.device != where
        or tensor.numel() != numel
        or tensor.is_neg()
        or not lies_in_its_storage(tensor)
        or shares_own_memory(tensor)
        or extent(tensor) != numel
        or tensor.data_ptr() % tensor.element_size()
    ):
        raise ValueError(
            f"{what} is a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}, of shape {tuple(tensor.shape)}; "
            f"the kernel was to take {numel} elements on {where} that lie next to each other. "
            "implementation='foreach' takes what torch takes"
        )
    return tensor.data_ptr()


class Memory:
    """What a plan knows of tensors: a kernel may go to where they lie now, as long as nothing but that has changed.

    Dtypes, devices, shapes, strides and the sizes of storages are compared, so that memory that was in bounds still is.

    Args:
        tensors: The tensors, each once, as `address` has found them right.
        own: Others whose storages may be kept alive, which is quicker.
    """

    def __init__(self, tensors: Sequence[Tensor], own: Sequence[Tensor] = ()) -> None:
        self._own = [tensor.untyped_storage() for tensor in own]
        self._own_sizes = list(map(UntypedStorage.nbytes, self._own))
        self._sizes = _storage_sizes(tensors)
        tensors = [*tensors, *own]
        dims: Any = {"dynamic_dims_sizes": [], "dynamic_dims_strides": []}
        self._guards = TensorGuards(*tensors, **dims) if TensorGuards is not None else None
        self._addresses = list(map(Tensor.data_ptr, tensors))
        self._offsets = list(map(Tensor.storage_offset, tensors))
        self._skips = [tensor.storage_offset() * tensor.itemsize for tensor in tensors]
        self._itemsize = max(map(_itemsize, tensors), default=1)
        self.storages = {tensor.untyped_storage().data_ptr() for tensor in tensors} - {0}

    def is_in_place(self, tensors: list[Tensor], own: list[Tensor]) -> bool:
        """Whether nothing has changed, and the tensors lie where they lay."""
        everything = tensors + own
        return (
            self._guards is not None
            and self._guards.check(*everything)
            and list(map(Tensor.data_ptr, everything)) == self._addresses
            and _storage_sizes(tensors) == self._sizes
            and list(map(UntypedStorage.nbytes, self._own)) == self._own_sizes
        )

    def addresses(self, tensors: Sequence[Tensor], *, apart_from: Memory) -> list[int] | None:
        """Addresses of tensors of which nothing has changed, but that they may lie elsewhere.

        Args:
            tensors: As many as the plan knows.
            apart_from: What lies in other storages.

        Returns:
            None where something else has changed.
        """
        if self._guards is None or not self._guards.check(*tensors):
            return None
        storages = list(map(Tensor.untyped_storage, tensors))
        if list(map(UntypedStorage.nbytes, storages)) != self._sizes:
            return None
        if list(map(Tensor.storage_offset, tensors)) != self._offsets:
            return None
        starts = list(map(UntypedStorage.data_ptr, storages))
        if not apart_from.storages.isdisjoint(starts) or reduce(or_, starts, 0) % self._itemsize:
            return None
        return list(map(add, starts, self._skips))


def _storage_sizes(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(UntypedStorage.nbytes, map(Tensor.untyped_storage, tensors)))
