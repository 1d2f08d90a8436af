"""Kernels without second derivatives: attention runs on one that has them, and others are told by name."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

__all__ = ["AttentionSpy", "check_functions", "twice_differentiable"]

_logger = logging.getLogger(__name__)

# Where the wrapper lives that once_differentiable puts around a backward pass.
_ONCE_FILE = once_differentiable.__code__.co_filename
# How torch says that an operation cannot be differentiated twice.
_REFUSALS = ("derivative for", "double backward", "does not support double", "CompiledFunction")


class AttentionSpy(TorchFunctionMode):
    """Notes whether `scaled_dot_product_attention` is called while this is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call through."""
        self.seen = self.seen or func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))

    def tell(self) -> None:
        """Log what was switched, if attention was seen."""
        if self.seen:
            _logger.info(
                "scaled_dot_product_attention runs on torch's math kernel here: flash, memory-efficient and cuDNN "
                "attention have no second derivatives. Attention matrices take batch x heads x length^2 elements."
            )


def check_functions(loss: Tensor) -> None:
    """Refuse operations whose second derivatives torch would leave out of a product without an error.

    A custom function that is marked `once_differentiable` raises only where its gradient is differentiated directly;
    with chosen inputs autograd skips it, and the product lacks its part.

    Raises:
        ValueError: Such a function is in the loss's graph.
    """
    stack: list[Any] = [loss.grad_fn]
    seen: set[Any] = {None}
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        stack.extend(following for following, _ in node.next_functions)
        function = getattr(node, "_forward_cls", None)
        if function is None:
            continue
        if getattr(getattr(function.backward, "__code__", None), "co_filename", "") == _ONCE_FILE:
            raise ValueError(
                f"{function.__name__} has no second derivative (once_differentiable), which Hessian-vector products "
                "need; use its plain PyTorch form"
            )
        warnings.warn(
            f"{function.__name__} is a custom function: the Hessian is right only if its backward pass is made of "
            "operations that autograd can differentiate; if not, use its plain PyTorch form",
            stacklevel=2,
        )


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Attention on torch's math kernel, and a clear error where another operation has no second derivative.

    Raises:
        ValueError: An operation of the model has no second derivative.
    """
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        if any(refusal in str(error) for refusal in _REFUSALS):
            raise ValueError(
                "an operation of the model has no second derivative, which Hessian-vector products need; use its plain "
                f"PyTorch form (attn_implementation='eager', no compiled, fused or cuDNN kernel): {error}"
            ) from error
        raise
