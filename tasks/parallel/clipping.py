"""Clipping by the norm of gradients that lie on several ranks, in whatever layouts.

torch adds up norms of DTensors, but not of DTensors on different meshes, or beside plain tensors, as tensor parallelism
makes them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_adam_mini.optim.distributed import is_dtensor, laid_out_as, local

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
            parameter.grad = laid_out_as(parameter, parameter.grad)
            gradients.append(local(parameter.grad))
            device = gradients[-1].device
        if is_dtensor(parameter):  # offloaded gradients lie on the CPU, and their groups may know GPUs alone
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
    if not is_dtensor(parameter):
        return ()
    mesh = parameter.device_mesh
    return tuple(
        mesh.get_group(dim) for dim, p in enumerate(parameter.placements) if not p.is_replicate() and mesh.size(dim) > 1
    )
