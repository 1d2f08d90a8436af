"""Describe tensors to the C kernel: the `Tensor` structs of one call, and the call itself.

Whatever stays the same from step to step is computed once. A later step costs a list of gradient addresses and one
call, so networks of small layers are fast too.
"""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache

import torch
from torch import Tensor

from lightning_adam_mini.blocks import Blocks
from lightning_adam_mini.optim import quantized
from lightning_adam_mini.optim.kernels.build import library
from lightning_adam_mini.optim.kernels.layout import Layout, address, run_starts
from lightning_adam_mini.optim.quantized import GROUP_SIZE
from lightning_adam_mini.optim.update import ParameterView, StepOptions

__all__ = ["Entry", "Formats", "Mode", "Plan", "Spans", "format_refusal", "groups_fit", "slice_length_of"]

_NUM_WORDS, _GRAD = 23, 1
"""Words of 8 bytes in the C struct `Tensor`, and the index of the gradient's address among them."""
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}
_FLOATS = (torch.float32, torch.bfloat16)
_TASK_LENGTH = 1 << 16
"""Elements of a task, as in the C source."""


class Mode(IntEnum):
    """What the kernel does with a tensor, numbered as in the C source."""

    MEAN = 0
    ELEMENT = 1
    FACTORED = 2
    DENOMINATOR = 3
    SUM = 4


class Spans:
    """Rows of consecutive blocks of equal size, as an array of the C struct `Span`.

    Args:
        lines: For each span its first row, rows per block, number of blocks, and the index of its first block.
        num_blocks: Number of blocks in all spans together.
        in_pieces: Whether some block has rows in more than one place.
    """

    def __init__(self, lines: Iterable[Sequence[int]], *, num_blocks: int, in_pieces: bool = False) -> None:
        self.table = array("q", [number for line in lines for number in line])
        self.words = (self.table.buffer_info()[0], len(self.table) // 4, num_blocks, int(in_pieces))

    @property
    def num_rows(self) -> int:
        """Rows of all blocks."""
        heights, counts = self.table[1::4], self.table[2::4]
        return sum(height * count for height, count in zip(heights, counts, strict=True))

    def heights(self) -> list[int]:
        """Rows per block of each span."""
        return self.table[1::4].tolist()

    @classmethod
    def of_layout(cls, layout: Layout, num_blocks: int) -> Spans:
        """The blocks of a layout; no span crosses from one batch to the next."""
        runs = layout.runs()
        first, length, block = runs.unbind(1)
        is_new = (length.diff() != 0) | (block.diff() != 1) | (first[1:] % layout.sizes[2] == 0)
        begin, count = run_starts(is_new, len(runs))
        lines = torch.stack([first[begin], length[begin], count, block[begin]], 1).tolist()
        return cls(lines, num_blocks=num_blocks, in_pieces=len(runs) > len(block.unique()))

    @classmethod
    def of_segments(cls, blocks: Blocks) -> Spans:
        """The segments of a factored second moment, in the rows of one batch."""
        lines, start = [], 0
        for _ in range(blocks.repeats):
            for number, segment in enumerate(blocks.segments):
                lines.append((start, segment.length, 1, number))
                start += segment.length
        return cls(lines, num_blocks=len(blocks.segments))


@dataclass(frozen=True)
class Formats:
    """How the numbers of one tensor are stored: the scales of 8-bit codes, and the seed of stochastic rounding.

    The kernel decodes and rounds in memory order, one group of codes at a time. Such tensors are therefore in C order,
    and each piece that a task takes (a run, a line of columns) starts and ends between two groups.

    Args:
        scales: Scales of the 8-bit codes, starting with that of the first element; None for numbers.
        slice_length: Elements of a slice along axis 0, which has its own groups.
        seed: Seed of the random bits; None to round to nearest.
        first: Index of the first element in the whole parameter.
    """

    scales: Tensor | None
    slice_length: int
    seed: int | None
    first: int

    @classmethod
    def of(cls, tensor: ParameterView, view: Tensor) -> Formats:
        """The formats of a tensor that the kernel supports, or of a box of it.

        Args:
            tensor: The tensor.
            view: Its parameter, or the box's view of the parameter.
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
        """The last words of the struct.

        Args:
            name: Name of the parameter, for messages.
            numel: Number of elements.

        Raises:
            ValueError: The scales do not match the number of elements.
        """
        scales, codebook = 0, 0
        if self.scales is not None:
            count = numel // self.slice_length * -(-self.slice_length // GROUP_SIZE)
            kept = self.scales.flatten()[:count]  # the scales of later boxes follow
            scales = address(f"{name}: the scales", kept, dtypes=(torch.float32,), numel=count)
            codebook = _codebook().buffer_info()[0]
        return [scales, codebook, self.slice_length, self.seed is not None, self.seed or 0, self.first]


def format_refusal(tensor: ParameterView, views: Iterable[Tensor]) -> str | None:
    """Why the kernel cannot take the formats of a tensor; None if it can.

    Args:
        tensor: The tensor.
        views: Its parameter, or the views of it that are its boxes.
    """
    if tensor.is_plain:
        return None
    views = list(views)
    if not tensor.param.is_contiguous() or not all(view.is_contiguous() for view in views):
        return "8-bit first moments or stochastic rounding of a tensor that is not in C order"
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
    if length > _TASK_LENGTH and length % GROUP_SIZE:
        return "8-bit codes of slices that are longer than a task and no multiple of a group"
    return None


def groups_fit(piece_lengths: Iterable[int], slice_length: int) -> bool:
    """Whether consecutive pieces of memory start and end between groups of codes.

    Args:
        piece_lengths: Elements of each piece.
        slice_length: Elements of a slice along axis 0.
    """
    is_aligned = slice_length % GROUP_SIZE == 0
    return all(n % slice_length == 0 or (is_aligned and n % GROUP_SIZE == 0) for n in piece_lengths)


def slice_length_of(param: Tensor) -> int:
    """Elements of a slice along axis 0, which has its own groups of codes."""
    return param.numel() // param.shape[0]


@cache
def _codebook() -> array[int]:
    """The C struct `Codebook` as 32-bit words; cached, since the kernel keeps its address."""
    values = quantized.values(torch.device("cpu"))
    first, middles = quantized.bins(torch.device("cpu"))
    return array("i", [*values.view(torch.int32).tolist(), *middles.view(torch.int32).tolist(), *first.tolist()])


@dataclass
class Entry:
    """One tensor of a call. Its parameter, gradient and first moment have the same memory layout.

    Args:
        mode: What to do with it.
        sizes: `(A, C1, R, C2)`, as in `Layout`.
        spans: Its blocks; None if every element is a block.
        param: The parameter.
        grad: Its gradient.
        exp_avg: First moment.
        moments: What the mode reads and writes: two tensors for `Mode.FACTORED`, else one. Sums are float64.
        step: Number of steps taken.
        formats: How parameter and first moment are stored.
        name: Name of the parameter, for messages.
    """

    mode: Mode
    sizes: tuple[int, int, int, int]
    spans: Spans | None
    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    moments: tuple[Tensor, ...]
    step: Tensor
    formats: Formats
    name: str

    def words(self) -> list[int]:
        """The struct.

        Raises:
            ValueError: The memory of a tensor is not what the struct would claim.
        """
        numel = math.prod(self.sizes)
        batches, _, rows, _ = self.sizes
        # All batches of a factored second moment share the spans of one.
        assert self.spans is None or self.spans.num_rows == rows * (1 if self.mode is Mode.FACTORED else batches)
        moment_dtypes = (torch.float64 if self.mode is Mode.SUM else torch.float32,)
        moments = [
            self._address("a second moment", moment, moment_dtypes, size)
            for moment, size in zip(self.moments, self._moment_sizes(), strict=True)
        ]
        exp_avg_dtypes = _FLOATS if self.formats.scales is None else (torch.uint8,)
        return [
            self._address("the parameter", self.param, _FLOATS, numel),
            self._address("the gradient", self.grad, (self.param.dtype,), numel),
            self._address("the first moment", self.exp_avg, exp_avg_dtypes, numel),
            moments[0],
            moments[-1],
            self._address("the step", self.step, (torch.float32,), 1),
            self.mode,
            self.param.dtype == torch.bfloat16,
            _DTYPES[self.exp_avg.dtype],
            *self.sizes,
            *(self.spans.words if self.spans else (0, 0, 0, 0)),
            *self.formats.words(self.name, numel),
        ]

    def _moment_sizes(self) -> tuple[int, ...]:
        """Elements that the kernel expects in each second moment; it reads none of an empty tensor."""
        if not math.prod(self.sizes):
            return tuple(moment.numel() for moment in self.moments)
        batches, outer, rows, inner = self.sizes
        if self.spans is None:
            return (math.prod(self.sizes),)
        num_blocks = self.spans.words[2]
        return (batches * rows, batches * num_blocks * outer * inner) if self.mode is Mode.FACTORED else (num_blocks,)

    def _address(self, what: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], numel: int) -> int:
        return address(f"{self.name}: {what}", tensor, dtypes=dtypes, numel=numel)


class Plan:
    """Tensors that take their steps in one call of the C kernel.

    It keeps alive neither gradients nor parameters that it only reads.

    Args:
        entries: The tensors, with the gradients of the first step.

    Raises:
        ValueError: The memory of a tensor is not what its entry says.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._num_entries = len(entries)
        self._words = array("q", [word for entry in entries for word in entry.words()])
        self._spans = [entry.spans for entry in entries]  # the kernel reads their tables
        self._params = [entry.param for entry in entries if entry.mode is not Mode.SUM]

    def step(self, options: StepOptions, grads: Sequence[int] | None = None) -> None:
        """Do what the entries' modes say.

        Args:
            options: Scalars of this step, with `lr` as a number; `Mode.SUM` reads none of them.
            grads: Addresses of this step's gradients, laid out as those of the entries; None for the entries' own.

        Raises:
            MemoryError: The kernel could not allocate its partial sums; nothing has changed.
        """
        if grads is not None:
            self._words[_GRAD::_NUM_WORDS] = array("q", grads)
        kernel = library()
        assert kernel is not None
        o = options
        scalars = (o.lr, o.beta1, o.beta2, o.eps, o.weight_decay, o.maximize)
        if kernel.adam_mini_step(self._words.buffer_info()[0], self._num_entries, *scalars, _num_threads()):
            raise MemoryError("AdamMini's kernel has no memory for its partial sums: use a smaller batch or model")
        # Autograd must notice that saved tensors have changed, as with torch's own in-place operations.
        torch.autograd.graph.increment_version(self._params)


_most_threads = {"parent": 1, "process": 1}
"""The most threads that any call has used: in the process that this one was forked from, and in this one."""


def _num_threads() -> int:
    """As many threads as torch uses; one if a parent process ran OpenMP threads before the fork.

    A fork copies OpenMP's record of its threads but not the threads: a parallel region would wait for them for ever.
    """
    threads = 1 if _most_threads["parent"] > 1 else torch.get_num_threads()
    _most_threads["process"] = max(_most_threads["process"], threads)
    return threads


def _after_fork() -> None:
    _most_threads["parent"] = max(_most_threads.values())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
