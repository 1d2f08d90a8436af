"""One rank of a model that FSDP2 shards over many, alone: collectives return at once, and nothing is sent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from lightning_adam_mini.optim.distributed import local

from ...tasks.parallel.sharding import shard_model
from .models import WEIGHT_STD

__all__ = ["one_of_ranks", "shard_with_memory"]


@contextmanager
def one_of_ranks(ranks: int) -> Iterator[None]:
    """A process group in which this is the first of `ranks`, and the others do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if ranks == 1:
        yield
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def shard_with_memory(model: nn.Module, ranks: int, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Shard an outline as FSDP2 does, and give this rank's part memory and random content.

    Args:
        model: A model on the meta device; it is changed in place.
        ranks: Ranks of the process group.
        device: Where the tensors shall lie.
        dtype: Dtype of floating-point parameters; their own by default.
    """
    from torch.distributed.device_mesh import init_device_mesh

    if dtype is not None:
        model.to(dtype)
    shard_model(model, init_device_mesh(device.type, (ranks,)))
    model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            local(parameter).normal_(0.0, WEIGHT_STD)
        for buffer in model.buffers():
            buffer.zero_()
