"""DeepSpeed: AdamMini under ZeRO-1 and 2, which hand an optimizer one flat vector for each parameter group.

DeepSpeed lays the parameters of a group end to end in one vector, of which they become views, and cuts it into equal
ranges, one for each rank. This rank's range, in float32, takes the place of the group's parameters. Where a parameter
lies in the vector tells which of its elements this rank has: the range is a list of parts of parameters, as FSDP1 has
them. DeepSpeed's own map of them, `_hp_mapping`, is wrong with `round_robin_gradients` (0.19.8).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_adam_mini.optim import AdamMini
from lightning_adam_mini.optim.adam_mini import Params
from lightning_adam_mini.optim.fsdp1 import FlatRange
from lightning_adam_mini.optim.quantized import check_rounds_something
from lightning_adam_mini.partition import ParameterPartition

__all__ = ["ZeroAdamMini"]


@dataclass(frozen=True)
class _Part:
    """This rank's part of a parameter: elements of the flat vector from `start`."""

    tensor: Tensor
    flat: Tensor
    start: int

    def follow(self) -> None:
        """Take the gradient of the flat vector, and its memory, which DeepSpeed may have moved."""
        size, grad = self.tensor.numel(), self.flat.grad
        self.tensor.data = self.flat.detach().narrow(0, self.start, size)
        self.tensor.grad = None if grad is None else grad.narrow(0, self.start, size)


class ZeroAdamMini(AdamMini):
    """AdamMini for `deepspeed.initialize(optimizer=...)` with ZeRO stage 0, 1 or 2.

    The update is that of AdamMini: sums of squares of blocks that ranks share go through one small all-reduce a group
    and step. The config needs `"zero_allow_untested_optimizer": true`.

    Args:
        params: As for `AdamMini`: the model, or parameters, named parameters or groups.
        **options: The options of `AdamMini`.

    Raises:
        ValueError: What AdamMini refuses, or a model that ZeRO-3 has partitioned.

    Note:
        States are made with the first step, for this rank's parts alone. Checkpoints of `save_checkpoint` hold them as
        they are, so that DeepSpeed loads them on as many ranks as have saved them.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> optimizer = ZeroAdamMini(model, lr=1e-3, partition="default")
        >>> len(optimizer.state)
        0
    """

    def __init__(self, params: Params, **options: Any) -> None:
        self._is_built = False
        members = params.parameters() if isinstance(params, nn.Module) else ()
        _check_not_partitioned(list(members))
        super().__init__(params, **options)
        self._is_built = True
        # DeepSpeed puts another list into each of these groups.
        self._whole = [(group, group["params"]) for group in self.param_groups]
        self._parts: list[_Part] = []
        self.register_step_pre_hook(_follow)

    @property
    def partition(self) -> dict[str, ParameterPartition]:
        """Parameters of all groups by name, with their roles and blocks."""
        self._adopt()
        return super().partition

    def state_dict(self) -> dict[str, Any]:
        """The state of this rank's parts, as torch's optimizers save it."""
        self._adopt()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state that this rank has saved.

        Args:
            state_dict: What `state_dict()` returned on the same rank, of as many.

        Raises:
            ValueError: As for `AdamMini`.
        """
        self._adopt()
        super().load_state_dict(state_dict)

    def _init_state(self, parameter: Tensor, *, capturable: bool) -> None:
        if self._is_built:  # before, that would be the state of whole parameters
            super()._init_state(parameter, capturable=capturable)

    def _adopt(self) -> None:
        """Put this rank's parts of parameters in the place of DeepSpeed's flat vectors."""
        for part in self._parts:
            if not self.state.get(part.flat):
                self.state.pop(part.flat, None)  # empty, left by DeepSpeed, which looks for flat states
        found: dict[Tensor, tuple[Tensor, FlatRange]] = {}
        for group, whole in self._whole:
            _check_not_partitioned(whole)
            members = [parameter for parameter in whole if hasattr(parameter, "_dp_group")]
            if group["params"] is whole or not members:
                continue  # not flattened
            (flat,) = group["params"]
            parts = _parts_of(members, flat)
            self._parts += [part for part, _ in parts]
            group["params"] = [part.tensor for part, _ in parts]
            found |= {p: (part.tensor, held) for p, (part, held) in zip(members, parts, strict=True)}
        if found:
            self._whole = []
            self._table.replace_by_parts(found)
            self._check_formats()

    def _check_formats(self) -> None:
        """Raise where the formats that were asked for do not fit flat vectors."""
        if self.exp_avg_dtype is torch.uint8:
            raise ValueError(
                "DeepSpeed cuts its flat vectors anywhere, also within the groups of elements that 8-bit first moments "
                "share a scale in: take exp_avg_dtype=torch.bfloat16, or shard the model with fully_shard (FSDP2)"
            )
        if self.stochastic_rounding:
            check_rounds_something(
                d for p in self._parts for d in (p.tensor.dtype, self.exp_avg_dtype or p.tensor.dtype)
            )


def _follow(optimizer: ZeroAdamMini, args: Any, kwargs: Any) -> None:
    """What comes before each step."""
    optimizer._adopt()
    for part in optimizer._parts:
        part.follow()


def _parts_of(members: list[Any], flat: Tensor) -> list[tuple[_Part, FlatRange]]:
    """This rank's parts of the parameters of a group, some of them empty, and which elements they are."""
    if len({parameter.untyped_storage().data_ptr() for parameter in members}) > 1:
        raise ValueError(
            f"DeepSpeed {deepspeed.__version__} keeps the parameters of a group in another way than this package "
            "knows: shard the model with fully_shard (FSDP2), or use DeepSpeed 0.19.8"
        )
    origin, size = min(parameter.storage_offset() for parameter in members), flat.numel()
    found = []
    for parameter in members:
        process_group, numel = parameter._dp_group, parameter.numel()
        offset = parameter.storage_offset() - origin - dist.get_rank(process_group) * size  # in this rank's range
        first, last = (min(max(place, 0), size) for place in (offset, offset + numel))
        part = _Part(flat.detach().narrow(0, first, last - first).requires_grad_(), flat, first)
        start = min(max(-offset, 0), numel)
        # The ranks communicate on the device of the parameters, also where the flat vector is offloaded.
        held = FlatRange(
            tuple(parameter.shape),
            start,
            start + last - first,
            process_group,
            device_type=parameter.device.type,
            is_expanded=False,
        )
        found.append((part, held))
    return found


def _check_not_partitioned(parameters: list[Tensor]) -> None:
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        raise ValueError(
            'ZeRO-3 hides the blocks of parameters from the optimizer: set "stage": 2 in "zero_optimization", or shard '
            "the model with fully_shard (FSDP2) and AdamMini(model)"
        )
