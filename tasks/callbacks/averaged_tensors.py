"""Moving averages of a module's parameters and buffers, of which each rank keeps its own shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_adam_mini.optim.distributed import is_dtensor, is_flattened, local

__all__ = ["AveragedTensors"]


class AveragedTensors:
    """Copies of parameters and buffers by their names; they start as the module stands at the first update.

    Args:
        module: What is averaged. A parameter that is a DTensor is averaged by its local part, without communication.

    Raises:
        ValueError: FSDP1 has flattened a parameter.
    """

    def __init__(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            if is_flattened(parameter):
                raise ValueError(
                    f"{name}: the average of the weights needs parameters that FSDP has not flattened; use "
                    "--trainer.strategy fsdp2 or ddp, or set model.ema_decay to null"
                )
        self.updates = 0
        self._sharded = any(is_dtensor(parameter) for parameter in module.parameters())
        self._copies = {name: local(tensor).detach().clone() for name, tensor in self._tensors(module)}

    @torch.no_grad()
    def update(self, module: nn.Module, decay: float) -> None:
        """Move the averages towards the module; the first time, take it as it is.

        Args:
            module: As in the constructor.
            decay: Weight of the average.
        """
        groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for name, tensor in self._tensors(module):
            copy = self._copies[name]
            copies, current = groups.setdefault((copy.device, copy.dtype), ([], []))
            copies.append(copy)
            current.append(local(tensor).detach())
        for (_, dtype), (copies, current) in groups.items():
            if self.updates and dtype.is_floating_point:
                torch._foreach_lerp_(copies, current, 1.0 - decay)
            else:  # counters, such as those of batch norm
                torch._foreach_copy_(copies, current)
        self.updates += 1

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchange the averages and the values of the module."""
        for name, tensor in self._tensors(module):
            copy, here = self._copies[name], local(tensor).detach()
            kept = copy.clone()
            copy.copy_(here)
            here.copy_(kept)

    @torch.no_grad()
    def take(self, module: nn.Module) -> None:
        """Take the values of the module, on the devices that they have now."""
        self._copies = {name: local(tensor).detach().clone() for name, tensor in self._tensors(module)}

    def to_devices_of(self, module: nn.Module) -> None:
        """Follow a module that was moved after the copies were made."""
        for name, tensor in self._tensors(module):
            self._copies[name] = self._copies[name].to(local(tensor).device)

    def state_dict(self, module: nn.Module, saved: Mapping[str, Any]) -> dict[str, Any]:
        """The averages in the form in which a strategy saves the module; all ranks take part.

        Args:
            module: As in the constructor.
            saved: The state dict of the module, as the strategy has made it: with DTensors, or with whole tensors,
                where some ranks may have none.
        """
        keeps_shards = any(isinstance(value, Tensor) and is_dtensor(value) for value in saved.values())
        names = {id(tensor): name for name, tensor in self._tensors(module)}
        state = dict(saved)
        for key, tensor in module.state_dict(keep_vars=True).items():
            name = names.get(id(tensor))
            if name is None:  # no tensor, but an extra state
                continue
            average = self._as(tensor, self._copies[name])
            if is_dtensor(average) and not keeps_shards:
                average = average.full_tensor()  # one at a time, and kept where the strategy keeps whole tensors
            key = key if key in saved else key.replace("_orig_mod.", "")  # strategies leave out torch.compile's prefix
            if key in saved:
                state[key] = average if keeps_shards else average.to(saved[key].device)
        return state

    def _as(self, tensor: Tensor, copy: Tensor) -> Tensor:
        """A copy of the local part, laid out over the ranks as the tensor is."""
        if not is_dtensor(tensor):
            return copy
        from torch.distributed.tensor import DTensor

        layout = (tensor.device_mesh, tensor.placements)
        return DTensor.from_local(copy, *layout, run_check=False, shape=tensor.shape, stride=tensor.stride())

    def _tensors(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Parameters and buffers; those of FSDP2 as shards, which are gathered again from what is written there."""
        if self._sharded:
            from torch.distributed.fsdp import FSDPModule

            for part in module.modules():
                if isinstance(part, FSDPModule):
                    part.reshard()
        yield from module.named_parameters()
        yield from module.named_buffers()
