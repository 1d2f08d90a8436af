"""Building a network under a strategy: whole or sharded, with the same first weights on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_adam_mini.optim.distributed import is_dtensor

from .fsdp1 import prepare_fsdp1
from .strategies import FSDP2

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["build_for", "load_from_first_rank", "materialise", "share_random_state"]

Build = Callable[[], nn.Module]

LARGE = 1_000_000_000
"""Parameters from which `initialisation auto` draws weights in shards: 4 GB on each rank otherwise, for a moment."""


def build_for(
    strategy: Strategy | None,
    whole: Build,
    *,
    on_meta: Build | None = None,
    initialise: Callable[[nn.Module], None] | None = None,
    is_trained: bool = False,
) -> nn.Module:
    """Build a network, and shard it if the strategy does.

    Under FSDP2 all ranks use the random state of the first one. So their weights are equal, and those of one process
    with its seed.

    Args:
        strategy: The trainer's; None without a trainer.
        whole: Builds the network with its weights, on the CPU.
        on_meta: Builds it on the meta device; None for a network that is never large.
        initialise: Draws all weights and sets all buffers in place, once a network of the meta device has memory.
        is_trained: Whether `whole` reads its weights from a file.

    Raises:
        ValueError: The strategy cannot shard this network.
    """
    if isinstance(strategy, FSDPStrategy):
        share_random_state()
        model = whole()
        prepare_fsdp1(strategy, model)
        return model
    if not isinstance(strategy, FSDP2):
        return whole()
    share_random_state()
    model, is_meta = _unsharded(strategy, whole, on_meta)
    model = strategy.shard(model)
    if is_meta:
        assert initialise is not None
        device = torch.device("cpu") if strategy.cpu_offload else strategy.root_device
        materialise(model, device, partial(initialise, model))
        if is_trained:
            load_from_first_rank(model, whole)
    return model


def _unsharded(strategy: FSDP2, whole: Build, on_meta: Build | None) -> tuple[nn.Module, bool]:
    """The network before it is sharded, and whether it is on the meta device, without weights."""
    if on_meta is None or strategy.initialisation == "whole":
        if strategy.initialisation == "sharded":
            raise ValueError(
                "trainer.strategy.initialisation sharded is for language models: leave it out, and the model is built "
                "on each rank before it is sharded"
            )
        return whole(), False
    with torch.device("meta"):
        model = on_meta()
    large = sum(parameter.numel() for parameter in model.parameters()) >= LARGE
    if large or strategy.initialisation == "sharded":
        return model, True
    return whole(), False


def share_random_state() -> None:
    """Give all ranks the random state of the first one, so that they draw the same weights."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    state = [torch.get_rng_state()]
    dist.broadcast_object_list(state, src=0)
    torch.set_rng_state(state[0])


def materialise(model: nn.Module, device: torch.device, initialise: Callable[[], None]) -> None:
    """Give a sharded model on the meta device memory and its first weights, one whole parameter at a time.

    Each rank draws all of a parameter and keeps its part. So the weights depend on the seed and the kind of device
    alone, not on the number of ranks or the layout. They differ from those of a model that was built whole, where torch
    first draws weights for each layer that are then replaced.

    Args:
        model: Sharded, its parameters DTensors on the meta device.
        device: Where its parts go.
        initialise: Draws all weights in place, as transformers' `initialize_weights` does, and sets all buffers.
    """
    model.to_empty(device=device)
    seed = torch.initial_seed()
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices), _DrawWhole():
        torch.manual_seed(seed)
        initialise()
    _zero_padding(model)


def load_from_first_rank(model: nn.Module, load: Callable[[], nn.Module]) -> None:
    """Copy weights into a sharded model from a whole one, which only the first rank loads, on the CPU.

    Args:
        model: Sharded.
        load: Loads the whole model, with the same names.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    whole: dict[str, Any] = load().state_dict() if dist.get_rank() == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
    set_model_state_dict(model, whole, options=options)


class _DrawWhole(TorchDispatchMode):
    """Gives the local part of a tensor the random numbers that the whole tensor would get."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or not any(hasattr(x, "device_mesh") for x in args):
            return func(*args, **kwargs)
        target = args[0]
        if not func._schema.is_mutable or not hasattr(target, "device_mesh"):
            raise NotImplementedError(
                f"{func} draws random numbers for a sharded tensor as a new one: set trainer.strategy.initialisation "
                "to whole"
            )
        mesh: DeviceMesh = target.device_mesh
        whole = torch.empty(target.shape, dtype=target.dtype, device=mesh.device_type)
        func(whole, *args[1:], **kwargs)
        _keep_part(target, whole)
        return target


@torch.no_grad()
def _zero_padding(model: nn.Module) -> None:
    """Zero the row of the padding token: an initialisation that indexes a sharded table zeroes a copy of it."""
    from torch.distributed.tensor import distribute_tensor

    for module in model.modules():
        if not isinstance(module, nn.Embedding) or module.padding_idx is None or not is_dtensor(module.weight):
            continue
        weight = module.weight
        rows = torch.arange(weight.shape[0], device=weight.device_mesh.device_type) == module.padding_idx
        padding = rows[:, None].expand(weight.shape).contiguous()
        part = distribute_tensor(padding, weight.device_mesh, weight.placements, src_data_rank=None)
        weight.to_local().masked_fill_(part.to_local(), 0.0)


def _keep_part(target: Any, whole: Tensor) -> None:
    from torch.distributed.tensor import distribute_tensor

    part = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
    target.to_local().copy_(part.to_local())
