"""The scalars of one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

from torch import Tensor

__all__ = ["StepOptions"]


@dataclass(frozen=True)
class StepOptions:
    """The scalars of one step of a parameter group.

    Args:
        lr: Learning rate of this step; a tensor only if the step is capturable.
        beta1: Decay rate of the first moment.
        beta2: Decay rate of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay coefficient.
        maximize: Ascend instead of descend.
    """

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool = False

    @property
    def shrink(self) -> float | Tensor:
        """Factor of weight decay."""
        return 1 - self.lr * self.weight_decay

    @overload
    def step_size(self, step: float) -> float | Tensor: ...

    @overload
    def step_size(self, step: Tensor) -> Tensor: ...

    def step_size(self, step: float | Tensor) -> float | Tensor:
        """Learning rate over the bias correction of the first moment.

        Args:
            step: Number of the step, 1 for the first.
        """
        return self.lr / (1 - self.beta1**step)

    @overload
    def root(self, step: float) -> float: ...

    @overload
    def root(self, step: Tensor) -> Tensor: ...

    def root(self, step: float | Tensor) -> float | Tensor:
        """Root of the bias correction of the second moment.

        Args:
            step: Number of the step, 1 for the first.
        """
        return (1 - self.beta2**step) ** 0.5
