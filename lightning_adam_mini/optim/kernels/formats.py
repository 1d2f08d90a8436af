"""How the C kernel reads what is coded or rounded: the scales of 8-bit first moments, and where random bits begin.

The kernel goes through such tensors in memory order, a group of codes at a time. So they lie in C order, and what it
takes as one piece - a run, a line of columns - begins and ends between two groups.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lightning_adam_mini.optim import quantized
from lightning_adam_mini.optim.kernels.memory import address
from lightning_adam_mini.optim.quantized import GROUP_SIZE
from lightning_adam_mini.optim.update import ParameterView

__all__ = ["PLAIN", "TASK_LENGTH", "Formats", "groups_fit", "refusal", "slice_length_of"]

TASK_LENGTH = 1 << 16
"""Elements that the kernel takes at once, as in its source: of longer slices, whole groups."""


@dataclass(frozen=True)
class Formats:
    """The formats of one tensor; by default, numbers that are rounded to nearest.

    Args:
        scales: Scales of 8-bit codes, from those of the first element on.
        slice_length: Elements of a slice of axis 0, which has groups of its own.
        seed: Of the random bits; None where nothing is rounded stochastically.
        first: Number of the first element in the whole parameter.
    """

    scales: Tensor | None = None
    slice_length: int = 0
    seed: int | None = None
    first: int = 0

    @classmethod
    def of(cls, tensor: ParameterView, view: Tensor) -> Formats:
        """The formats of a tensor that the kernel supports, or of a rectangle of it.

        Args:
            tensor: The tensor.
            view: Its parameter, or the rectangle's view of it.
        """
        offset = int(view.storage_offset() - tensor.param.storage_offset())
        scales, slice_length, seed, first = None, 0, None, 0
        if tensor.exp_avg_scale is not None and view.numel():
            slice_length = slice_length_of(tensor.param)
            scales = tensor.exp_avg_scale[offset // slice_length :]
        if tensor.rounding is not None:
            seed, first = tensor.rounding.seed, (tensor.rounding.first or 0) + offset
        return cls(scales, slice_length, seed, first)

    def words(self, name: str, numel: int) -> list[int]:
        """The part of the kernel's struct that says this.

        Args:
            name: Name of the parameter, for messages.
            numel: Elements of what is stored.

        Raises:
            ValueError: The scales are not those of so many elements.
        """
        scales, codebook = 0, 0
        if self.scales is not None:
            count = numel // self.slice_length * -(-self.slice_length // GROUP_SIZE)
            kept = self.scales.flatten()[:count]  # those of the rectangles behind this one follow
            scales = address(f"{name}: the scales", kept, dtypes=(torch.float32,), numel=count)
            codebook = _codebook().buffer_info()[0]
        return [scales, codebook, self.slice_length, self.seed is not None, self.seed or 0, self.first]


PLAIN = Formats()


def refusal(tensor: ParameterView, views: Iterable[Tensor]) -> str | None:
    """Why the kernel cannot take the formats of a tensor; None if it can.

    Args:
        tensor: The tensor.
        views: Its parameter, or the views of it that are its rectangles.
    """
    if tensor.is_plain:
        return None
    views = list(views)
    if not tensor.param.is_contiguous() or not all(view.is_contiguous() for view in views):
        return "8-bit first moments or stochastic rounding of what does not lie in C order"
    if tensor.rounding is not None and tensor.rounding.first is None:
        return "stochastic rounding of a shard whose elements are not consecutive"
    if tensor.exp_avg_scale is None or not tensor.param.numel():
        return None
    scale, length = tensor.exp_avg_scale, slice_length_of(tensor.param)
    if scale.dtype != torch.float32 or not scale.is_contiguous():
        return "scales that are not contiguous float32"
    offsets = (view.storage_offset() - tensor.param.storage_offset() for view in views)
    if any(offset % length or view.numel() % length for offset, view in zip(offsets, views, strict=True)):
        return "a shard that splits the groups of 8-bit codes"
    if length > TASK_LENGTH and length % GROUP_SIZE:
        return "8-bit codes of slices that are longer than a task and no multiple of a group"
    return None


def groups_fit(piece_lengths: Iterable[int], slice_length: int) -> bool:
    """Whether pieces that follow each other in memory begin and end between groups of codes.

    Args:
        piece_lengths: Elements of each piece.
        slice_length: Elements of a slice of axis 0.
    """
    is_aligned = slice_length % GROUP_SIZE == 0
    return all(n % slice_length == 0 or (is_aligned and n % GROUP_SIZE == 0) for n in piece_lengths)


def slice_length_of(param: Tensor) -> int:
    """Elements of a slice of axis 0, which has groups of codes of its own."""
    return param.numel() // param.shape[0]


@cache
def _codebook() -> array[int]:
    """The kernel's `Codebook`, as 32-bit words that stay where they are."""
    values = quantized.values(torch.device("cpu"))
    first, middles = quantized.bins(torch.device("cpu"))
    return array("i", [*values.view(torch.int32).tolist(), *middles.view(torch.int32).tolist(), *first.tolist()])
