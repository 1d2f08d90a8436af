"""Optimizers that scale the step by norms of whole tensors: LAMB, NovoGrad."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.optim import Optimizer

from lightning_adam_mini.factory import rules
from lightning_adam_mini.factory.adam import STEP_BYTES, adam_state_bytes
from lightning_adam_mini.factory.base import OptimizerFactory

__all__ = ["LAMB", "NovoGrad"]


@dataclass(frozen=True, kw_only=True)
class LAMB(OptimizerFactory):
    """LAMB (You et al. 2020, Alg. 2), ours.

    It takes AdamW's learning rate in the Adam-mini paper. A step moves a tensor by `lr` times its norm, where AdamW
    moves each element by about `lr`: tensors with elements of 0.02 want 50 times AdamW's for the same step.

    Args:
        betas: Decay rates of the first and second moment.
        eps: Added to the root of the second moment.
        bias_correction: Correct both moments for their start at zero, as in the paper; torch_optimizer does not.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    bias_correction: bool = True

    def build(self, module: nn.Module) -> Optimizer:
        """See `OptimizerFactory.build`."""
        return rules.LAMB(
            self.groups(module), lr=self.lr, betas=self.betas, eps=self.eps, bias_correction=self.bias_correction
        )

    def predict_state_bytes(self, module: nn.Module) -> int:
        """See `OptimizerFactory.predict_state_bytes`: two moments of each parameter."""
        return sum(adam_state_bytes(parameter) for parameter in self.parameters(module))


@dataclass(frozen=True, kw_only=True)
class NovoGrad(OptimizerFactory):
    """NovoGrad (Ginsburg et al. 2019, Alg. 1), ours.

    Its learning rate is 10 to 100 times AdamW's. Decay is added to the normalised gradient and summed by the momentum:
    a step shrinks a weight by `lr * weight_decay / (1 - beta1)`, so AdamW's value does not fit.

    Args:
        lr: Peak learning rate.
        weight_decay: Weight decay coefficient.
        betas: Decay rates of the first moment, which sums, and of the squared norm of the gradient.
        eps: Added to the norm of the gradient.
        grad_averaging: Average normalised gradients instead of summing them.
    """

    lr: float = 1e-2
    weight_decay: float = 1e-3
    betas: tuple[float, float] = (0.95, 0.98)
    eps: float = 1e-8
    grad_averaging: bool = False

    decoupled_weight_decay: ClassVar[bool] = False

    def build(self, module: nn.Module) -> Optimizer:
        """See `OptimizerFactory.build`."""
        return rules.NovoGrad(
            self.groups(module), lr=self.lr, betas=self.betas, eps=self.eps, grad_averaging=self.grad_averaging
        )

    def predict_state_bytes(self, module: nn.Module) -> int:
        """See `OptimizerFactory.predict_state_bytes`: the momentum and one number for each tensor."""
        return sum(STEP_BYTES + (p.numel() + 1) * p.element_size() for p in self.parameters(module))
