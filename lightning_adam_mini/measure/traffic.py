"""Bytes that a step of an optimizer has to move, and simple calls that show what the machine moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["add_of_bytes", "copy_of_bytes", "step_traffic_bytes", "stored_state_bytes"]


def stored_state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the tensors that hold an optimizer's state in this process; of quantized states, what they are made of.

    `optimizer_state_bytes` counts what the tensors stand for: a sharded one whole, a quantized one as it seems.
    """
    values = (value for state in optimizer.state.values() for value in _tensors(state))
    return sum(map(_num_bytes, values))


def step_traffic_bytes(parameters: Iterable[Tensor], state_bytes: int) -> int:
    """The least a step can move: parameters and state are read and written once, gradients are read once.

    AdamW moves 28 bytes for each float32 parameter, seven streams; Adam-mini about 20, five streams.

    Args:
        parameters: What the optimizer updates, of sharded ones this rank's part; those without gradient are left
            alone.
        state_bytes: Bytes of its state.
    """
    updated = [(p, p.grad) for p in parameters if p.grad is not None]
    return sum(2 * _num_bytes(p) + _num_bytes(grad) for p, grad in updated) + 2 * state_bytes


def copy_of_bytes(num_bytes: int, device: torch.device) -> Callable[[], object]:
    """A copy of one tensor of `num_bytes` to another, which moves twice as many."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def add_of_bytes(num_bytes: int, device: torch.device) -> Callable[[], object]:
    """An addition in place of two tensors of `num_bytes`, which moves three times as many.

    A CPU reads what a copy overwrites before it writes it, so that a copy moves more than its two tensors. A step, as
    this, overwrites what it has read.
    """
    total, other = torch.zeros(num_bytes // 4, device=device), torch.ones(num_bytes // 4, device=device)
    return lambda: total.add_(other)


def _num_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor in this process."""
    return sum(plain.numel() * plain.element_size() for plain in _plain(tensor))


def _tensors(state: object) -> Iterator[Tensor]:
    """Tensors of a state, which some optimizers keep in lists or dictionaries."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors(value)


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The ordinary tensors that one of a subclass, such as a quantized one, is made of."""
    subclassed: Any = tensor
    if not is_traceable_wrapper_subclass(subclassed):
        yield tensor
        return
    names, _ = subclassed.__tensor_flatten__()
    for name in names:
        if isinstance(part := getattr(tensor, name), Tensor):  # a DTensor names its mesh too
            yield from _plain(part)
