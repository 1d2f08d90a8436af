"""The plain module under wrappers: what computes the loss, without hooks that communicate or cast."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["is_fully_sharded", "plain_twin", "unwrap"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TENSOR_PARALLEL = "tensor parallelism is not supported here: take the whole model, or one that FSDP2 alone shards"


def unwrap(model: Any) -> nn.Module:
    """The module under DDP and `torch.compile`, whose double backward torch does not support.

    FSDP2 leaves the parameters of the root gathered after a forward pass; they are sharded again here.

    Raises:
        ValueError: The first FSDP, which flattens parameters, or tensor parallelism.
    """
    from torch.nn.parallel import DataParallel, DistributedDataParallel

    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            break
    if any(hasattr(module, "_fsdp_wrapped_module") for module in model.modules()):
        raise ValueError("the first FSDP flattens parameters: shard the model with fully_shard (FSDP2), or use DDP")
    if is_fully_sharded(model):
        plain_twin(model)
    elif any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise ValueError(_TENSOR_PARALLEL)
    return model


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded the module or one in it."""
    if "torch.distributed.fsdp" not in sys.modules:
        return False  # and spare its import, which is slow
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def plain_twin(model: nn.Module) -> nn.Module:
    """A module tree with the same parameters and buffers, but without FSDP2 and its hooks.

    FSDP2's hooks free gathered parameters after the forward pass and reduce gradients outside of autograd: neither
    lives through a double backward. The twin shares everything with the model but the containers that say what belongs
    to a module, so that making it costs no memory.

    Raises:
        ValueError: A module with hooks of tensor parallelism.
    """
    _reshard(model)
    twins: dict[int, nn.Module] = {}
    return _twin(model, twins)


def _reshard(model: nn.Module) -> None:
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _twin(module: nn.Module, twins: dict[int, nn.Module]) -> nn.Module:
    from torch.distributed.fsdp import FSDPModule

    if id(module) in twins:
        return twins[id(module)]
    plain: Any = next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))
    twin: nn.Module = plain.__new__(plain)
    twins[id(module)] = twin
    twin.__dict__ = dict(module.__dict__)
    for name in ("_parameters", "_buffers"):
        twin.__dict__[name] = dict(module.__dict__[name])
    for name in _HOOKS:
        hooks = module.__dict__[name]
        twin.__dict__[name] = type(hooks)((key, hook) for key, hook in hooks.items() if not _communicates(hook))
    twin.__dict__["_modules"] = {
        name: None if child is None else _twin(child, twins) for name, child in module._modules.items()
    }
    return twin


def _communicates(hook: Callable[..., Any]) -> bool:
    """Whether a hook is FSDP2's."""
    home = getattr(getattr(hook, "func", hook), "__module__", None) or ""
    if home.startswith("torch.distributed.tensor"):
        raise ValueError(_TENSOR_PARALLEL)
    return home.startswith("torch.distributed.fsdp")
