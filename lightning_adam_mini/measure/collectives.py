"""Collective operations of a call: how many, and the bytes that this rank gives to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Collectives", "count_collectives"]


class Collectives(NamedTuple):
    """Collective operations.

    Args:
        number: How many.
        num_bytes: Bytes of the tensors that this rank gives to them.
    """

    number: int
    num_bytes: int


def count_collectives(call: Callable[[], object]) -> Collectives:
    """Count the collective operations of a call, which is made once."""
    with _Counter() as counter:
        call()
    return Collectives(counter.number, counter.num_bytes)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.number = self.num_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "wait_tensor" not in func.name():
            self.number += 1
            self.num_bytes += sum(t.numel() * t.element_size() for t in tree_leaves(args) if isinstance(t, Tensor))
        return func(*args, **(kwargs or {}))
