"""First weights: the same on all ranks, and for large models drawn without the whole model in any rank's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_adam_mini.optim.distributed import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["LARGE", "Initialisation", "load_from_first_rank", "materialise", "share_random_state"]

Initialisation = Literal["auto", "whole", "sharded"]

LARGE = 1_000_000_000
"""Parameters from which `auto` initialises in shards: 4 GB on each rank otherwise, for a moment."""


def share_random_state() -> None:
    """Give all ranks the first one's random state, so that they draw the same weights."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    state = [torch.get_rng_state()]
    dist.broadcast_object_list(state, src=0)
    torch.set_rng_state(state[0])


def materialise(model: nn.Module, device: torch.device, initialise: Callable[[], None]) -> None:
    """Give a sharded model of the meta device memory and its first weights, one whole parameter at a time.

    The weights depend on the seed and on the kind of device alone, not on the number of ranks or the layout: each rank
    draws all of a parameter and keeps its part. They are not those of a model that was built whole, where torch draws
    weights for each layer that are then replaced.

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
    """Copy the weights of a whole model, which the first rank alone holds, on the CPU, to a sharded one.

    Args:
        model: Sharded.
        load: Gives the whole model, with the same names; called on the first rank.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    whole: dict[str, Any] = load().state_dict() if dist.get_rank() == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
    set_model_state_dict(model, whole, options=options)


class _DrawWhole(TorchDispatchMode):
    """Random numbers for a part of a tensor are those that the whole tensor would get."""

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
    """Clear the row of the padding token, which an initialisation that indexes a sharded table clears in a copy."""
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
