"""The update in slices: for first moments in 8 bits, and for what is rounded stochastically to bfloat16.

What is stored in few bits is widened to float32, moved and stored again, a slice of about a megabyte at a time, so
that nothing of the parameter's size is made on the way. The parameter moves by the first moment as it is before it is
stored. Each line below is one IEEE operation an element: fused or reordered ones would give other last bits in the tail
of a vector, on another device or in another sharding, and with them other roundings.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_adam_mini.blocks import Kind
from lightning_adam_mini.optim import quantized
from lightning_adam_mini.optim.parameter_view import ParameterView
from lightning_adam_mini.optim.rectangles import intersect, split, whole_box
from lightning_adam_mini.optim.shards import Box, Shard
from lightning_adam_mini.optim.step_options import StepOptions
from lightning_adam_mini.optim.stochastic_rounding import round_to_bfloat16

__all__ = ["apply_"]


def apply_(tensor: ParameterView, options: StepOptions, *, step_size: float | Tensor, root: float | Tensor) -> None:
    """Move the first moment and the parameter, with the step and the second moments as they are after this step.

    Args:
        tensor: The parameter with its gradient, blocks and state.
        options: Scalars of this step.
        step_size: Learning rate over the bias correction of the first moment.
        root: Root of the bias correction of the second moment.
    """
    assert tensor.grad is not None
    device, wide = tensor.param.device, tensor.moments[0].dtype
    step: int | Tensor = tensor.step.to(torch.int64) if isinstance(root, Tensor) else int(tensor.step.item())
    denominators = _Denominators(tensor, root, options.eps)
    for box, pieces in _slices(tensor):
        grad = box.view(tensor.grad).to(wide, copy=True)
        grad = grad.neg_() if options.maximize else grad
        exp_avg = _exp_avg(tensor, box).to(wide)
        exp_avg.add_(grad.sub_(exp_avg).mul_(1 - options.beta1))
        param = box.view(tensor.param).to(wide, copy=True).mul_(options.shrink)
        for piece, denom in denominators.of(pieces):
            piece.view(param).sub_((piece.view(exp_avg) / denom).mul_(step_size))

        noise = None if tensor.rounding is None else tensor.rounding.bits(box, step, device)
        _store_(box.view(tensor.param), param, noise)
        if tensor.exp_avg_scale is not None:
            quantized.write_(tensor.exp_avg, tensor.exp_avg_scale, box, exp_avg.to(torch.float32))
        else:
            _store_(box.view(tensor.exp_avg), exp_avg, None if noise is None else noise >> 16)


def _exp_avg(tensor: ParameterView, box: Box) -> Tensor:
    """A copy of a slice of the first moment."""
    if tensor.exp_avg_scale is not None:
        return quantized.read(tensor.exp_avg, tensor.exp_avg_scale, box)
    return box.view(tensor.exp_avg).to(torch.promote_types(tensor.exp_avg.dtype, torch.float32), copy=True)


def _store_(target: Tensor, numbers: Tensor, noise: Tensor | None) -> None:
    """Store numbers, which may be overwritten, as the target's dtype."""
    if noise is not None and target.dtype is torch.bfloat16:
        numbers = round_to_bfloat16(numbers, noise)
    target.copy_(numbers)


def _slices(tensor: ParameterView) -> Iterator[tuple[Box, tuple[Box, ...]]]:
    """Slices of the local tensor, each with its rectangles of the frame, counted within the slice."""
    boxes = tensor.shard.boxes
    if boxes is not None and any(box.flat is not None for box in boxes):
        for part in (part for box in boxes for part in split(box)):
            yield part, (Box(part.start, part.sizes, (0,) * len(part.sizes)),)
        return
    whole = whole_box(tensor.param.shape)
    for box in split(whole, multiple=quantized.GROUP_SIZE):
        found = (intersect(box, other) for other in (boxes if boxes is not None else (whole,)))
        yield box, tuple(piece for piece in found if piece is not None)


class _Denominators:
    """Denominators `root of the second moment / root + eps` of rectangles, made where they are needed."""

    def __init__(self, tensor: ParameterView, root: float | Tensor, eps: float) -> None:
        self._tensor, self._root, self._eps = tensor, root, eps
        kind = tensor.blocks.kind
        self._kept = self._finish(tensor.blocks.root_second_moment(*tensor.moments)) if kind is Kind.MEAN else None

    def of(self, pieces: tuple[Box, ...]) -> Iterator[tuple[Box, Tensor]]:
        """Rectangles of one slice with what broadcasts against them; segments of a factored second moment apart."""
        if self._kept is not None:
            for piece in pieces:
                yield piece, piece.within(self._kept)
        elif self._tensor.blocks.kind is Kind.ELEMENT:
            for piece in pieces:
                yield piece, self._finish(piece.within(self._tensor.moments[0]).sqrt())
        else:
            for piece, root in Shard(self._tensor.blocks, pieces).factored_roots(self._tensor.moments):
                yield piece, self._finish(root)

    def _finish(self, root: Tensor) -> Tensor:
        return root.div_(self._root).add_(self._eps)
