"""From a list of tensors to launches, and which of the tensors the kernels do not take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightning_adam_mini.blocks import Kind
from lightning_adam_mini.optim.kernels.layout import Layout, box_layout, is_same_layout, layout
from lightning_adam_mini.optim.kernels.triton_launches import Alike, Launch, make_launches
from lightning_adam_mini.optim.kernels.triton_tables import Work, contiguous_work, elementwise_work, tiled_work
from lightning_adam_mini.optim.update import ParameterView

__all__ = ["DTYPES", "Plan", "is_aligned", "make_plan", "plan_key", "refusal"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of parameters, gradients and first moments."""
MAX_WIDTH = 2**22
"""Columns of a matrix whose blocks are columns: offsets within a tile have 32 bits."""


@dataclass(frozen=True)
class Plan:
    """What a step does with a list of tensors.

    Args:
        launches: Launches in their order.
        taken: Numbers of the tensors that the kernels update, as they are numbered in the tables.
        summed: Those of them whose second moments come from sums over all ranks.
        left: Numbers of the tensors that the reference updates.
    """

    launches: tuple[Launch, ...]
    taken: tuple[int, ...]
    summed: tuple[int, ...]
    left: tuple[int, ...]


def plan_key(tensor: ParameterView) -> tuple[object, ...]:
    """What a plan depends on, but for the shard, which has to be the very same object."""
    assert tensor.grad is not None
    param, grad, exp_avg = tensor.param, tensor.grad, tensor.exp_avg
    layouts = (param.stride(), grad.stride(), exp_avg.stride(), *(moment.stride() for moment in tensor.moments))
    dtypes = (param.dtype, grad.dtype, exp_avg.dtype, tensor.moments[0].dtype)
    return (
        id(tensor.shard),
        param.shape,
        layouts,
        dtypes,
        is_aligned(tensor),
        param.is_neg() or grad.is_neg(),
        tensor.square_sums is None,
        tensor.is_plain,
    )


def is_aligned(tensor: ParameterView) -> bool:
    """Whether all memory of a tensor starts at multiples of 16 bytes."""
    assert tensor.grad is not None
    pointers = tensor.param.data_ptr() | tensor.grad.data_ptr() | tensor.exp_avg.data_ptr()
    return not (pointers | tensor.moments[0].data_ptr()) % 16


def make_plan(tensors: Sequence[ParameterView], device: torch.device) -> Plan:
    """The plan for tensors on one device, which serves later steps too as long as `plan_key` is the same.

    Args:
        tensors: Tensors with gradients.
        device: Where they lie.
    """
    groups: dict[Alike, list[tuple[int, Work]]] = defaultdict(list)
    taken: list[int] = []
    summed: list[int] = []
    left: list[int] = []
    for number, tensor in enumerate(tensors):
        if refusal(tensor) is not None:
            left.append(number)
            continue
        if _is_summed(tensor):
            summed.append(number)
        assert tensor.grad is not None
        types = (tensor.param.dtype, tensor.grad.dtype, tensor.exp_avg.dtype)
        for work in _works(tensor):
            groups[types, is_aligned(tensor)].append((len(taken), work))
        taken.append(number)
    launches = make_launches(groups, device)
    return Plan(launches, tuple(taken), tuple(summed), tuple(left))


def _is_summed(tensor: ParameterView) -> bool:
    return tensor.square_sums is not None or tensor.shard.boxes is not None


def refusal(tensor: ParameterView) -> str | None:
    """Why the kernels do not take a tensor, wherever it lies; None where they do.

    Args:
        tensor: A tensor; without a gradient, as if it had one like the parameter.
    """
    param, exp_avg = tensor.param, tensor.exp_avg
    grad = param if tensor.grad is None else tensor.grad
    if tensor.blocks.kind is Kind.FACTORED:
        return "a factored second moment"
    if not tensor.is_plain:
        return "a first moment in 8 bits, or stochastic rounding"
    if any(t.dtype not in DTYPES for t in (param, grad, exp_avg)):
        return "dtypes other than float32, bfloat16 and float16"
    if any(moment.dtype != torch.float32 or not moment.is_contiguous() for moment in tensor.moments):
        return "second moments that are not contiguous float32"
    if any(t.device != param.device for t in (grad, exp_avg, *tensor.moments)):
        return "memory on several devices"
    if param.is_neg() or grad.is_neg():
        return "numbers that lie in memory with the other sign"
    if not (is_same_layout(param, grad) and is_same_layout(param, exp_avg)):
        return "a gradient or first moment that lies in memory in another order than the parameter"
    if _parts(tensor) is None:
        return "memory with gaps, or axes in an order that four sizes do not describe"
    return None


def _parts(tensor: ParameterView) -> list[tuple[int, Layout]] | None:
    """The first element and the layout of a tensor, or of each of its rectangles; None where one has none."""
    param, blocks = tensor.param, tensor.blocks
    found: list[tuple[int, Layout | None]]
    if tensor.shard.boxes is None:
        found = [(0, layout(blocks, param))]
    else:
        start = int(param.storage_offset())
        boxes = tensor.shard.boxes
        found = [(int(box.view(param).storage_offset()) - start, box_layout(blocks, box, param)) for box in boxes]
    parts = []
    for offset, part in found:
        if part is None or (not part.has_contiguous_rows and part.sizes[2] * part.sizes[3] > MAX_WIDTH):
            return None
        parts.append((offset, part))
    return parts


def _works(tensor: ParameterView) -> list[Work]:
    """The work of a tensor that is not refused, a part for each rectangle."""
    if not tensor.param.numel():
        return []
    parts = _parts(tensor)
    assert parts is not None
    return [_work(part, offset, tensor.blocks.kind, is_summed=_is_summed(tensor)) for offset, part in parts]


def _work(found: Layout, offset: int, kind: Kind, *, is_summed: bool) -> Work:
    if kind is Kind.ELEMENT or (not is_summed and found.is_elementwise):
        return elementwise_work(offset, found.num_rows)
    if found.has_contiguous_rows:
        return contiguous_work(found, offset, is_summed=is_summed)
    return tiled_work(found, offset, is_summed=is_summed)
