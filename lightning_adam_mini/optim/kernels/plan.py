"""What one call of the C kernel needs to know of a list of tensors, in the words of its `Tensor` struct.

All that does not move from step to step is looked up once. A step then costs a list of addresses and one call, so that
networks of small layers are quick too.
"""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from lightning_adam_mini.blocks import Blocks
from lightning_adam_mini.optim.kernels.build import library
from lightning_adam_mini.optim.kernels.formats import PLAIN, Formats
from lightning_adam_mini.optim.kernels.layout import Layout
from lightning_adam_mini.optim.kernels.memory import address
from lightning_adam_mini.optim.update import StepOptions

__all__ = ["Entry", "Mode", "Plan", "Spans"]

_NUM_WORDS, _GRAD = 23, 1
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}
_NUMBERS = (torch.float32, torch.bfloat16)


class Mode(IntEnum):
    """What the kernel does with a tensor; the numbers of its source."""

    MEAN = 0
    ELEMENT = 1
    FACTORED = 2
    DENOMINATOR = 3
    SUM = 4


class Spans:
    """Rows of consecutive blocks of one size, as the kernel reads them.

    Args:
        lines: First row, rows of a block, number of blocks and number of the first one, for each span.
        num_blocks: Number of all blocks.
        in_pieces: Whether a block has rows in more than one place.
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
        """Rows of a block of each span."""
        return self.table[1::4].tolist()

    @classmethod
    def of_layout(cls, layout: Layout, num_blocks: int) -> Spans:
        """The blocks of a layout; a span ends where its batch does."""
        runs = layout.runs()
        if not len(runs):
            return cls((), num_blocks=num_blocks)
        first, length, block = runs.unbind(1)
        is_new = (length.diff() != 0) | (block.diff() != 1) | (first[1:] % layout.sizes[2] == 0)
        starts = torch.nonzero(is_new).flatten() + 1
        begin = torch.cat([starts.new_zeros(1), starts])
        count = torch.cat([begin, begin.new_full((1,), len(runs))]).diff()
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


@dataclass
class Entry:
    """One tensor as the kernel sees it; its parameter, gradient and first moment lie in memory alike.

    Args:
        mode: What to do with it.
        sizes: `(A, C1, R, C2)`, as in `Layout`.
        spans: Its blocks; None for elements.
        param: The parameter.
        grad: Its gradient.
        exp_avg: First moment.
        moments: What the mode reads and writes: two tensors for `Mode.FACTORED`, else one; sums are float64.
        step: Steps taken.
        formats: How the parameter and the first moment are stored.
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
    formats: Formats = PLAIN
    name: str = "a parameter"

    def words(self) -> list[int]:
        """The struct.

        Raises:
            ValueError: A tensor is not what the struct says of its memory.
        """
        numel = math.prod(self.sizes)
        codes = self.formats.scales is not None
        spans = self.spans.words if self.spans else (0, 0, 0, 0)
        assert self.spans is None or self.spans.num_rows == self._num_rows()
        moment_dtypes = (torch.float64 if self.mode is Mode.SUM else torch.float32,)
        moments = [
            self._address("a second moment", moment, moment_dtypes, size)
            for moment, size in zip(self.moments, self._moment_sizes(), strict=True)
        ]
        return [
            self._address("the parameter", self.param, _NUMBERS, numel),
            self._address("the gradient", self.grad, (self.param.dtype,), numel),
            self._address("the first moment", self.exp_avg, (torch.uint8,) if codes else _NUMBERS, numel),
            moments[0],
            moments[-1],
            self._address("the step", self.step, (torch.float32,), 1),
            self.mode,
            self.param.dtype == torch.bfloat16,
            _DTYPES[self.exp_avg.dtype],
            *self.sizes,
            *spans,
            *self.formats.words(self.name, numel),
        ]

    def _num_rows(self) -> int:
        """Rows that the spans are of; a factored second moment has the same ones in each batch."""
        return self.sizes[2] if self.mode is Mode.FACTORED else self.sizes[0] * self.sizes[2]

    def _moment_sizes(self) -> tuple[int, ...]:
        """Elements of each second moment; those of an empty tensor, which nothing reads, are as they are."""
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
    """Tensors that take their steps in one call.

    It keeps no gradient alive, and no parameter that it does not change.

    Args:
        entries: The tensors, with the gradients of the first step.

    Raises:
        ValueError: A tensor is not what its entry says of it.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._num_entries = len(entries)
        self._words = array("q", [word for entry in entries for word in entry.words()])
        self._tables = [entry.spans for entry in entries]
        self._params = [entry.param for entry in entries if entry.mode is not Mode.SUM]

    def step(self, options: StepOptions, grads: Sequence[int] | None = None) -> None:
        """Do what the entries' modes say.

        Args:
            options: Scalars of this step, `lr` a number; sums need none.
            grads: Addresses of the gradients of this step, laid out as those of the entries, if they are others.

        Raises:
            MemoryError: There is no room for partial sums; nothing has changed.
        """
        if grads is not None:
            self._words[_GRAD::_NUM_WORDS] = array("q", grads)
        kernel = library()
        assert kernel is not None
        o = options
        scalars = (o.lr, o.beta1, o.beta2, o.eps, o.weight_decay, o.maximize)
        if kernel.adam_mini_step(self._words.buffer_info()[0], self._num_entries, *scalars, _num_threads()):
            raise MemoryError("AdamMini's kernel has no memory for its partial sums: use a smaller batch or model")
        torch.autograd.graph.increment_version(self._params)  # as torch's own in-place operations do


_threads_of = {"parent": 1, "process": 1}
"""The most threads that a call has taken: in a process that this one was forked from, and in this one."""


def _num_threads() -> int:
    """As many as torch takes; one after a fork of a process whose threads have run, since they are gone here."""
    threads = 1 if _threads_of["parent"] > 1 else torch.get_num_threads()
    _threads_of["process"] = max(_threads_of["process"], threads)
    return threads


def _after_fork() -> None:
    _threads_of["parent"] = max(_threads_of.values())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
