"""Memory: bytes of optimizer state, and the peak of the process or device. 1 GB is 1e9 bytes."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["adamw_state_bytes", "optimizer_state_bytes", "peak_memory_bytes"]


def optimizer_state_bytes(optimizer: Optimizer) -> int:
    """Bytes of every tensor in the state of any optimizer, as it stands; over all ranks where tensors are sharded."""
    tensors = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def adamw_state_bytes(parameters: Iterable[Tensor]) -> int:
    """Bytes that torch's AdamW keeps for parameters: two moments of their shape and dtype, and a step of 4 bytes."""
    return sum(2 * p.numel() * p.element_size() + 4 for p in parameters if p.requires_grad)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
