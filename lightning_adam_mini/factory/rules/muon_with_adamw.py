"""Muon and AdamW as one optimizer, so that schedules, scalers and checkpoints see one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_adam_mini.factory.rules.tensorwise import RuleOptimizer

__all__ = ["MuonWithAdamW"]


class MuonWithAdamW(RuleOptimizer):
    """torch's Muon for the groups with `rule` "muon" and torch's AdamW for those with "adamw".

    The two are made anew at each step over the state that this class holds. So there is one state and one list of
    groups to save, copy and schedule, and nothing to keep in step with them.

    Args:
        groups: Groups with all options of their rule. A group of Muon with `stacked` holds tensors whose first
            dimension counts matrices; its others are flattened behind the first dimension.
        lr: Learning rate of groups without their own.

    Raises:
        ValueError: A group without a rule, or a vector among Muon's.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr})
        for group in self.param_groups:
            if group.get("rule") not in ("muon", "adamw"):
                raise ValueError(f"a group's rule must be 'muon' or 'adamw', not {group.get('rule')!r}")
            if group["rule"] == "muon" and any(p.ndim < 2 + group["stacked"] for p in group["params"]):
                raise ValueError("Muon takes matrices; give vectors and numbers to a group with the rule 'adamw'")
        self._adamw()  # completes the options of its groups, so that they are the same before and after a step

    def update_all_(self) -> None:
        """See `RuleOptimizer.update_all_`: both rules, each for its groups."""
        for group in self.param_groups:
            if group["rule"] == "muon":
                self._step_of_muon(group)
        adamw = self._adamw()
        if adamw is not None:
            adamw.state = self.state
            adamw.step()

    def _adamw(self) -> Optimizer | None:
        groups = [group for group in self.param_groups if group["rule"] == "adamw"]
        return torch.optim.AdamW(groups) if groups else None

    def _step_of_muon(self, group: dict[str, Any]) -> None:
        """Step the matrices of a group, which are views of the parameters, with views of their state."""
        matrices: list[Tensor] = []
        buffers: list[Tensor] = []
        copied: list[tuple[Tensor, Tensor]] = []
        for param in group["params"]:
            if param.grad is None or not param.numel():
                continue
            state = self.state[param]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(param, memory_format=torch.contiguous_format)
            weight = param.detach()
            if not weight.is_contiguous():  # channels last: flattening makes a copy, which is written back
                weight = weight.contiguous()
                copied.append((param, weight))
            tensors = (weight, param.grad, state["momentum_buffer"])
            for matrix, grad, buffer in zip(*(_matrices(t, group["stacked"]) for t in tensors), strict=True):
                matrix.grad = grad
                matrices.append(matrix)
                buffers.append(buffer)
        if not matrices:
            return
        muon = torch.optim.Muon(
            matrices,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            ns_steps=group["ns_steps"],
            adjust_lr_fn="match_rms_adamw",
        )
        for matrix, buffer in zip(matrices, buffers, strict=True):
            muon.state[matrix]["momentum_buffer"] = buffer
        muon.step()
        for param, weight in copied:
            param.copy_(weight)


def _matrices(tensor: Tensor, stacked: bool) -> list[Tensor]:
    """The matrices of a tensor: one for each index of the first dimension, or one with a row for each."""
    parts = tensor.unbind(0) if stacked else [tensor]
    return [part.flatten(1) for part in parts]
