"""SM3-II: Adagrad with one accumulator for each index of each axis."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_adam_mini.factory.rules.tensorwise import TensorwiseOptimizer

__all__ = ["SM3"]


class SM3(TensorwiseOptimizer):
    r"""SM3-II with the slices of each axis as its cover, momentum, and decoupled weight decay.

    .. math::
        \nu(i) = \min_{r \ni i} \mu(r) + g(i)^2, \qquad
        \mu(r) \leftarrow \max_{i \in r} \nu(i), \qquad u = g / \sqrt\nu

    .. math::
        m \leftarrow \beta m + (1-\beta) u, \qquad p \leftarrow p - \eta\lambda p - \eta m

    with 0/0 = 0 (Anil et al. 2019, "Memory-Efficient Adaptive Optimization", Algorithm SM3-II). A number alone
    has one accumulator, as in Adagrad.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        momentum: Decay rate of the average of updates; 0 keeps none.
        weight_decay: Coefficient of decoupled weight decay.
    """

    def __init__(self, params: ParamsT, lr: float, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def update_(self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """See `TensorwiseOptimizer.update_`."""
        keys = [f"accumulator_{axis}" for axis in range(max(param.ndim, 1))]
        momentum = group["momentum"]
        if keys[0] not in state:
            for axis, key in enumerate(keys):
                state[key] = grad.new_zeros([size if axis == n else 1 for n, size in enumerate(param.shape)])
            if momentum:
                state["exp_avg"] = torch.zeros_like(param)

        sums = reduce(torch.minimum, (state[key] for key in keys)) + grad.square()
        for axis, key in enumerate(keys):
            others = [n for n in range(param.ndim) if n != axis]
            state[key].copy_(sums.amax(others, keepdim=True) if others else sums)
        # A sum of zero belongs to gradients of zero: any finite factor gives 0.
        update = sums.clamp_min_(torch.finfo(sums.dtype).tiny).rsqrt_().mul_(grad)
        if momentum:
            update = state["exp_avg"].lerp_(update, 1 - momentum)
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.sub_(update * group["lr"])
