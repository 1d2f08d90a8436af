"""Batches as the model takes them: on its device, and in its dtype where that was changed for the Hessian."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["place", "tensors_of"]


def place(batch: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """A batch with its tensors on `device` and its floating-point ones in `dtype`.

    Tensors are found in mappings, lists, tuples, dataclasses, and objects with an `apply` such as a graph of PyTorch
    Geometric. Other objects pass as they are. Nothing of the batch is changed in place.

    Args:
        batch: Whatever the loss function takes.
        device: Of the model.
        dtype: None leaves floating-point tensors in theirs.
    """
    match batch:
        case Tensor():
            return batch.to(device, dtype if batch.is_floating_point() else None)
        case dict():
            return {key: place(value, device, dtype) for key, value in batch.items()}
        case Mapping():
            placed = copy.copy(batch)
            for key, value in batch.items():
                placed[key] = place(value, device, dtype)  # type: ignore[index]
            return placed
        case tuple() if hasattr(batch, "_fields"):
            return type(batch)(*(place(value, device, dtype) for value in batch))
        case list() | tuple():
            return type(batch)(place(value, device, dtype) for value in batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **{f.name: place(getattr(batch, f.name), device, dtype) for f in fields(batch) if f.init})
    if callable(getattr(batch, "apply", None)):
        return copy.copy(batch).apply(lambda value: place(value, device, dtype))
    return batch


def tensors_of(batch: Any) -> list[Tensor]:
    """The tensors that `place` finds in a batch, in order."""
    match batch:
        case Tensor():
            return [batch]
        case Mapping():
            return [tensor for value in batch.values() for tensor in tensors_of(value)]
        case list() | tuple():
            return [tensor for value in batch for tensor in tensors_of(value)]
    if is_dataclass(batch) and not isinstance(batch, type):
        return [tensor for f in fields(batch) for tensor in tensors_of(getattr(batch, f.name))]
    found: list[Tensor] = []
    if callable(getattr(batch, "apply", None)):

        def note(value: Tensor) -> Tensor:
            found.append(value)
            return value

        copy.copy(batch).apply(note)
    return found
