"""The most memory that a forward and backward pass needs beside parameters and gradients, without having it.

Operations run on fake tensors, which have shapes and no content. What each of them makes is counted while it lives:
what the backward pass waits for, what a checkpointed block computes again, logits and their gradients.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveMemory", "activation_peak"]


class LiveMemory(TorchDispatchMode):
    """Bytes of the storages that operations made under this mode and that still live, and their peak.

    Args:
        known: Tensors whose storages are not counted, such as parameters: views of them are made by operations too.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._alive = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._alive:
            return
        self._alive.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, storage._cdata, storage.nbytes())

    def _release(self, number: int, num_bytes: int) -> None:
        self._alive.discard(number)
        self.live -= num_bytes


def activation_peak(model: nn.Module, loss: Callable[[], Tensor], inputs: Iterable[Tensor] = ()) -> int:
    """Peak bytes of a forward and backward pass, without parameters, buffers and whole gradients.

    Gradients are let go as they are complete, so that the peak is what comes on top of them where they are kept, as
    over the micro-batches of a step.

    Args:
        model: The model; on fake tensors, within their mode, nothing is computed.
        loss: Computes the loss.
        inputs: Tensors that are there before, which are not counted.
    """

    def let_go(parameter: Tensor) -> None:
        parameter.grad = None

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [parameter.register_post_accumulate_grad_hook(let_go) for parameter in trained]
    try:
        with LiveMemory([*model.parameters(), *model.buffers(), *inputs]) as memory:
            loss().backward()
    finally:
        for handle in handles:
            handle.remove()
    return memory.peak
