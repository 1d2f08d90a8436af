"""Sharded parameters: from the placements of a DTensor to a `Shard`, and sums of squares across ranks.

One rule serves FSDP2, HSDP, tensor parallelism and their products. A mesh dimension may shard an axis without splitting
a block: the rows of row blocks, the experts of batched blocks, any axis of element-wise ones. It then shards the second
moment too. Along any other axis the second moment is replicated, and each rank adds its part of the sums of squares to
those of the others. All parameters share one all-reduce per mesh dimension and step, so the update costs a latency and
a few bytes per block; where no block is split there is no communication.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_adam_mini.blocks import Blocks, Kind
from lightning_adam_mini.optim.shards import Shard, grid_boxes

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

    from lightning_adam_mini.optim.update import ParameterView

__all__ = [
    "copy_global_",
    "is_dtensor",
    "is_flat_vector",
    "is_flattened",
    "laid_out_as",
    "local",
    "local_positions",
    "place_moment",
    "shard_dtensor",
    "share_square_sums",
]

Run = tuple[int, int, int]


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor, judged by its mesh, since importing the class takes half a second."""
    return hasattr(tensor, "device_mesh")


def is_flattened(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter of FSDP1: a part of one, or the flat vector itself."""
    return getattr(tensor, "_fsdp_flattened", False) or is_flat_vector(tensor)


def is_flat_vector(tensor: Tensor) -> bool:
    """Whether a tensor is the vector into which FSDP1 has flattened the parameters of a module."""
    return getattr(tensor, "_is_flat_param", False)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, which shares its memory."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def laid_out_as(param: Tensor, grad: Tensor) -> Tensor:
    """A gradient with the placements of its parameter; the gradient itself if it has them already."""
    if is_dtensor(param) and is_dtensor(grad) and grad.placements != param.placements:
        return grad.redistribute(placements=param.placements)
    return grad


def _moment_placements(param: DTensor, blocks: Blocks) -> tuple[Placement, ...]:
    """Placements of the second moment: for each mesh dimension, sharded as the parameter or replicated."""
    from torch.distributed.tensor import Replicate

    kept = _axes_of_whole_blocks(blocks)
    return tuple(p if _sharded_axis(p) in kept else Replicate() for p in param.placements)


def shard_dtensor(name: str, param: DTensor, blocks: Blocks) -> Shard:
    """This rank's part of a DTensor.

    Args:
        name: Name of the parameter, for messages.
        param: The parameter.
        blocks: Block structure of the whole parameter.

    Raises:
        ValueError: A placement that holds partial sums on the ranks.
    """
    mesh = param.device_mesh
    if any(placement.is_partial() for placement in param.placements):
        raise ValueError(
            f"{name}: a parameter with the placements {param.placements} holds partial sums; redistribute it"
        )
    if blocks.kind is Kind.ELEMENT:
        return Shard(Blocks.element(local(param).shape))
    kept = _axes_of_whole_blocks(blocks)
    sharded = {axis for p in param.placements if (axis := _sharded_axis(p)) is not None}
    split = [i for i, p in enumerate(param.placements) if _sharded_axis(p) in sharded - kept]
    groups = tuple(mesh.get_group(i) for i in split if mesh.size(i) > 1)
    local_shape = local(param).shape
    local_blocks = _restrict(blocks, {axis: local_shape[axis] for axis in sharded & kept})
    runs: list[Sequence[Run]] = []
    for axis, size in enumerate(blocks.shape):
        if axis in sharded - kept:
            runs.append(_runs(param, axis))
        else:
            runs.append([(0, 0, local_shape[axis] if axis in sharded else size)])
    reduced = set(range(len(blocks.shape))) - {blocks.axis, *blocks.batch_axes}
    if blocks.kind is Kind.MEAN and sharded - kept <= reduced:  # all rows are here, if not all of each
        return Shard(local_blocks, None, groups, mesh.device_type)
    if blocks.kind is Kind.FACTORED and not sharded - kept:
        return Shard(local_blocks, None, groups, mesh.device_type)
    return Shard(local_blocks, grid_boxes(runs), groups, mesh.device_type)


def place_moment(values: Tensor, param: DTensor, blocks: Blocks, key: str) -> DTensor:
    """A second moment as a DTensor, whose global shape does not depend on the number of ranks.

    Args:
        values: This rank's part.
        param: The parameter that it belongs to.
        blocks: Block structure of the whole parameter.
        key: Key of the state.
    """
    from torch.distributed.tensor import DTensor

    shape = torch.Size(blocks.state_shapes[key])
    strides = torch.empty(shape, device="meta").stride()
    placements = _moment_placements(param, blocks)
    return DTensor.from_local(values, param.device_mesh, placements, run_check=False, shape=shape, stride=strides)


def copy_global_(target: Tensor, source: Tensor) -> None:
    """Copy a tensor into another of the same global shape, whatever the placements; a plain tensor is on all ranks."""
    if is_dtensor(target):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = target.device_mesh, target.placements
        if is_dtensor(source):
            source = source.redistribute(placements=placements) if source.device_mesh == mesh else source.full_tensor()
        if not is_dtensor(source):
            source = distribute_tensor(source.to(mesh.device_type), mesh, placements, src_data_rank=None)
        target.to_local().copy_(source.to_local())
    else:
        target.copy_(source.full_tensor() if is_dtensor(source) else source)


def share_square_sums(
    views: Sequence[ParameterView], local_square_sums: Callable[[ParameterView], tuple[Tensor, ...]]
) -> None:
    """Add up sums of squares over the ranks that share blocks: one all-reduce for each group of ranks.

    Every rank gives the same parameters in the same order, also those without a gradient. Where other ranks have a
    gradient of one (a shard of it may be empty here, or an expert unused), it is zeros on this rank.

    Args:
        views: The parameters.
        local_square_sums: Sums over this rank's part of one.
    """
    shared = [view for view in views if view.shard.groups]
    if not shared:
        return
    for view in shared:
        view.square_sums = local_square_sums(view)
    # Offloaded parameters are on the CPU, while their process group may support GPUs alone.
    present = torch.ones(len(shared), dtype=torch.float64, device=shared[0].shard.device_type)
    is_one_missing = any(view.grad is None for view in shared)
    if is_one_missing:
        has_grad = [view.grad is not None for view in shared]
        present.copy_(torch.tensor(has_grad, dtype=torch.float64, device="cpu"))
    for group in dict.fromkeys(group for view in shared for group in view.shard.groups):
        members = [view for view in shared if group in view.shard.groups]
        parts = [part for view in members for part in view.square_sums or ()]
        bucket = torch.cat([present, *(part.flatten().to(present.device) for part in parts)])
        dist.all_reduce(bucket, group=group)
        present, *sums = bucket.split([len(shared), *(part.numel() for part in parts)])
        reduced = iter([s.view_as(part).to(part) for s, part in zip(sums, parts, strict=True)])
        for view in members:
            view.square_sums = tuple(next(reduced) for _ in view.square_sums or ())
    if is_one_missing:  # only then does the host wait for the device
        for view, count in zip(shared, present.tolist(), strict=True):
            if view.grad is None and count > 0:
                view.grad = torch.zeros_like(view.param)


def _sharded_axis(placement: Placement) -> int | None:
    """The axis that a placement shards; strided shards are no subclass of `Shard` in every version of torch."""
    if placement.is_replicate() or placement.is_partial():
        return None
    return placement.dim  # type: ignore[attr-defined]


def _axes_of_whole_blocks(blocks: Blocks) -> set[int]:
    """Axes that may be sharded without splitting a block."""
    if blocks.kind is Kind.ELEMENT:
        return set(range(len(blocks.shape)))
    axes = set(blocks.batch_axes)
    if blocks.has_row_blocks:
        assert blocks.axis is not None
        axes.add(blocks.axis)
    return axes


def _restrict(blocks: Blocks, sizes: dict[int, int]) -> Blocks:
    """The same block structure with other sizes of axes whose sharding splits no block."""
    if not sizes:
        return blocks
    shape = tuple(sizes.get(axis, size) for axis, size in enumerate(blocks.shape))
    if blocks.has_row_blocks:
        assert blocks.axis is not None
        return Blocks.rows(shape, axis=blocks.axis, batch_axes=blocks.batch_axes)
    return Blocks(shape, blocks.kind, blocks.axis, blocks.batch_axes, blocks.segments, blocks.repeats)


def _runs(param: DTensor, axis: int) -> list[Run]:
    """Runs of consecutive positions along `axis` that this rank holds: (global start, local start, length)."""
    here = local_positions(param, axis)
    if not len(here):
        return []
    starts = [0, *(torch.nonzero(here.diff() != 1).flatten() + 1).tolist(), len(here)]
    return [(int(here[begin]), begin, end - begin) for begin, end in pairwise(starts)]


def local_positions(param: DTensor, axis: int) -> Tensor:
    """The global position of each position of this rank's part along `axis` (int64, on the CPU).

    The positions themselves are distributed as the parameter is, without communication, which works for both uneven and
    strided shards.
    """
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = param.device_mesh
    positions = torch.arange(param.shape[axis], device=mesh.device_type)
    positions = positions.view([-1 if other == axis else 1 for other in range(param.dim())])
    placements = [p if _sharded_axis(p) == axis else Replicate() for p in param.placements]
    return distribute_tensor(positions, mesh, placements, src_data_rank=None).to_local().flatten().cpu()
