"""Sharding any network with FSDP2: the wrap policy, activation checkpointing, clipping and batch norms across ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_adam_mini.optim.distributed import is_dtensor, laid_out_as, local

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "checkpoint_activations",
    "clip_grad_norm_",
    "keep_after_forward",
    "repeated_blocks",
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

    Each repeated block is wrapped, and the root holds all other parameters.

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
    # The root reshards too, so that between steps all parameters are shards, also after a validation.
    fully_shard(model, **options)


def sync_gradients(model: nn.Module, enabled: bool) -> None:
    """Reduce gradients in backward passes, or let each rank accumulate its own whole gradients."""
    for module in _fsdp_modules(model):
        module.set_requires_gradient_sync(enabled, recurse=False)


def keep_after_forward(model: nn.Module, keep: bool) -> None:
    """Keep gathered parameters from a forward pass until its backward pass, which has to follow."""
    for module in _fsdp_modules(model):
        module.set_reshard_after_forward(not keep, recurse=False)


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Running means, variances and counters of batch norms."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    return [buffer for norm in norms for buffer in norm.buffers(recurse=False)]


@torch.no_grad()
def share_running_statistics(statistics: list[Tensor]) -> None:
    """Broadcast the statistics of batch norms from the first rank, as DDP does before each forward pass."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for buffer in statistics:
        by_dtype.setdefault(buffer.dtype, []).append(buffer)
    for buffers in by_dtype.values():
        bucket = torch.cat([buffer.flatten() for buffer in buffers])
        dist.broadcast(bucket, src=0)
        for buffer, part in zip(buffers, bucket.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))


def _fsdp_modules(model: nn.Module) -> Iterator[Any]:
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            yield module


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The wrap policy: the blocks that a network is a stack of, by name, none within another.

    A model of transformers names their classes (`_no_split_modules`). In other networks they are the members of a
    ModuleList, Sequential or ModuleDict that share their class with another member and have a child with a matrix:
    layers of a Transformer, residual blocks of a ResNet, stages of a U-Net, convolutions of a graph network. A block
    that shares a parameter with modules outside of it is left out, because FSDP can put a parameter in one place only.
    """
    named = set(getattr(model, "_no_split_modules", None) or ())
    found = dict(_by_class(model, "", named)) if named else {}
    found = found or dict(_members(model, ""))
    owners = Counter(id(parameter) for parameter in _all_parameters(model))
    return {name: block for name, block in found.items() if not _shares_outside(block, owners)}


def _by_class(module: nn.Module, prefix: str, names: set[str]) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if type(child).__name__ in names:
            yield path, child
        else:
            yield from _by_class(child, f"{path}.", names)


def _members(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    is_container = isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict)
    classes = Counter(type(child) for child in module.children())
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        is_plain_container = isinstance(child, nn.ModuleList | nn.ModuleDict) or type(child) is nn.Sequential
        if is_container and classes[type(child)] > 1 and not is_plain_container and _is_block(child):
            yield path, child
        else:
            yield from _members(child, f"{path}.")


def _is_block(module: nn.Module) -> bool:
    own = {id(parameter) for parameter in module.parameters(recurse=False)}
    return any(parameter.dim() > 1 and id(parameter) not in own for parameter in module.parameters())


def _all_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of all modules; a shared one once for each module that has it."""
    for child in module.modules():
        yield from child.parameters(recurse=False)


def _shares_outside(block: nn.Module, owners: Counter[int]) -> bool:
    within = Counter(id(parameter) for parameter in _all_parameters(block))
    return any(owners[parameter] > number for parameter, number in within.items())


def checkpoint_activations(model: nn.Module) -> None:
    """Keep only the inputs of each repeated block for the backward pass, which recomputes the activations within.

    Networks of transformers and diffusers have a method for it. In others each repeated block is wrapped; names in
    state dicts stay the same.

    Raises:
        ValueError: The network has no repeated blocks.
    """
    network: Any = model
    if hasattr(model, "activation_checkpointing_enable"):  # transformers from 5.23
        network.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    elif hasattr(model, "gradient_checkpointing_enable"):
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    elif hasattr(model, "enable_gradient_checkpointing"):
        network.enable_gradient_checkpointing()
    else:
        _wrap_blocks(model)


def _wrap_blocks(model: nn.Module) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    blocks = repeated_blocks(model)
    if not blocks:
        raise ValueError(
            f"trainer.strategy.activation_checkpointing: {type(model).__name__} has no repeated blocks to "
            "recompute; set it to false"
        )
    for name, block in blocks.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, checkpoint_wrapper(block))


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients down to a total norm, as `torch.nn.utils.clip_grad_norm_` does, on any mix of layouts.

    torch's own cannot add the norms of DTensors on different meshes, or of DTensors and plain tensors, which tensor
    parallelism needs. Here each rank sums the squares of its parts, and the sums are reduced over the ranks that hold
    different parts. Replicated parts count once.

    Args:
        parameters: The same on all ranks, in the same order.
        max_norm: Largest 2-norm of all gradients together.

    Returns:
        The norm before clipping, a scalar on the device of the first gradient's mesh.
    """
    parts: dict[tuple[ProcessGroup, ...], list[Tensor]] = {}
    device = torch.device("cpu")
    for parameter in parameters:
        gradients = parts.setdefault(_groups(parameter), [])
        if parameter.grad is not None:
            parameter.grad = laid_out_as(parameter, parameter.grad)
            gradients.append(local(parameter.grad))
            device = gradients[-1].device
        if is_dtensor(parameter):  # offloaded gradients are on the CPU, where their groups may have no backend
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
    """The groups over which a parameter is sharded."""
    if not is_dtensor(parameter):
        return ()
    mesh = parameter.device_mesh
    return tuple(
        mesh.get_group(dim) for dim, p in enumerate(parameter.placements) if not p.is_replicate() and mesh.size(dim) > 1
    )
