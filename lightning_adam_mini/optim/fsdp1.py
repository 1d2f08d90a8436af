"""FullyShardedDataParallel, the first FSDP: ranges of flattened parameters.

It flattens the parameters of each wrapped module into one vector and gives each rank a range of it, so that a rank's
part of a matrix may begin and end in the middle of a row. With `use_orig_params=True` the optimizer sees these parts as
one-dimensional parameters. Which elements they are is known to the wrapper alone, in private attributes of torch: they
are read here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_adam_mini.blocks import Blocks, Kind
from lightning_adam_mini.optim.distributed import is_flat_vector, is_flattened
from lightning_adam_mini.optim.shards import Shard, flat_boxes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["FlatRange", "flat_ranges", "whole_shapes"]


@dataclass(frozen=True)
class FlatRange:
    """The elements of a flattened parameter that lie on this rank.

    Args:
        shape: Shape of the whole parameter.
        start: The first element.
        stop: The element after the last.
        group: The ranks that hold the others.
    """

    shape: tuple[int, ...]
    start: int
    stop: int
    group: ProcessGroup

    def shard(self, blocks: Blocks, device_type: str) -> Shard:
        """This rank's part of the parameter, of which it keeps the whole second moment unless that is element-wise."""
        if blocks.kind is Kind.ELEMENT:
            return Shard(Blocks.element((self.stop - self.start,)))
        groups = (self.group,) if dist.get_world_size(self.group) > 1 else ()
        return Shard(blocks, flat_boxes(self.shape, self.start, self.stop), groups, device_type)


def flat_ranges(module: nn.Module) -> dict[Tensor, FlatRange]:
    """The ranges of all parameters of a model that FSDP has flattened; none where it is not wrapped.

    Args:
        module: The model, wrapped.

    Raises:
        ValueError: The wrapper was made without `use_orig_params=True`, `module` is a part of the wrapped model that
            does not hold the wrapper of all its parameters, or torch has other attributes than expected.
    """
    if any(is_flat_vector(p) for p in module.parameters()):
        raise ValueError(
            "FSDP shows the optimizer flat parameters, which hide the blocks: wrap the model with "
            "FullyShardedDataParallel(model, use_orig_params=True), or shard it with fully_shard (FSDP2)"
        )
    flattened = [name for name, p in module.named_parameters() if is_flattened(p)]
    if not flattened:
        return {}
    from torch.distributed.fsdp import FullyShardedDataParallel

    ranges: dict[Tensor, FlatRange] = {}
    found: set[Tensor] = set()
    try:
        for wrapper in FullyShardedDataParallel.fsdp_modules(module):
            handle = wrapper._handle
            if handle is None:
                continue
            flat: Any = handle.flat_param
            found.update(flat._params)
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
    lost = [name for name, p in module.named_parameters() if is_flattened(p) and p not in found]
    if lost:
        raise ValueError(
            f"{lost[0]}: FSDP has flattened this parameter, and its wrapper lies outside of the module given; pass the "
            "whole wrapped model to AdamMini, or shard it with fully_shard (FSDP2)"
        )
    return ranges


@contextmanager
def whole_shapes(ranges: Mapping[Tensor, FlatRange]) -> Iterator[None]:
    """Show each parameter in its whole shape, without memory for it, to whoever looks at shapes alone."""
    parts = {parameter: parameter.data for parameter in ranges}
    try:
        for parameter, flat in ranges.items():
            parameter.data = parameter.new_empty(()).expand(flat.shape)
        yield
    finally:
        for parameter, part in parts.items():
            parameter.data = part
