"""Where the blocks of a tensor lie in memory, in four sizes and one number a row.

Whatever the dimensions of a dense tensor and their order in memory, its blocks are those of a contiguous array of shape
`(A, C1, R, C2)`: rows, numbered by `(A, R)`, belong to blocks, and `C1` and `C2` are reduced. A linear layer's weight
has `(1, 1, R, C2)`, one that is stored transposed `(1, C1, R, 1)`, and a convolution in the order of channels last
`(1, 1, R, C2)` too.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add, attrgetter, or_
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from lightning_adam_mini.blocks import Blocks, Kind
from lightning_adam_mini.optim.parameter_view import extent, lies_in_its_storage, shares_own_memory
from lightning_adam_mini.optim.shards import Box

try:  # compares dtypes, devices, shapes and strides of a list in one call, a tenth of the time of doing it here
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None  # type: ignore[assignment, misc]

__all__ = ["Layout", "Memory", "address", "box_layout", "is_same_layout", "layout"]

_itemsize = attrgetter("itemsize")


@dataclass(frozen=True, eq=False)
class Layout:
    """The blocks of a dense tensor in the order of its memory.

    Args:
        sizes: `(A, C1, R, C2)`, the memory as a contiguous array; `A` is 1 where `C1` is.
        order: Axes of the tensor from the outermost in memory to the innermost.
        block_of_row: For each of the `A * R` rows the number of its block in the flattened second moment (int64, on the
            CPU); None where row `i` is block `i`.
    """

    sizes: tuple[int, int, int, int]
    order: tuple[int, ...]
    block_of_row: Tensor | None

    @property
    def num_rows(self) -> int:
        """Number of rows, `A * R`."""
        return self.sizes[0] * self.sizes[2]

    @property
    def row_length(self) -> int:
        """Elements of one row, `C1 * C2`."""
        return self.sizes[1] * self.sizes[3]

    @property
    def has_contiguous_rows(self) -> bool:
        """Whether each row is a contiguous run of elements."""
        return self.sizes[1] == 1

    @property
    def is_elementwise(self) -> bool:
        """Whether every element is a block of its own, in the order of memory."""
        numbers = self.block_of_row
        return self.row_length == 1 and (
            numbers is None or torch.equal(numbers, torch.arange(len(numbers), device="cpu"))
        )

    def runs(self) -> Tensor:
        """Runs of consecutive rows of one block, in the order of memory.

        Returns:
            An int64 tensor of shape (runs, 3): the first row, the number of rows, the number of the block. A block
            whose rows lie apart has several runs.
        """
        rows = torch.arange(self.num_rows, device="cpu")
        numbers = rows if self.block_of_row is None else self.block_of_row
        if not len(numbers):
            return torch.empty(0, 3, dtype=torch.int64, device="cpu")
        starts = torch.cat([rows[:1], torch.nonzero(numbers.diff()).flatten() + 1])
        lengths = torch.cat([starts, starts.new_full((1,), len(numbers))]).diff()
        return torch.stack([starts, lengths, numbers[starts]], 1)

    @property
    def rows_of_block(self) -> Tensor | None:
        """The rows of each block, by its number: (blocks, 2), the first row and how many; None where rows lie apart."""
        runs = self.runs()
        runs = runs[runs[:, 2].argsort()]
        if not torch.equal(runs[:, 2], torch.arange(len(runs), device="cpu")):
            return None
        return runs[:, :2]


def layout(blocks: Blocks, tensor: Tensor) -> Layout | None:
    """The layout of a tensor's blocks; None where four sizes cannot express it.

    Args:
        blocks: How the tensor is cut. Rows of a factored second moment are numbered as in `exp_avg_sq_row`.
        tensor: The tensor. Along reduced axes it may be smaller than the shape of `blocks`, as a shard is.
    """
    if blocks.kind is Kind.ELEMENT:
        return Layout((1, 1, tensor.numel(), 1), tuple(range(tensor.dim())), None) if tensor.is_contiguous() else None
    return _layout(_numbers(blocks), tensor)


def box_layout(blocks: Blocks, box: Box, local: Tensor) -> Layout | None:
    """The layout of one rectangle of a local tensor, with the block numbers of the frame; None as for `layout`.

    Args:
        blocks: The frame that the rectangle lies in, not cut by elements.
        box: The rectangle.
        local: The local tensor.
    """
    return _layout(box.within(_numbers(blocks)), box.view(local))


def is_same_layout(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one shape lie in memory alike."""
    return first.shape == second.shape and (
        first.stride() == second.stride()
        or all(a == b or size == 1 for a, b, size in zip(first.stride(), second.stride(), first.shape, strict=True))
    )


def _numbers(blocks: Blocks) -> Tensor:
    """The number of each row's block, of size 1 on reduced axes."""
    if blocks.kind is Kind.FACTORED:
        return torch.arange(math.prod(blocks.row_shape), device="cpu").view(blocks.row_shape)
    shape = blocks.state_shapes["exp_avg_sq"]
    return blocks.expand_rows(torch.arange(math.prod(shape), device="cpu").view(shape))


def _layout(numbers: Tensor, tensor: Tensor) -> Layout | None:
    strides, shape = tensor.stride(), tensor.shape
    order = tuple(sorted(range(tensor.dim()), key=lambda axis: -strides[axis]))
    if not tensor.numel():
        return Layout((1, 1, 0, 0), order, numbers.new_empty(0))
    sizes, slot, pitch = [1, 1, 1, 1], 0, tensor.numel()
    for axis in order:
        if shape[axis] == 1:
            continue
        pitch //= shape[axis]
        if strides[axis] != pitch:
            return None  # gaps, or elements that lie on each other
        slot += slot % 2 == (numbers.shape[axis] > 1)  # rows have the slots 0 and 2, reduced axes 1 and 3
        if slot > 3:
            return None
        sizes[slot] *= shape[axis]
    if slot <= 1:
        sizes = [1, 1, *sizes[:2]]
    rows = numbers.permute(order).flatten() if tensor.dim() else numbers.flatten()
    return Layout((sizes[0], sizes[1], sizes[2], sizes[3]), order, rows)


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
