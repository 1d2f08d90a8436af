"""Clipping by the norm of gradients that lie on several ranks, in whatever layouts.

torch adds up norms of DTensors, but not of DTensors on different meshes, or beside plain tensors, as tensor parallelism
makes them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["clip_grad_norm_"]


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients down to a total norm, as `torch.nn.utils.clip_grad_norm_` does for whole ones.

    Each rank adds up the squares of its parts; the sums go over the groups of ranks that hold different parts. Parts
    that several ranks hold alike count once.

    Args:
        parameters: The same on all ranks, in the same order.
        max_norm: Largest 2-norm of all gradients together.

    Returns:
        The norm before, a scalar on the device of the first gradient's mesh.
    """
    parts: dict[tuple[ProcessGroup, ...], list[Tensor]] = {}
    device = torch.device("cpu")
    for parameter in parameters:
        gradients = parts.setdefault(_groups(parameter), [])
        if parameter.grad is not None:
            gradients.append(_local_gradient(parameter))
            device = gradients[-1].device
        if hasattr(
            parameter, "device_mesh"
        ):  # offloaded gradients lie on the CPU, and their groups may know GPUs alone
            device = torch.device(parameter.device_mesh.device_type)
    total: Tensor | None = None
    for groups, gradients in parts.items():
        square = (
            torch.nn.utils.get_total_norm(gradients).to(device).square()
            if gradients
            else torch.zeros((), device=device)
        )
        square = square.to(torch.promote_types(square.dtype, torch.float32))
        for group in groups:
            dist.all_reduce(square, group=group)
        total = square if total is None else total + square
    norm = torch.zeros((), device=device) if total is None else total.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradients in parts.values():
        for gradient in gradients:
            gradient.mul_(scale.to(gradient.device, gradient.dtype))
    return norm


def _groups(parameter: Tensor) -> tuple[ProcessGroup, ...]:
    """The groups of ranks that hold different parts of a parameter."""
    if not hasattr(parameter, "device_mesh"):
        return ()
    sharded: Any = parameter
    mesh = sharded.device_mesh
    return tuple(
        mesh.get_group(dim) for dim, p in enumerate(sharded.placements) if not p.is_replicate() and mesh.size(dim) > 1
    )


def _local_gradient(parameter: Tensor) -> Tensor:
    """This rank's part of a gradient, sharing its memory; laid out first as the parameter is."""
    gradient: Any = parameter.grad
    if not hasattr(gradient, "device_mesh"):
        return gradient
    placements = parameter.placements  # type: ignore[attr-defined]
    if gradient.placements != placements:
        gradient = gradient.redistribute(placements=placements)
        parameter.grad = gradient
    return gradient.to_local()
