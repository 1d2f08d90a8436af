"""Optimizers that scale the step by norms of whole tensors: LAMB, NovoGrad."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_adam_mini.factory.base import OptimizerFactory, TensorwiseOptimizer
from lightning_adam_mini.measure.memory import STEP_BYTES, adamw_state_bytes

__all__ = ["LAMB", "LAMBOptimizer", "NovoGrad", "NovoGradOptimizer"]


@dataclass(frozen=True, kw_only=True)
class LAMB(OptimizerFactory):
    """LAMB (You et al. 2020, Alg. 2), ours.

    The Adam-mini paper uses AdamW's learning rate. A step moves a tensor by `lr` times its norm, while AdamW moves each
    element by about `lr`: for elements around 0.02, the same step needs 50 times AdamW's rate.

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
        return LAMBOptimizer(
            self.groups(module), lr=self.lr, betas=self.betas, eps=self.eps, bias_correction=self.bias_correction
        )

    def predict_state_bytes(self, module: nn.Module) -> int:
        """See `OptimizerFactory.predict_state_bytes`: two moments of each parameter."""
        return adamw_state_bytes(module.parameters())


@dataclass(frozen=True, kw_only=True)
class NovoGrad(OptimizerFactory):
    """NovoGrad (Ginsburg et al. 2019, Alg. 1), ours.

    Its learning rate is 10 to 100 times AdamW's. Decay is added to the normalized gradient, and the momentum sums it: a
    step shrinks a weight by `lr * weight_decay / (1 - beta1)`, so AdamW's value does not fit.

    Args:
        lr: Peak learning rate.
        weight_decay: Weight decay coefficient.
        betas: Decay rates of the first moment, which sums, and of the squared norm of the gradient.
        eps: Added to the norm of the gradient.
        grad_averaging: Average normalized gradients instead of summing them.
    """

    lr: float = 1e-2
    weight_decay: float = 1e-3
    betas: tuple[float, float] = (0.95, 0.98)
    eps: float = 1e-8
    grad_averaging: bool = False

    decoupled_weight_decay: ClassVar[bool] = False

    def build(self, module: nn.Module) -> Optimizer:
        """See `OptimizerFactory.build`."""
        return NovoGradOptimizer(
            self.groups(module), lr=self.lr, betas=self.betas, eps=self.eps, grad_averaging=self.grad_averaging
        )

    def predict_state_bytes(self, module: nn.Module) -> int:
        """See `OptimizerFactory.predict_state_bytes`: the momentum and one number for each tensor."""
        return sum(STEP_BYTES + (p.numel() + 1) * p.element_size() for p in self.parameters(module))


class LAMBOptimizer(TensorwiseOptimizer):
    r"""LAMB with the identity as its scaling function.

    .. math::
        r = \hat m / (\sqrt{\hat v} + \epsilon) + \lambda p, \qquad p \leftarrow p - \eta \frac{\|p\|}{\|r\|} r

    (You et al. 2020, "Large Batch Optimization for Deep Learning", Algorithm 2.) The ratio is 1 where either norm is 0.
    It applies to all tensors, also those without decay.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        betas: Decay rates of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Weight decay coefficient.
        bias_correction: Correct both moments for their start at zero.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "bias_correction": bias_correction})

    def update_(self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """See `TensorwiseOptimizer.update_`."""
        beta1, beta2 = group["betas"]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        exp_avg, exp_avg_sq, step = state["exp_avg"], state["exp_avg_sq"], state["step"].item()
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        correct = group["bias_correction"]
        bias_correction1 = 1 - beta1**step if correct else 1.0
        bias_correction2 = 1 - beta2**step if correct else 1.0

        denominator = (exp_avg_sq / bias_correction2).sqrt_().add_(group["eps"])
        direction = (exp_avg / bias_correction1).div_(denominator)
        direction.add_(param, alpha=group["weight_decay"])
        param_norm, direction_norm = torch.linalg.vector_norm(param), torch.linalg.vector_norm(direction)
        # `where` keeps the norms on the device; a Python branch would wait for them.
        is_zero = (param_norm == 0) | (direction_norm == 0)
        ratio = torch.where(is_zero, torch.ones_like(param_norm), param_norm / direction_norm)
        param.sub_(direction.mul_(ratio).mul_(group["lr"]))


class NovoGradOptimizer(TensorwiseOptimizer):
    r"""NovoGrad with one second moment a tensor, the squared norm of its gradient.

    .. math::
        v \leftarrow \beta_2 v + (1-\beta_2) \|g\|^2, \qquad
        m \leftarrow \beta_1 m + \left(\frac{g}{\sqrt v + \epsilon} + \lambda p\right), \qquad p \leftarrow p - \eta m

    At the first step v is the squared norm itself, so there is no bias correction (Ginsburg et al. 2019, "Stochastic
    Gradient Methods with Layer-wise Adaptive Moments", Algorithm 1). pytorch-optimizer has the same rule but divides
    `grad` in place, so that gradients are wrong after a step.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        betas: Decay rates of the first moment and of the squared norm.
        eps: Added to the norm.
        weight_decay: Weight decay coefficient.
        grad_averaging: Multiply the direction by `1 - beta1` before it enters the first moment.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        betas: tuple[float, float] = (0.95, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        grad_averaging: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "grad_averaging": grad_averaging})

    def update_(self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """See `TensorwiseOptimizer.update_`."""
        beta1, beta2 = group["betas"]
        squared_norm = torch.linalg.vector_norm(grad).square()
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = squared_norm.clone()
        else:
            state["exp_avg_sq"].lerp_(squared_norm, 1 - beta2)
        direction = grad / (state["exp_avg_sq"].sqrt() + group["eps"])
        direction.add_(param, alpha=group["weight_decay"])
        gain = 1 - beta1 if group["grad_averaging"] else 1.0
        state["exp_avg"].mul_(beta1).add_(direction, alpha=gain)
        param.sub_(state["exp_avg"] * group["lr"])
