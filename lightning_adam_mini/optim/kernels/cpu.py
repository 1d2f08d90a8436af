"""The update on CPU tensors by the C kernel: one call for a list of parameters.

It takes dense tensors of float32 or bfloat16 whose blocks the four sizes of a `Layout` describe; `foreach_` takes all
others. Where sums of squares come from other ranks, or a parameter consists of rectangles, torch computes the second
moments and denominators, which are small, and the kernel does the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import compress
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from lightning_adam_mini.blocks import Blocks, Kind
from lightning_adam_mini.optim.kernels.build import library, unavailable
from lightning_adam_mini.optim.kernels.cpu_plan import (
    Entry,
    Formats,
    Mode,
    Plan,
    Spans,
    format_refusal,
    groups_fit,
    slice_length_of,
)
from lightning_adam_mini.optim.kernels.layout import Layout, box_layout, is_same_layout, layout
from lightning_adam_mini.optim.shards import Box
from lightning_adam_mini.optim.update import ParameterView, StepOptions, Update, accumulate_, foreach_updates

__all__ = [
    "is_laid_out_as",
    "laid_out_as",
    "square_sums",
    "supports",
    "unavailable",
    "update_",
    "updates",
    "whole_entry",
]

_DTYPES = (torch.float32, torch.bfloat16)
_NONE = StepOptions(lr=0.0, beta1=0.0, beta2=0.0, eps=0.0, weight_decay=0.0)
_Shape = tuple[int, ...]
_grad = attrgetter("grad")


def update_(views: Sequence[ParameterView], options: StepOptions) -> None:
    """One step of Adam-mini on many tensors, in place.

    Args:
        views: Parameters with their gradients, blocks and states.
        options: Scalars of this step, `lr` a number.
    """
    for update in updates(views):
        update(options)


def updates(views: Sequence[ParameterView]) -> list[Update]:
    """The updates of `update_`, which may be kept as long as the views are.

    Raises:
        ValueError: A tensor's memory is not what the kernel would take it for.
    """
    whole: list[ParameterView] = []
    sharded: list[ParameterView] = []
    others: list[ParameterView] = []
    for view in views:
        if supports(view) is not None:
            others.append(view)
        else:
            (whole if view.is_whole and view.square_sums is None else sharded).append(view)
    found: list[Update] = [WholeTensors(whole)] if whole else []
    found += [partial(_sharded_, sharded)] if sharded else []
    return found + foreach_updates(others)


class WholeTensors:
    """Whole tensors that take their steps in one call of the kernel, whose plan is made once.

    Args:
        views: Tensors that the kernel supports, with the gradients of the first step.
    """

    def __init__(self, views: Sequence[ParameterView]) -> None:
        self._views = views
        grads = [view.grad for view in views if view.grad is not None]
        is_copied = [not is_laid_out_as(view.param, grad) for view, grad in zip(views, grads, strict=True)]
        self._copied = list(compress(range(len(views)), is_copied))
        self._plan = Plan([whole_entry(view) for view in views])

    def __call__(self, options: StepOptions) -> None:
        """Take one step with the gradients that the views hold."""
        grads: list[Any] = list(map(_grad, self._views))
        for number in self._copied:
            grads[number] = laid_out_as(self._views[number].param, grads[number])
        self._plan.step(options, list(map(Tensor.data_ptr, grads)))


def _sharded_(views: Sequence[ParameterView], options: StepOptions) -> None:
    """One step of tensors whose second moments and denominators torch makes."""
    if entries := [entry for view in views for entry in _sharded_entries(view, options)]:
        Plan(entries).step(options)


def supports(view: ParameterView) -> str | None:
    """Why the kernel cannot take a tensor; None if it can."""
    param, grad, kind = view.param, view.grad, view.blocks.kind
    if not param.is_cpu or grad is None:
        return "it is not on the CPU, or has no gradient"
    if library() is None:
        return unavailable()
    if param.dtype not in _DTYPES or grad.dtype != param.dtype or not _has_known_format(view):
        return "dtypes other than float32 and bfloat16, or a gradient of another dtype than its parameter"
    if any(moment.dtype != torch.float32 or not moment.is_contiguous() for moment in view.moments):
        return "second moments that are not contiguous float32"
    if view.step.dtype != torch.float32 or not view.step.is_cpu:
        return "a step that is not float32 on the CPU"
    if not is_same_layout(param, view.exp_avg):
        return "a first moment with another order in memory than the parameter"
    if param.is_neg() or any(t.data_ptr() % t.element_size() for t in (param, view.exp_avg, *view.moments, view.step)):
        return "addresses between two elements"
    if view.is_whole and view.square_sums is None:
        piece = _whole_piece(*_memory(view))
        if piece is None:
            return "axes in an order that four sizes do not describe"
        return _format_refusal(view, [(piece, None)])
    if kind is not Kind.MEAN:
        return "sums or rectangles of second moments that are no block means"
    pieces = _pieces(view)
    return _format_refusal(view, pieces) if pieces is not None else "rectangles that are not dense in memory"


def _has_known_format(view: ParameterView) -> bool:
    return view.exp_avg.dtype in ((torch.uint8,) if view.exp_avg_scale is not None else _DTYPES)


def _format_refusal(view: ParameterView, pieces: list[tuple[_Piece, Box | None]]) -> str | None:
    """Why the kernel cannot take the formats in which a tensor is stored; None if it can."""
    views = [view.param if box is None else box.view(view.param) for _, box in pieces]
    if reason := format_refusal(view, views):
        return reason
    if view.exp_avg_scale is None or not view.param.numel():
        return None
    lengths = (length for piece, _ in pieces for length in piece.lengths(view.blocks.kind))
    if groups_fit(lengths, slice_length_of(view.param)):
        return None
    return "blocks whose bounds split the groups of 8-bit codes"


def square_sums(view: ParameterView) -> tuple[Tensor, ...] | None:
    """What `view.local_square_sums()` returns, by the kernel; None where it cannot, or where it is not quicker."""
    if view.blocks.kind is not Kind.MEAN or supports(view) is not None:
        return None
    pieces = _pieces(view)
    assert pieces is not None
    num_blocks = view.moments[0].numel()  # a line for each piece: the kernel writes, it does not add
    sums = torch.zeros(len(pieces), num_blocks, dtype=torch.float64, device=view.param.device)
    entries = [_entry(view, Mode.SUM, piece, (line,), box) for (piece, box), line in zip(pieces, sums, strict=True)]
    if entries:
        Plan(entries).step(_NONE)
    return (sums.sum(0).view_as(view.moments[0]),)


def whole_entry(view: ParameterView) -> Entry:
    """A view that the kernel supports, whole on this rank, as the kernel sees it."""
    piece = _whole_piece(*_memory(view))
    assert piece is not None
    return _entry(view, _MODES[view.blocks.kind], piece, view.moments)


def _sharded_entries(view: ParameterView, options: StepOptions) -> list[Entry]:
    """A view whose second moments and denominators are made here, from sums of all ranks or of several rectangles."""
    view.step.add_(1)
    if view.square_sums is None and (sums := square_sums(view)) is not None:
        view.square_sums = sums
    accumulate_(view, options.beta2)
    denominators = view.moments[0].sqrt().div_(options.root(view.step.item())).add_(options.eps)
    return [_entry(view, Mode.DENOMINATOR, piece, (denominators,), box) for piece, box in _pieces(view) or ()]


_MODES = {Kind.MEAN: Mode.MEAN, Kind.ELEMENT: Mode.ELEMENT, Kind.FACTORED: Mode.FACTORED}


@dataclass(frozen=True)
class _Piece:
    """Where the blocks of a dense tensor, or of a rectangle of one, are in memory: `Entry`'s sizes and spans."""

    sizes: tuple[int, int, int, int]
    spans: Spans | None

    def lengths(self, kind: Kind) -> list[int]:
        """Elements of the runs and lines that the kernel updates one at a time."""
        _, outer, rows, inner = self.sizes
        if self.spans is None:
            return []
        if kind is Kind.FACTORED:
            return [inner] if outer == 1 else self.spans.heights()
        return [height * inner for height in self.spans.heights()] if outer == 1 else [rows * inner]


def _entry(
    view: ParameterView, mode: Mode, piece: _Piece, moments: tuple[Tensor, ...], box: Box | None = None
) -> Entry:
    assert view.grad is not None
    param, grad, exp_avg = view.param, laid_out_as(view.param, view.grad), view.exp_avg
    if box is not None:
        param, grad, exp_avg = box.view(param), box.view(grad), box.view(exp_avg)
    formats = Formats.of(view, param)
    return Entry(mode, piece.sizes, piece.spans, param, grad, exp_avg, moments, view.step, formats, view.name)


def laid_out_as(param: Tensor, grad: Tensor) -> Tensor:
    """A gradient with the memory layout of its parameter: itself, or a copy."""
    if is_laid_out_as(param, grad):
        return grad
    return torch.empty_strided(param.shape, param.stride(), dtype=grad.dtype, device=param.device).copy_(grad)


def is_laid_out_as(param: Tensor, grad: Tensor) -> bool:
    """Whether the kernel can read a gradient without a copy."""
    return is_same_layout(param, grad) and not grad.is_neg() and grad.data_ptr() % grad.element_size() == 0


def _memory(view: ParameterView) -> tuple[Blocks, _Shape, _Shape]:
    return view.blocks, tuple(view.param.shape), view.param.stride()


def _pieces(view: ParameterView) -> list[tuple[_Piece, Box | None]] | None:
    """The pieces of a view with block means: the tensor or its rectangles; None where one is not dense."""
    boxes = view.shard.boxes
    if boxes is None:
        piece = _whole_piece(*_memory(view))
        return None if piece is None else [(piece, None)]
    pieces = _box_pieces(boxes, *_memory(view))
    return None if pieces is None else list(zip(pieces, boxes, strict=True))


@lru_cache(maxsize=4096)
def _whole_piece(blocks: Blocks, shape: _Shape, stride: _Shape) -> _Piece | None:
    found = layout(blocks, torch.empty_strided(shape, stride, device="meta", dtype=torch.float32))
    if found is None:
        return None
    if blocks.kind is Kind.ELEMENT:
        return _Piece(found.sizes, None)
    if blocks.kind is Kind.MEAN:
        return _Piece(found.sizes, Spans.of_layout(found, blocks.num_values))
    sizes = _factored_sizes(blocks, found)
    return None if sizes is None else _Piece(sizes, Spans.of_segments(blocks))


def _factored_sizes(blocks: Blocks, found: Layout) -> tuple[int, int, int, int] | None:
    """Sizes with all batches first; None where rows and columns are not those of a matrix in memory for each batch."""
    batches = math.prod(blocks.shape[axis] for axis in blocks.batch_axes)
    _, outer, rows, inner = found.sizes
    axes = [axis for axis in found.order if blocks.shape[axis] > 1]
    if axes != sorted(axes) or (outer > 1 and (inner > 1 or found.sizes[0] != batches)):
        return None
    return (batches, outer, rows if outer > 1 else rows // max(batches, 1), inner)


@lru_cache(maxsize=4096)
def _box_pieces(boxes: tuple[Box, ...], blocks: Blocks, shape: _Shape, stride: _Shape) -> list[_Piece] | None:
    local = torch.empty_strided(shape, stride, device="meta", dtype=torch.float32)
    found = [box_layout(blocks, box, local) for box in boxes]
    return [_Piece(f.sizes, Spans.of_layout(f, blocks.num_values)) for f in found if f] if all(found) else None
