"""Random vectors by seed: the same for a block whatever other blocks, ranks and devices there are."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from lightning_adam_mini.hessian.vectors import draw

__all__ = ["probe", "seed_of"]


def seed_of(seed: int, name: str, number: int) -> int:
    """A seed for probe `number` of the block `name`, unrelated to those of others."""
    text = f"{seed}/{name}/{number}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest())


def probe(
    size: int, seed: int, name: str, number: int, *, dtype: torch.dtype, device: torch.device, rademacher: bool = False
) -> Tensor:
    """A random vector `(size,)` for a block: standard normal, or -1 and 1."""
    generator = torch.Generator().manual_seed(seed_of(seed, name, number))
    return draw((size,), generator, dtype, rademacher=rademacher).to(device)
