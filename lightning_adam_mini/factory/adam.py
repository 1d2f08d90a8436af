"""Adam and its variants: Adam-mini, AdamW, Adam."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_adam_mini import optim
from lightning_adam_mini.factory.base import OptimizerFactory
from lightning_adam_mini.measure.memory import adam_mini_state_bytes, adamw_state_bytes
from lightning_adam_mini.optim.dispatch import Implementation
from lightning_adam_mini.partition import partition_module

__all__ = ["Adam", "AdamMini", "AdamW", "PartitionName", "StructureName"]

PartitionName = Literal["auto", "transformer", "transformer_early", "factored", "slimadam", "default", "element"]
StructureName = Literal["head", "row", "column", "whole", "element", "factored"]


@dataclass(frozen=True, kw_only=True)
class AdamMini(OptimizerFactory):
    """Adam-mini: AdamW with one second moment a block, half of AdamW's memory. It takes AdamW's learning rate.

    Args:
        betas: Decay rates of the first and second moment.
        eps: Added to the root of the second moment.
        partition: The strategy that chooses blocks: `auto` (`transformer` for models that look up tokens or attend
            over them, else `default`), `transformer`, `transformer_early`, `factored`, `slimadam`, `default` or
            `element`.
        partition_overrides: Block structures by role, parameter name or `re:` pattern: `head`, `row`, `column`,
            `whole`, `element` or `factored`. The first that matches wins.
        partition_layouts: Names of layouts by module class, for classes that the library does not know, such as
            `{my_package.Attention: fused_per_head}`.
        exp_avg_dtype: Dtype of the first moment; the parameter's by default. `uint8` keeps matrices of 4096 elements or
            more in 8 bits.
        stochastic_rounding: Round bfloat16 values at random and unbiased; for `bf16-true`, or with `exp_avg_dtype`
            bfloat16.
        implementation: `reference`, `foreach`, `fused` (kernels), or None to choose.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    partition: PartitionName = "auto"
    partition_overrides: dict[str, StructureName] = field(default_factory=dict)
    partition_layouts: dict[str, str] = field(default_factory=dict)
    exp_avg_dtype: Literal["float32", "bfloat16", "uint8"] | None = None
    stochastic_rounding: bool = False
    implementation: Implementation | None = None

    def build(self, module: nn.Module) -> optim.AdamMini:
        """See `OptimizerFactory.build`."""
        self.refuse_frozen(module)
        self.refuse_sparse_gradients(module)
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
            exp_avg_dtype=self._exp_avg_dtype(),
            stochastic_rounding=self.stochastic_rounding,
            implementation=self.implementation,
        )

    def predict_state_bytes(self, module: nn.Module) -> int:
        """See `OptimizerFactory.predict_state_bytes`: a first moment of each parameter and a second of each block."""
        partition = partition_module(module, self.partition, self.partition_overrides, self.partition_layouts)
        return sum(
            adam_mini_state_bytes(parameter, partition[name].blocks, self._exp_avg_dtype())
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        )

    def _exp_avg_dtype(self) -> torch.dtype | None:
        return getattr(torch, self.exp_avg_dtype) if self.exp_avg_dtype else None


@dataclass(frozen=True, kw_only=True)
class AdamW(OptimizerFactory):
    """AdamW (Loshchilov and Hutter 2019, Alg. 2), torch's.

    Args:
        betas: Decay rates of the first and second moment.
        eps: Added to the root of the second moment.
        fused: Use torch's fused kernel; torch chooses by default.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    fused: bool | None = None

    elementwise: ClassVar[bool] = True

    def build(self, module: nn.Module) -> Optimizer:
        """See `OptimizerFactory.build`."""
        return torch.optim.AdamW(
            self.groups(module), lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=0.0, fused=self.fused
        )

    def predict_state_bytes(self, module: nn.Module) -> int:
        """See `OptimizerFactory.predict_state_bytes`: two moments of each parameter."""
        return adamw_state_bytes(module.parameters())


@dataclass(frozen=True, kw_only=True)
class Adam(OptimizerFactory):
    """Adam (Kingma and Ba 2015, Alg. 1), torch's, with weight decay as an L2 term of the gradient.

    Its learning rate is AdamW's; a weight decay that AdamW takes is far too large for it.

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

    decoupled_weight_decay: ClassVar[bool] = False
    elementwise: ClassVar[bool] = True

    def build(self, module: nn.Module) -> Optimizer:
        """See `OptimizerFactory.build`."""
        return torch.optim.Adam(
            self.groups(module), lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=0.0, fused=self.fused
        )

    def predict_state_bytes(self, module: nn.Module) -> int:
        """See `OptimizerFactory.predict_state_bytes`: two moments of each parameter."""
        return adamw_state_bytes(module.parameters())
