"""Seeds that depend on a position alone: the seed of a run and where in it something is drawn."""

from __future__ import annotations

from hashlib import blake2b

__all__ = ["seed_of"]


def seed_of(*position: int | str) -> int:
    """A seed of 64 bits for a generator of torch, another one for each position."""
    return int.from_bytes(blake2b(repr(position).encode(), digest_size=8).digest())
