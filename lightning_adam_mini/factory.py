"""Optimizer factories: one frozen dataclass an optimizer, which builds it for any module.

Adding an optimizer is adding one dataclass. Every field is an option of the command line, and unknown options raise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_adam_mini import optim
from lightning_adam_mini.optim.groups import WeightDecayPolicy, decay_groups
from lightning_adam_mini.partition import partition_module

__all__ = ["SGD", "Adafactor", "Adam", "AdamMini", "AdamW", "Lion", "OptimizerFactory"]

PartitionName = Literal["auto", "transformer", "transformer_early", "transformer_rank_one", "default", "element"]
CutName = Literal["head", "row", "whole", "element", "row_column"]


@dataclass(frozen=True, kw_only=True)
class OptimizerFactory(ABC):
    """Options that all optimizers share.

    Args:
        lr: Peak learning rate, which the schedule scales.
        weight_decay: Weight decay coefficient.
        weight_decay_policy: `matrices` spares biases, norm scales and other vectors; `all` spares nothing.
    """

    lr: float = 3e-4
    weight_decay: float = 0.1
    weight_decay_policy: WeightDecayPolicy = "matrices"

    def __post_init__(self) -> None:
        """Reject values that every optimizer would reject, before any model is built."""
        if not 0.0 <= self.lr < float("inf"):
            raise ValueError(f"lr must be a finite number of at least 0, not {self.lr}")
        if not 0.0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay must be a finite number of at least 0, not {self.weight_decay}")
        betas = getattr(self, "betas", ())
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), not {tuple(betas)}")
        eps = getattr(self, "eps", 0.0)
        if not 0.0 <= eps < float("inf"):
            raise ValueError(f"eps must be a finite number of at least 0, not {eps}")

    @abstractmethod
    def build(self, module: nn.Module) -> Optimizer:
        """Build the optimizer over the trainable parameters of `module`, in a group that decays and one that does not.

        Raises:
            ValueError: The options do not fit the module.
        """

    def groups(self, module: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups of a module for optimizers that know no blocks."""
        roles = partition_module(module, "element")
        trainable = [(p, roles[name]) for name, p in module.named_parameters() if p.requires_grad]
        if not trainable:
            raise ValueError("no parameter requires a gradient: all are frozen")
        return decay_groups(trainable, weight_decay=self.weight_decay, policy=self.weight_decay_policy)


@dataclass(frozen=True, kw_only=True)
class AdamMini(OptimizerFactory):
    """Adam-mini: AdamW with one second moment a block, half of AdamW's memory.

    Args:
        betas: Decay rates of the first and second moment.
        eps: Added to the root of the second moment.
        partition: How parameters are cut into blocks: `auto` (`transformer` for models that look tokens up or attend
            over them, else `default`), `transformer`, `transformer_early`, `transformer_rank_one`, `default` or
            `element`.
        partition_overrides: Cuts by role, parameter name or `re:` pattern: `head`, `row`, `whole`, `element` or
            `row_column`. The first that matches wins.
        partition_layouts: Names of layouts by the class of a module that the library does not know, such as
            `{my_package.Attention: fused_per_head}`.
        exp_avg_dtype: Dtype of the first moment; the parameter's by default.
        implementation: `reference`, `foreach`, or None to choose.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    partition: PartitionName = "auto"
    partition_overrides: dict[str, CutName] = field(default_factory=dict)
    partition_layouts: dict[str, str] = field(default_factory=dict)
    exp_avg_dtype: Literal["float32", "bfloat16"] | None = None
    implementation: Literal["reference", "foreach"] | None = None

    def build(self, module: nn.Module) -> optim.AdamMini:
        """See `OptimizerFactory.build`."""
        return optim.AdamMini(
            module,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            partition=self.partition,
            partition_overrides=self.partition_overrides,
            partition_layouts=self.partition_layouts,
            weight_decay_policy=self.weight_decay_policy,
            exp_avg_dtype=getattr(torch, self.exp_avg_dtype) if self.exp_avg_dtype else None,
            implementation=self.implementation,
        )


@dataclass(frozen=True, kw_only=True)
class AdamW(OptimizerFactory):
    """AdamW (Loshchilov and Hutter 2019), torch's.

    Args:
        betas: Decay rates of the first and second moment.
        eps: Added to the root of the second moment.
        fused: Use torch's fused kernel; torch chooses by default.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    fused: bool | None = None

    def build(self, module: nn.Module) -> Optimizer:
        """See `OptimizerFactory.build`."""
        return torch.optim.AdamW(
            self.groups(module), lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=0.0, fused=self.fused
        )


@dataclass(frozen=True, kw_only=True)
class Adam(OptimizerFactory):
    """Adam (Kingma and Ba 2015), torch's, with weight decay as an L2 term of the gradient.

    Args:
        weight_decay: Coefficient of the L2 term.
        betas: Decay rates of the first and second moment.
        eps: Added to the root of the second moment.
        fused: Use torch's fused kernel; torch chooses by default.
    """

    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    fused: bool | None = None

    def build(self, module: nn.Module) -> Optimizer:
        """See `OptimizerFactory.build`."""
        return torch.optim.Adam(
            self.groups(module), lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=0.0, fused=self.fused
        )


@dataclass(frozen=True, kw_only=True)
class SGD(OptimizerFactory):
    """Stochastic gradient descent with momentum, torch's, with weight decay as an L2 term of the gradient.

    Args:
        weight_decay: Coefficient of the L2 term.
        momentum: Momentum coefficient; the buffer sums gradients and does not average them.
        nesterov: Use Nesterov's momentum.
    """

    weight_decay: float = 1e-4
    momentum: float = 0.9
    nesterov: bool = False

    def build(self, module: nn.Module) -> Optimizer:
        """See `OptimizerFactory.build`."""
        return torch.optim.SGD(
            self.groups(module), lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, weight_decay=0.0
        )


@dataclass(frozen=True, kw_only=True)
class Adafactor(OptimizerFactory):
    """Adafactor (Shazeer and Stern 2018) with momentum, pytorch-optimizer's.

    torch's own has neither momentum nor a way to follow an external learning rate, both of which comparisons need.

    Args:
        beta1: Decay rate of the first moment of the clipped and scaled updates.
        clip_threshold: Root mean square at which updates are clipped.
        decay_rate: Exponent of the decay of the second moment.
        relative_step: Compute the step size from the step count and ignore `lr` and the schedule, as released.
        scale_parameter: Scale the step size by the root mean square of the parameter.
        warmup_init: Start the relative step size small.
    """

    beta1: float = 0.9
    clip_threshold: float = 1.0
    decay_rate: float = -0.8
    relative_step: bool = False
    scale_parameter: bool = False
    warmup_init: bool = False

    def build(self, module: nn.Module) -> Optimizer:
        """See `OptimizerFactory.build`."""
        return _pytorch_optimizer("AdaFactor")(
            self.groups(module),
            lr=self.lr,
            betas=(self.beta1, 0.999),
            decay_rate=self.decay_rate,
            clip_threshold=self.clip_threshold,
            relative_step=self.relative_step,
            scale_parameter=self.scale_parameter,
            warmup_init=self.warmup_init,
            momentum_dtype=torch.float32,
        )


@dataclass(frozen=True, kw_only=True)
class Lion(OptimizerFactory):
    """Lion (Chen et al. 2023), pytorch-optimizer's. Its learning rate is a third to a tenth of AdamW's.

    Args:
        betas: Decay rates of the interpolation and of the momentum.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)

    def build(self, module: nn.Module) -> Optimizer:
        """See `OptimizerFactory.build`."""
        return _pytorch_optimizer("Lion")(self.groups(module), lr=self.lr, betas=self.betas)


def _pytorch_optimizer(name: str) -> Callable[..., Optimizer]:
    """A class of the package pytorch-optimizer, which extras install."""
    try:
        import pytorch_optimizer
    except ImportError as error:
        raise ValueError(
            f"{name} needs the package pytorch-optimizer; install it with pip install 'lightning-adam-mini[app]'"
        ) from error
    return getattr(pytorch_optimizer, name)
