"""The steps of rules that no library has right: a closure first, then one tensor after another."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["RuleOptimizer", "TensorwiseOptimizer"]


class RuleOptimizer(Optimizer):
    """An optimizer of which a subclass writes the step without its closure."""

    @abstractmethod
    def update_all_(self) -> None:
        """Update every parameter that has a gradient; gradients are off."""

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update_all_()
        return loss


class TensorwiseOptimizer(RuleOptimizer):
    """An optimizer of which a subclass writes the update of one tensor.

    Each parameter counts its own steps, as `state["step"]` (float32, on the CPU).
    """

    @abstractmethod
    def update_(self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Update a parameter and its state in place; the gradient stays as it is.

        Args:
            param: The parameter.
            grad: Its gradient, of the same shape.
            state: Its state, with nothing but `step` (1) at its first step.
            group: The options of its group.
        """

    def update_all_(self) -> None:
        """See `RuleOptimizer.update_all_`."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None or not param.numel():
                    continue
                state = self.state[param]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
                state["step"] += 1
                self.update_(param, param.grad, state, group)
