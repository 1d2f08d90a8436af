"""LAMB: Adam's direction, scaled to the norm of each tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_adam_mini.factory.rules.tensorwise import TensorwiseOptimizer

__all__ = ["LAMB"]


class LAMB(TensorwiseOptimizer):
    r"""LAMB with the identity as its scaling function.

    .. math::
        r = \hat m / (\sqrt{\hat v} + \epsilon) + \lambda p, \qquad p \leftarrow p - \eta \frac{\|p\|}{\|r\|} r

    (You et al. 2020, "Large Batch Optimization for Deep Learning", Algorithm 2.) The ratio is 1 where either norm is 0.
    It applies to every tensor, those without decay too.

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
        # On the device alone: no norm is read back.
        is_zero = (param_norm == 0) | (direction_norm == 0)
        ratio = torch.where(is_zero, torch.ones_like(param_norm), param_norm / direction_norm)
        param.sub_(direction.mul_(ratio).mul_(group["lr"]))
