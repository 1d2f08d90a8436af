"""FSDP2 on any network: each repeated block is a unit, and what is left is one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .units import repeated_blocks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "keep_after_forward",
    "running_statistics",
    "shard_model",
    "share_running_statistics",
    "sync_gradients",
]


def shard_model(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    reshard_after_forward: bool = True,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    cpu_offload: bool = False,
) -> None:
    """Shard the parameters of a network over a mesh, in place, along their first dimension.

    Args:
        model: The network, whole or on the meta device. Ranks must hold the same weights, which are not compared.
        mesh: One dimension to shard over; or two, to replicate over the first and shard over the second.
        reshard_after_forward: Free the gathered parameters of a block after its forward pass.
        param_dtype: Dtype to gather and compute in; the parameters' by default.
        reduce_dtype: Dtype to reduce gradients in; `param_dtype` by default.
        cpu_offload: Keep parameters, gradients and optimizer state on the CPU.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    options: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": reshard_after_forward,
        "mp_policy": MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype),
        "offload_policy": CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
    }
    for block in repeated_blocks(model).values():
        fully_shard(block, **options)
    # The root too frees its parameters: between steps all are shards, also after a validation.
    fully_shard(model, **options)


def sync_gradients(model: nn.Module, enabled: bool) -> None:
    """Reduce gradients in backward passes, or let each rank add up its own, whole ones."""
    for unit in _units(model):
        unit.set_requires_gradient_sync(enabled, recurse=False)


def keep_after_forward(model: nn.Module, keep: bool) -> None:
    """Keep gathered parameters after a forward pass, until the backward pass; there must be one."""
    for unit in _units(model):
        unit.set_reshard_after_forward(not keep, recurse=False)


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The running means and variances of batch norms, and their counters."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    return [buffer for norm in norms for buffer in norm.buffers(recurse=False)]


@torch.no_grad()
def share_running_statistics(statistics: list[Tensor]) -> None:
    """Give all ranks the first one's statistics of batch norms, as DDP does before each forward pass."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for buffer in statistics:
        by_dtype.setdefault(buffer.dtype, []).append(buffer)
    for buffers in by_dtype.values():
        bucket = torch.cat([buffer.flatten() for buffer in buffers])
        dist.broadcast(bucket, src=0)
        for buffer, part in zip(buffers, bucket.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))


def _units(model: nn.Module) -> Iterator[Any]:
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            yield module
