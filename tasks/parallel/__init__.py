"""Training on several ranks: Lightning strategies, and how a network is sharded for them."""

from .strategies import FSDP2, HSDP

__all__ = ["FSDP2", "HSDP"]
