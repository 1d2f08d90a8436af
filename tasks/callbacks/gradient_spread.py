"""How far squared gradients lie apart within the blocks of the optimizer, as a metric of training."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_adam_mini.blocks import Kind
from lightning_adam_mini.hessian.block_structure import spread_from, spread_sums
from lightning_adam_mini.optim import AdamMini
from lightning_adam_mini.partition import ParameterPartition, partition_module

__all__ = ["GradientSpread"]


class GradientSpread(Callback):
    """Logs what the blocks leave out of Adam's second moment: the variance of `ln g^2` within them, by role.

    Metrics, at the trainer's logging interval: `gradient_spread/ROLE`, the variance within blocks, and
    `gradient_spread_explained/ROLE`, the part of the whole variance that lies between blocks instead. The gradients are
    those of one optimizer step, so that pure noise has the variance pi^2 / 2 = 4.9. The blocks are those of AdamMini,
    or, with another optimizer, those that AdamMini would have. Parameters that keep every element are left out, and so
    are factored second moments, which have no blocks.

    With `--trainer.callbacks+=lightning_adam_mini.tasks.callbacks.GradientSpread`. It costs some passes over the
    gradients in a step that is logged, waits for the device once, and keeps nothing.

    Raises:
        ValueError: Gradients are freed before the optimizer's step (`model.gradient_release`).
    """

    def __init__(self) -> None:
        self._cuts: dict[str, ParameterPartition] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the blocks."""
        if getattr(pl_module, "gradient_release", False):
            raise ValueError("GradientSpread needs the gradients of a whole step: leave model.gradient_release out")
        self._cuts = {}
        if getattr(pl_module, "is_sharded", False) or any(hasattr(p, "device_mesh") for p in pl_module.parameters()):
            rank_zero_warn("GradientSpread logs nothing: ranks hold parts of the gradients, and blocks cross them")
            return
        optimizer = next(iter(trainer.optimizers), None)
        cuts = _named_as_in(pl_module, optimizer) if isinstance(optimizer, AdamMini) else partition_module(pl_module)
        if not cuts:
            rank_zero_warn(
                "GradientSpread logs nothing: the parameters of the optimizer have other names than any module; pass "
                "AdamMini a module"
            )
            return
        self._cuts = {name: cut for name, cut in cuts.items() if _has_blocks(cut)}
        if not self._cuts:
            rank_zero_warn("GradientSpread logs nothing: no parameter is cut into blocks of several elements")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Sum over blocks where the trainer logs; clipping, which comes later, scales all gradients alike."""
        interval = cast("Any", trainer).log_every_n_steps  # set by the trainer, but not declared
        if not self._cuts or not trainer.is_global_zero or not interval or (trainer.global_step + 1) % interval:
            return
        gradients = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
        by_role: dict[str, Tensor] = {}
        for name, cut in self._cuts.items():
            if name in gradients:
                sums = spread_sums(cut.blocks, gradients[name].float().square())
                role = cut.role.name
                by_role[role] = by_role[role] + sums if role in by_role else sums
        if not by_role:
            return
        rows = torch.stack(list(by_role.values())).cpu()  # the one wait for the device
        metrics: dict[str, float] = {}
        for role, row in zip(by_role, rows, strict=True):
            spread = spread_from(row)
            metrics[f"gradient_spread/{role}"] = spread.within
            metrics[f"gradient_spread_explained/{role}"] = spread.explained
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)  # the number of this step, from 0


def _named_as_in(module: LightningModule, optimizer: AdamMini) -> dict[str, ParameterPartition]:
    """The optimizer's cuts by the names that parameters have in `module`; it may have been given a part of it."""
    cuts = optimizer.partition
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for prefix, part in module.named_modules():
        named = {name: p for name, p in part.named_parameters() if p in trained}
        if len(named) == len(trained) and named.keys() <= cuts.keys():
            return {f"{prefix}.{name}" if prefix else name: cuts[name] for name in named}
    return {}


def _has_blocks(cut: ParameterPartition) -> bool:
    """Whether second moments are shared within blocks of several elements."""
    return cut.blocks.kind is Kind.MEAN and cut.blocks.num_values < math.prod(cut.blocks.shape)
