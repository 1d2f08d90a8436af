"""FSDP1 (`FullyShardedDataParallel`): ranges of flattened parameters, and the states that its checkpoints know.

FSDP1 flattens the parameters of each wrapped module into one vector and gives each rank a range of it, so that a rank's
part of a matrix may begin and end in the middle of a row. With `use_orig_params=True` the optimizer sees these parts as
one-dimensional parameters. Only the wrapper knows which elements they are, in private attributes of torch, which this
module alone reads. Its checkpoints hold only states of the shape of a rank's part, so second moments are saved expanded
to one value per element.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_adam_mini.blocks import Blocks, Kind
from lightning_adam_mini.optim.distributed import is_flat_vector, is_flattened
from lightning_adam_mini.optim.shards import Shard, flat_boxes
from lightning_adam_mini.optim.state import check_keys, saved_tensor, second_moment_dtype
from lightning_adam_mini.partition import ParameterPartition

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "FlatRange",
    "FlatState",
    "compress_moments",
    "compress_state",
    "expand_moments",
    "expand_state",
    "flat_ranges",
    "whole_shapes",
]


@dataclass(frozen=True)
class FlatRange:
    """The elements of a flattened parameter that this rank holds.

    Args:
        shape: Shape of the whole parameter.
        start: The first element.
        stop: The element after the last.
        group: The ranks that hold the others.
        device_type: Type of device that they communicate on; None for that of the part.
        is_expanded: Whether states are saved with one value per element.
    """

    shape: tuple[int, ...]
    start: int
    stop: int
    group: ProcessGroup
    device_type: str | None = None
    is_expanded: bool = True

    def shard(self, blocks: Blocks, device_type: str) -> Shard:
        """This rank's part of the parameter; the rank keeps the whole second moment unless that is element-wise."""
        if blocks.kind is Kind.ELEMENT:
            return Shard(Blocks.element((self.stop - self.start,)))
        groups = (self.group,) if dist.get_world_size(self.group) > 1 else ()
        return Shard(blocks, flat_boxes(self.shape, self.start, self.stop), groups, self.device_type or device_type)


def flat_ranges(module: nn.Module) -> dict[Tensor, FlatRange]:
    """The ranges of all parameters of a model that FSDP1 has flattened; none where the model is not wrapped.

    Args:
        module: The model, wrapped or inside of its wrapper.

    Raises:
        ValueError: The wrapper was made without `use_orig_params=True`, or is gone, or torch has other attributes than
            expected.
    """
    if any(is_flat_vector(p) for p in module.parameters()):
        raise ValueError(
            "FSDP shows the optimizer flat parameters, which hide the blocks: wrap the model with "
            "FullyShardedDataParallel(model, use_orig_params=True), or shard it with fully_shard (FSDP2)"
        )
    flattened = {p for p in module.parameters() if is_flattened(p)}
    if not flattened:
        return {}
    ranges: dict[Tensor, FlatRange] = {}
    try:
        for handle in _handles(module, flattened):
            flat: Any = handle.flat_param
            if not handle.uses_sharded_strategy:  # each rank has the whole, in its own shape
                continue
            for parameter, shape, info in zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True):
                start = info.intra_param_start_idx if info.in_shard else 0
                stop = start + info.numel_in_shard if info.in_shard else 0
                ranges[parameter] = FlatRange(tuple(shape), start, stop, handle.process_group)
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"torch {torch.__version__} keeps the ranges of FSDP's parameters in another way than this package knows "
            f"({error}); shard the model with fully_shard (FSDP2)"
        ) from error
    return ranges


def _handles(module: nn.Module, flattened: Iterable[Tensor]) -> list[Any]:
    """What the wrappers of flattened parameters know of them."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    def handles_of(wrappers: Iterable[Any]) -> list[Any]:
        return [wrapper._handle for wrapper in wrappers if wrapper._handle is not None]

    handles = handles_of(FullyShardedDataParallel.fsdp_modules(module))
    missing = set(flattened).difference(*(handle.flat_param._params for handle in handles))
    if missing:
        # A framework has wrapped the model that it was given, and nothing inside knows what is around it.
        others = handles_of(o for o in gc.get_objects() if issubclass(type(o), FullyShardedDataParallel))
        around = [handle for handle in others if not missing.isdisjoint(handle.flat_param._params)]
        missing.difference_update(*(handle.flat_param._params for handle in around))
        handles += around
    if missing:
        name = next(name for name, parameter in module.named_parameters() if parameter in missing)
        raise ValueError(
            f"{name}: FSDP has flattened this parameter, and its wrapper is gone; pass the whole wrapped model to "
            "AdamMini, or shard it with fully_shard (FSDP2)"
        )
    return handles


@contextmanager
def whole_shapes(ranges: Mapping[Tensor, FlatRange]) -> Iterator[None]:
    """Give each parameter its whole shape, without memory for it, to code that reads shapes only."""
    parts = {parameter: parameter.data for parameter in ranges}
    try:
        for parameter, flat in ranges.items():
            parameter.data = parameter.new_empty(()).expand(flat.shape)
        yield
    finally:
        for parameter, part in parts.items():
            parameter.data = part


@dataclass(frozen=True)
class FlatState:
    """The state of a flattened parameter whose second moments have another shape than this rank's part.

    Args:
        number: Of the parameter in a saved state.
        part: This rank's part of the parameter, of one dimension.
        partition: Its name and blocks.
        shard: The block structure of this rank's part.
        state: The state that the optimizer keeps; None for a frozen parameter.
    """

    number: int
    part: Tensor
    partition: ParameterPartition
    shard: Shard
    state: Mapping[str, Tensor] | None

    @property
    def keys(self) -> list[str]:
        """Keys of the second moments."""
        return list(self.partition.blocks.state_shapes)


def expand_state(state_dict: dict[str, Any], flat: Iterable[FlatState], numbers: Iterable[int]) -> dict[str, Any]:
    """A state dict in which second moments of flattened parameters have one value per element, under the same keys.

    FSDP1 gathers a key from all parameters of a wrapper. So parameters that keep no such second moment, as vectors
    beside factored matrices, have one of theirs under it, which `compress_state` leaves alone.

    Args:
        state_dict: What torch's optimizers save.
        flat: Parameters whose second moments are not one value per element.
        numbers: Of all flattened parameters with a state.
    """
    state = dict(state_dict["state"])
    for one in flat:
        moments = {key: state[one.number][key] for key in one.keys}
        state[one.number] = {**state[one.number], **expand_moments(one.shard, moments, one.part)}
    seconds = {n: {key: value for key, value in state[n].items() if key.startswith("exp_avg_sq")} for n in numbers}
    keys = dict.fromkeys(key for own in seconds.values() for key in own)
    for number, own in seconds.items():
        state[number] = {**state[number], **dict.fromkeys(keys, next(iter(own.values()))), **own}
    return {**state_dict, "state": state}


def compress_state(state_dict: dict[str, Any], flat: Sequence[FlatState]) -> dict[str, Any]:
    """Undo `expand_state`; the ranks that share a parameter take part together.

    Raises:
        ValueError: A parameter's saved state comes from another optimizer or partition.
    """
    state = dict(state_dict["state"])
    for one in flat:
        if one.number in state:
            check_keys(state[one.number], one.partition.name, one.partition.blocks)
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
    """Second moments from their expanded form; each rank of a group also gets the values of blocks on other ranks."""
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
