"""BAGM: block-wise adaptive gradient descent with Nesterov momentum, a block a parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_adam_mini.factory.base import TensorwiseOptimizer

__all__ = ["BAGM"]


class BAGM(TensorwiseOptimizer):
    r"""Block-wise adaptive gradient with momentum; each parameter is one block.

    .. math::
        u \leftarrow \beta_2 u + (1-\beta_2) \operatorname{mean}(g^2), \qquad
        m' \leftarrow \beta_1 m - \eta \sqrt{1-\beta_2^t} \frac{g}{\sqrt u + \epsilon}, \qquad
        p \leftarrow p - \beta_1 m + (1 + \beta_1) m'

    Gradients are taken at weights that look ahead, `p + beta1 m` (Zheng and Kwok 2019, "Blockwise Adaptivity: Faster
    Training and Better Generalization in Deep Learning", with the details of MXNet's implementation). Beside Adam-mini:
    the momentum is of normalised gradients, has no bias correction, and sums, so that a learning rate moves weights
    `1 / (1 - beta1)` times as far.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        betas: Decay rates of the momentum and of the squared gradient.
        eps: Added to the root of the second moment.
        weight_decay: Coefficient of an L2 term of the gradient.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def update_(self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """See `TensorwiseOptimizer.update_`."""
        beta1, beta2 = group["betas"]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(param)
            state["exp_avg_sq"] = param.new_zeros(())
        momentum, mean_square = state["momentum"], state["exp_avg_sq"]
        grad = grad.add(param, alpha=group["weight_decay"])
        mean_square.lerp_(grad.square().mean(), 1 - beta2)
        lr = group["lr"] * (1 - beta2 ** float(state["step"])) ** 0.5
        param.sub_(momentum, alpha=beta1)
        momentum.mul_(beta1).sub_(grad * (lr / (mean_square.sqrt() + group["eps"])))
        param.add_(momentum, alpha=1 + beta1)
