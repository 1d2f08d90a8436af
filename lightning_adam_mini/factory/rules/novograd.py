"""NovoGrad: momentum of gradients that are divided by a running norm of each tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_adam_mini.factory.rules.tensorwise import TensorwiseOptimizer

__all__ = ["NovoGrad"]


class NovoGrad(TensorwiseOptimizer):
    r"""NovoGrad with one second moment a tensor, the squared norm of its gradient.

    .. math::
        v \leftarrow \beta_2 v + (1-\beta_2) \|g\|^2, \qquad
        m \leftarrow \beta_1 m + \left(\frac{g}{\sqrt v + \epsilon} + \lambda p\right), \qquad p \leftarrow p - \eta m

    At the first step v is the squared norm itself, so there is no bias correction (Ginsburg et al. 2019, "Stochastic
    Gradient Methods with Layer-wise Adaptive Moments", Algorithm 1). The library pytorch-optimizer has the same rule
    but divides `grad` in place, which whoever reads gradients after a step finds changed.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        betas: Decay rates of the first moment and of the squared norm.
        eps: Added to the norm.
        weight_decay: Weight decay coefficient.
        grad_averaging: Multiply what enters the first moment by `1 - beta1`.
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
