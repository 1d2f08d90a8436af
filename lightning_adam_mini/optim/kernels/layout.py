"""Where tensors lie in memory: the layout of their blocks, and the addresses that kernels get.

The blocks of any dense tensor, whatever its dimensions and their order in memory, are those of a contiguous array of
shape `(A, C1, R, C2)`: rows, numbered by `(A, R)`, belong to blocks, and `C1` and `C2` are reduced. A linear layer's
weight has `(1, 1, R, C2)`, a weight that is stored transposed `(1, C1, R, 1)`, a channels-last convolution
`(1, 1, R, C2)` too.

A kernel gets addresses and trusts its plan about the memory there. So every tensor passes `address` when a plan is made
and `Memory` each time the plan is used again.
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
from lightning_adam_mini.optim.params import extent, lies_in_its_storage, shares_own_memory
from lightning_adam_mini.optim.shards import Box

try:  # compares dtypes, devices, shapes and strides of a list in one call, in a tenth of the time that Python takes
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None  # type: ignore[assignment, misc]

__all__ = ["Layout", "Memory", "address", "box_layout", "is_same_layout", "layout", "run_starts"]


@dataclass(frozen=True, eq=False)
class Layout:
    """The blocks of a dense tensor in memory order.

    Args:
        sizes: `(A, C1, R, C2)`, the memory as a contiguous array; `A` is 1 where `C1` is.
        order: Axes of the tensor from the outermost in memory to the innermost.
        block_of_row: For each of the `A * R` rows the index of its block in the flattened second moment (int64, on the
            CPU); None if row `i` is block `i`.
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
        """Whether the elements of each row are contiguous."""
        return self.sizes[1] == 1

    @property
    def is_elementwise(self) -> bool:
        """Whether element `i` in memory is block `i`."""
        numbers = self.block_of_row
        return self.row_length == 1 and (
            numbers is None or torch.equal(numbers, torch.arange(len(numbers), device="cpu"))
        )

    def runs(self) -> Tensor:
        """Runs of consecutive rows of one block, in memory order.

        Returns:
            An int64 tensor of shape (runs, 3): first row, number of rows, index of the block. A block whose rows are
            not adjacent has several runs.
        """
        numbers = torch.arange(self.num_rows, device="cpu") if self.block_of_row is None else self.block_of_row
        starts, lengths = run_starts(numbers.diff() != 0, len(numbers))
        return torch.stack([starts, lengths, numbers[starts]], 1)


def run_starts(is_new: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """The first row and the length of each run, for `num_rows` rows.

    Args:
        is_new: For each row but the first, whether it starts a new run.
        num_rows: Number of rows.
    """
    starts = torch.cat([torch.arange(min(num_rows, 1), device="cpu"), torch.nonzero(is_new).flatten() + 1])
    return starts, torch.cat([starts, starts.new_full((1,), num_rows)]).diff()


def layout(blocks: Blocks, tensor: Tensor) -> Layout | None:
    """The layout of a tensor's blocks; None if four sizes cannot express it.

    Args:
        blocks: The block structure. Rows of a factored second moment are numbered as in `exp_avg_sq_row`.
        tensor: The tensor. Along reduced axes it may be smaller than the shape of `blocks`, as a shard is.
    """
    if blocks.kind is Kind.ELEMENT:
        return Layout((1, 1, tensor.numel(), 1), tuple(range(tensor.dim())), None) if tensor.is_contiguous() else None
    return _layout(_block_numbers(blocks), tensor)


def box_layout(blocks: Blocks, box: Box, local: Tensor) -> Layout | None:
    """The layout of one box of a local tensor, with the block numbers of `blocks`; None as for `layout`.

    Args:
        blocks: The local block structure, of any kind but element-wise.
        box: The box.
        local: The local tensor.
    """
    return _layout(box.within(_block_numbers(blocks)), box.view(local))


def is_same_layout(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same shape, and the same strides on axes longer than 1."""
    return first.shape == second.shape and (
        first.stride() == second.stride()
        or all(a == b or size == 1 for a, b, size in zip(first.stride(), second.stride(), first.shape, strict=True))
    )


def _block_numbers(blocks: Blocks) -> Tensor:
    """The index of each row's block, with size 1 on reduced axes."""
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
            return None  # gaps, or elements that share memory
        slot += slot % 2 == (numbers.shape[axis] > 1)  # row axes go to the even slots, reduced axes to the odd ones
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
    """The address of a dense tensor, once it has been checked.

    Args:
        what: Name of the tensor, for messages.
        tensor: The tensor.
        dtypes: Dtypes that the kernel accepts.
        numel: Number of elements that the kernel reads or writes.
        device: Device of the kernel; None for the CPU.

    Raises:
        ValueError: The tensor has another dtype, device or size, or is not dense within its storage.
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
            f"the kernel needs {numel} adjacent elements on {where}. implementation='foreach' takes any tensor"
        )
    return tensor.data_ptr()


class Memory:
    """The memory of a plan's tensors, to check that the plan still holds.

    It compares dtypes, devices, shapes, strides and storage sizes, so that memory that was within bounds still is.

    Args:
        tensors: The tensors, each once, after `address` has accepted them.
        own: More tensors, whose storages may be kept alive, which makes the check faster.
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
        self._itemsize = max(map(attrgetter("itemsize"), tensors), default=1)
        self.storages = {tensor.untyped_storage().data_ptr() for tensor in tensors} - {0}

    def is_in_place(self, tensors: list[Tensor], own: list[Tensor]) -> bool:
        """Whether nothing has changed, addresses included."""
        everything = tensors + own
        return (
            self._guards is not None
            and self._guards.check(*everything)
            and list(map(Tensor.data_ptr, everything)) == self._addresses
            and _storage_sizes(tensors) == self._sizes
            and list(map(UntypedStorage.nbytes, self._own)) == self._own_sizes
        )

    def addresses(self, tensors: Sequence[Tensor], *, apart_from: Memory) -> list[int] | None:
        """Addresses of tensors that may have moved, as gradients do, but have not changed otherwise.

        Args:
            tensors: As many as the plan has.
            apart_from: Memory whose storages they must not share.

        Returns:
            None if anything else has changed.
        """
        if self._guards is None or not self._guards.check(*tensors):
            return None
        storages = list(map(Tensor.untyped_storage, tensors))
        if list(map(UntypedStorage.nbytes, storages)) != self._sizes:
            return None
        if list(map(Tensor.storage_offset, tensors)) != self._offsets:
            return None
        starts = list(map(UntypedStorage.data_ptr, storages))
        # One `or` over all addresses shows whether any of them is misaligned.
        if not apart_from.storages.isdisjoint(starts) or reduce(or_, starts, 0) % self._itemsize:
            return None
        return list(map(add, starts, self._skips))


def _storage_sizes(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(UntypedStorage.nbytes, map(Tensor.untyped_storage, tensors)))
