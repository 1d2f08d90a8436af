"""Optimizers with a factored second moment, a few vectors a tensor: Adafactor, CAME, SM3."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar
from warnings import warn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_adam_mini.factory.base import OptimizerFactory, TensorwiseOptimizer, from_pytorch_optimizer, require
from lightning_adam_mini.measure.memory import STEP_BYTES

__all__ = ["CAME", "SM3", "Adafactor", "SM3Optimizer"]


@dataclass(frozen=True, kw_only=True)
class Adafactor(OptimizerFactory):
    """Adafactor (Shazeer and Stern 2018, Alg. 4 and 5) with momentum, pytorch-optimizer's.

    Without `relative_step`, AdamW's learning rate fits. torch's Adafactor has no momentum, caps `lr` at the inverse
    root of the step and always scales by the parameter.

    Args:
        beta1: Decay rate of the first moment of the clipped and scaled updates; None for no first moment.
        clip_threshold: Root mean square at which updates are clipped.
        decay_rate: Exponent of the decay of the second moment, `beta2 = 1 - step**decay_rate`.
        beta2_cap: Largest decay rate of the second moment, such as 0.999 (Zhai et al. 2022); None for no cap.
        relative_step: Compute the step size from the step count and ignore `lr` and the schedule, as released.
        scale_parameter: Scale the step size by the root mean square of the parameter.
        warmup_init: Start the relative step size small.
        eps1: Added to squared gradients.
        eps2: Least root mean square of a parameter for `scale_parameter`.
    """

    beta1: float | None = 0.9
    clip_threshold: float = 1.0
    decay_rate: float = -0.8
    beta2_cap: float | None = None
    relative_step: bool = False
    scale_parameter: bool = False
    warmup_init: bool = False
    eps1: float = 1e-30
    eps2: float = 1e-3

    def __post_init__(self) -> None:
        """See `OptimizerFactory.__post_init__`."""
        super().__post_init__()
        cap = self.beta2_cap
        require(cap is None or 0.0 <= cap < 1.0, "beta2_cap", "in [0, 1) or null", cap)
        require(-math.inf < self.decay_rate < 0.0, "decay_rate", "a negative number", self.decay_rate)
        require(0.0 < self.clip_threshold < math.inf, "clip_threshold", "a positive number", self.clip_threshold)
        if self.warmup_init and not self.relative_step:
            raise ValueError("warmup_init needs relative_step: turn both on, or use the schedule's warm-up")

    def build(self, module: nn.Module) -> Optimizer:
        """See `OptimizerFactory.build`."""
        groups = self.groups(module)
        if self.relative_step:
            warn("Adafactor with relative_step computes its own step size: lr and schedule are not used", stacklevel=2)
        # The library requires a cap below 1; no run reaches this one.
        cap = math.nextafter(1.0, 0.0) if self.beta2_cap is None else self.beta2_cap
        return from_pytorch_optimizer("AdaFactor")(
            groups,
            lr=self.lr,
            betas=(self.beta1, cap),
            decay_rate=self.decay_rate,
            clip_threshold=self.clip_threshold,
            relative_step=self.relative_step,
            scale_parameter=self.scale_parameter,
            warmup_init=self.warmup_init,
            eps1=self.eps1,
            eps2=self.eps2,
            momentum_dtype=self._momentum_dtype(module),
        )

    def predict_state_bytes(self, module: nn.Module) -> int:
        """See `OptimizerFactory.predict_state_bytes`: the momentum, a row and a column mean; vectors as in AdamW."""
        parameters = self.parameters(module)
        momentum_bytes = self._momentum_dtype(module).itemsize if self.beta1 is not None else 0
        return sum(p.numel() * momentum_bytes + _factored_size(p) * p.element_size() for p in parameters)

    def _momentum_dtype(self, module: nn.Module) -> torch.dtype:
        """Float32, or the widest dtype of the parameters; the library's bfloat16 would lose small updates."""
        return reduce(torch.promote_types, {p.dtype for p in self.parameters(module)}, torch.float32)


@dataclass(frozen=True, kw_only=True)
class CAME(OptimizerFactory):
    """CAME (Luo et al. 2023, Alg. 2), pytorch-optimizer's.

    The paper's authors advise 0.5 to 0.9 times AdamW's learning rate, and a third beta in [0.99, 0.999] if the second
    is 0.95.

    Args:
        lr: Peak learning rate.
        betas: Decay rates of the first moment, of the factored second moment, and of the factored instability.
        clip_threshold: Root mean square at which updates are clipped.
        eps1: Added to squared gradients.
        eps2: Added to squared differences of update and first moment.
    """

    lr: float = 2e-4
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999)
    clip_threshold: float = 1.0
    eps1: float = 1e-30
    eps2: float = 1e-16

    num_betas: ClassVar[int] = 3

    def __post_init__(self) -> None:
        """See `OptimizerFactory.__post_init__`."""
        super().__post_init__()
        require(0.0 < self.clip_threshold < math.inf, "clip_threshold", "a positive number", self.clip_threshold)

    def build(self, module: nn.Module) -> Optimizer:
        """See `OptimizerFactory.build`."""
        return from_pytorch_optimizer("CAME")(
            self.groups(module),
            lr=self.lr,
            betas=self.betas,
            clip_threshold=self.clip_threshold,
            eps1=self.eps1,
            eps2=self.eps2,
        )

    def predict_state_bytes(self, module: nn.Module) -> int:
        """See `OptimizerFactory.predict_state_bytes`: the momentum and two pairs of a row and a column mean."""
        return sum(self._state_size(p) * p.element_size() for p in self.parameters(module))

    @staticmethod
    def _state_size(parameter: nn.Parameter) -> int:
        """Numbers of the state, among them the RMS of the parameter, which the library stores and never reads."""
        pairs = 2 if parameter.ndim >= 2 else 1
        return parameter.numel() + pairs * _factored_size(parameter) + 1


@dataclass(frozen=True, kw_only=True)
class SM3(OptimizerFactory):
    """SM3-II (Anil et al. 2019) with momentum and, beyond the paper, decoupled weight decay; ours.

    The Adam-mini paper uses AdamW's learning rate. The accumulators sum squares, so steps shrink with the inverse root
    of the step count, as in Adagrad; 10 to 100 times AdamW's rate is more usual.

    Args:
        weight_decay: Coefficient of decoupled weight decay; the paper has none.
        momentum: Decay rate of the average of updates; 0 for none.
    """

    weight_decay: float = 0.0
    momentum: float = 0.9

    def build(self, module: nn.Module) -> Optimizer:
        """See `OptimizerFactory.build`."""
        return SM3Optimizer(self.groups(module), lr=self.lr, momentum=self.momentum)

    def predict_state_bytes(self, module: nn.Module) -> int:
        """See `OptimizerFactory.predict_state_bytes`: the momentum and an accumulator for each index of each axis."""
        return sum(
            STEP_BYTES + (p.numel() * bool(self.momentum) + (sum(p.shape) if p.ndim else 1)) * p.element_size()
            for p in self.parameters(module)
        )


def _factored_size(parameter: nn.Parameter) -> int:
    """Numbers of a second moment that is factored over the last two dimensions; vectors and scalars keep a full one."""
    shape = parameter.shape
    if len(shape) < 2:
        return parameter.numel()
    return math.prod(shape[:-2]) * (shape[-2] + shape[-1])


class SM3Optimizer(TensorwiseOptimizer):
    r"""SM3-II with the slices of each axis as its cover, momentum, and decoupled weight decay.

    .. math::
        \nu(i) = \min_{r \ni i} \mu(r) + g(i)^2, \qquad
        \mu(r) \leftarrow \max_{i \in r} \nu(i), \qquad u = g / \sqrt\nu

    .. math::
        m \leftarrow \beta m + (1-\beta) u, \qquad p \leftarrow p - \eta\lambda p - \eta m

    with 0/0 = 0 (Anil et al. 2019, "Memory-Efficient Adaptive Optimization", Algorithm SM3-II). A scalar has one
    accumulator, as in Adagrad.

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
        # Where the sum is zero, the gradient is too: any finite factor gives 0.
        update = sums.clamp_min_(torch.finfo(sums.dtype).tiny).rsqrt_().mul_(grad)
        if momentum:
            update = state["exp_avg"].lerp_(update, 1 - momentum)
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.sub_(update * group["lr"])
