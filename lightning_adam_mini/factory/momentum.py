"""Optimizers with a momentum and no second moment: SGD, Lion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_adam_mini.factory.base import OptimizerFactory, from_pytorch_optimizer

__all__ = ["SGD", "Lion"]


@dataclass(frozen=True, kw_only=True)
class SGD(OptimizerFactory):
    """Stochastic gradient descent with momentum, torch's, with weight decay as an L2 term of the gradient.

    Its learning rate is 10 to 1000 times AdamW's.

    Args:
        lr: Peak learning rate.
        weight_decay: Coefficient of the L2 term.
        momentum: Momentum coefficient; the buffer sums gradients and does not average them.
        nesterov: Use Nesterov's momentum; needs a momentum above 0.
    """

    lr: float = 0.1
    weight_decay: float = 1e-4
    momentum: float = 0.9
    nesterov: bool = False

    decoupled_weight_decay: ClassVar[bool] = False
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """See `OptimizerFactory.__post_init__`."""
        super().__post_init__()
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0; set momentum, or nesterov to false")

    def build(self, module: nn.Module) -> Optimizer:
        """See `OptimizerFactory.build`."""
        return torch.optim.SGD(
            self.groups(module), lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, weight_decay=0.0
        )

    def predict_state_bytes(self, module: nn.Module) -> int:
        """See `OptimizerFactory.predict_state_bytes`: the momentum, where there is one."""
        return sum(p.numel() * p.element_size() for p in self.parameters(module)) if self.momentum else 0


@dataclass(frozen=True, kw_only=True)
class Lion(OptimizerFactory):
    """Lion (Chen et al. 2023, Alg. 2), pytorch-optimizer's.

    Its learning rate is a tenth to a third of AdamW's, its weight decay 3 to 10 times AdamW's (Sec. 5).

    Args:
        lr: Peak learning rate.
        betas: Decay rates of the interpolation and of the momentum.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)

    elementwise: ClassVar[bool] = True

    def build(self, module: nn.Module) -> Optimizer:
        """See `OptimizerFactory.build`."""
        return from_pytorch_optimizer("Lion")(self.groups(module), lr=self.lr, betas=self.betas)

    def predict_state_bytes(self, module: nn.Module) -> int:
        """See `OptimizerFactory.predict_state_bytes`: the momentum."""
        return sum(p.numel() * p.element_size() for p in self.parameters(module))
