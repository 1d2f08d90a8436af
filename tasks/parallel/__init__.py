"""Training of one model by several processes: strategies of Lightning, and how a network is divided for them."""

from .strategies import FSDP2, HSDP

__all__ = ["FSDP2", "HSDP"]
