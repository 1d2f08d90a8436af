"""States of parameters that the first FSDP has flattened, in the form that its checkpoints know.

They know only states of the shape of this rank's part, so second moments travel expanded to one value an element.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_adam_mini.optim.shards import Shard
from lightning_adam_mini.optim.state import check_keys, saved_tensor, second_moment_dtype
from lightning_adam_mini.partition import ParameterPartition

__all__ = ["FlatState", "compress_moments", "compress_state", "expand_moments", "expand_state"]


@dataclass(frozen=True)
class FlatState:
    """The state of a flattened parameter whose second moments have another shape than this rank's part.

    Args:
        number: Of the parameter in a saved state.
        part: This rank's part of the parameter, of one dimension.
        cut: Its name and blocks.
        shard: How this rank's part is cut.
        state: The state that the optimizer keeps; None of a parameter that is frozen.
    """

    number: int
    part: Tensor
    cut: ParameterPartition
    shard: Shard
    state: Mapping[str, Tensor] | None

    @property
    def keys(self) -> list[str]:
        """Keys of the second moments."""
        return list(self.cut.blocks.state_shapes)


def expand_state(state_dict: dict[str, Any], flat: Iterable[FlatState]) -> dict[str, Any]:
    """A state dict in which second moments of flattened parameters have one value an element."""
    state = dict(state_dict["state"])
    for one in flat:
        moments = {key: state[one.number][key] for key in one.keys}
        state[one.number] = {**state[one.number], **expand_moments(one.shard, moments, one.part)}
    return {**state_dict, "state": state}


def compress_state(state_dict: dict[str, Any], flat: Sequence[FlatState]) -> dict[str, Any]:
    """Undo `expand_state`; the ranks that share a parameter take part together.

    Raises:
        ValueError: A parameter's saved state comes from another optimizer or partition.
    """
    state = dict(state_dict["state"])
    for one in flat:
        if one.number in state:
            check_keys(state[one.number], one.cut.name, one.cut.blocks)
    expanded = []
    for one in flat:
        like: dict[str, Any] = {"dtype": second_moment_dtype(one.part), "device": one.part.device}
        saved = state.get(one.number)  # none where this rank's part is empty
        expanded.append(
            {
                key: one.part.new_zeros(one.part.shape, dtype=like["dtype"])
                if saved is None
                else saved_tensor(saved[key]).reshape(-1).to(**like)
                for key in one.keys
            }
        )
    moments = compress_moments([one.shard for one in flat], expanded)
    for one, own, is_saved in zip(flat, moments, _saved_somewhere(flat, state), strict=True):
        if is_saved:
            begun = one.state or {
                "step": torch.zeros((), dtype=torch.float32, device="cpu"),
                "exp_avg": torch.zeros_like(one.part),
            }
            state[one.number] = {**begun, **state.get(one.number, {}), **own}
    return {**state_dict, "state": state}


def _saved_somewhere(flat: Sequence[FlatState], state: Mapping[Any, Any]) -> list[bool]:
    """Whether any rank has a saved state of each parameter; frozen ones have none."""
    saved = [one.number in state for one in flat]
    for group in dict.fromkeys(group for one in flat for group in one.shard.groups):
        members = [index for index, one in enumerate(flat) if group in one.shard.groups]
        flags = torch.tensor(
            [float(saved[index]) for index in members], dtype=torch.float32, device=flat[members[0]].shard.device_type
        )
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
        for index, flag in zip(members, flags.tolist(), strict=True):
            saved[index] = flag > 0
    return saved


def expand_moments(shard: Shard, moments: Mapping[str, Tensor], part: Tensor) -> dict[str, Tensor]:
    """Second moments with one value for each element of this rank's part, a tensor of one dimension."""
    assert shard.boxes is not None
    expanded = {}
    for key, moment in moments.items():
        values = moment.new_empty(part.shape)
        for number, box in enumerate(shard.boxes):
            box.view(values).copy_(box.within(shard.expand(key, moment, number)).expand(box.sizes))
        expanded[key] = values
    return expanded


def compress_moments(shards: Iterable[Shard], expanded: Iterable[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Second moments from their expanded form; all ranks of a group learn the values of blocks that lie elsewhere."""
    shards, results = list(shards), []
    for shard, moments in zip(shards, expanded, strict=True):
        results.append({key: _compress(shard, key, values) for key, values in moments.items()})
    for group in dict.fromkeys(group for shard in shards for group in shard.groups):
        parts = [p for shard, r in zip(shards, results, strict=True) if group in shard.groups for p in r.values()]
        bucket = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(bucket, op=dist.ReduceOp.MAX, group=group)  # no second moment is negative
        for part, values in zip(parts, bucket.split([part.numel() for part in parts]), strict=True):
            part.copy_(values.view_as(part))
    return results


def _compress(shard: Shard, key: str, values: Tensor) -> Tensor:
    """Each block's value where this rank has one of its elements, else zero."""
    assert shard.boxes is not None
    moment = values.new_zeros(shard.local_blocks.state_shapes[key])
    numbers = torch.arange(prod(moment.shape), device=values.device).view(moment.shape)
    for index, box in enumerate(shard.boxes):
        target = box.within(shard.expand(key, numbers, index))  # which value of the moment each row or column is
        shared = [dim for dim, size in enumerate(target.shape) if size == 1]
        view = box.view(values)
        view = view.amax(shared, keepdim=True) if shared else view
        moment.view(-1)[target.flatten()] = view.flatten()
    return moment
