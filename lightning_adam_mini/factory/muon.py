"""Muon for hidden matrices and AdamW for all other parameters, as one optimizer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adam_mini.factory.base import OptimizerFactory, RuleOptimizer, require
from lightning_adam_mini.measure.memory import adamw_state_bytes
from lightning_adam_mini.partition import ParameterPartition, Role

__all__ = ["Muon", "MuonWithAdamW"]

_Member = tuple[nn.Parameter, ParameterPartition]

HIDDEN = frozenset(
    {
        Role.QUERY,
        Role.KEY,
        Role.VALUE,
        Role.FUSED_QKV,
        Role.ATTENTION_OUTPUT,
        Role.MLP,
        Role.LINEAR,
        Role.EXPERT,
        Role.CONV,
        Role.LORA,
    }
)
"""Roles of hidden matrices. AdamW gets embeddings, output heads, norms, biases and parameters of unknown role."""


@dataclass(frozen=True, kw_only=True)
class Muon(OptimizerFactory):
    """Muon (Jordan et al. 2024) for hidden matrices, torch's, and torch's AdamW for the rest, in one optimizer.

    Updates are scaled to the size of AdamW's (Liu et al. 2025, Eq. 4), so that both use AdamW's learning rate and
    weight decay. Convolution kernels are flattened to one row a channel, each expert is a matrix, and so is a fused
    query, key and value. AdamW trains embeddings, declared output heads, norms, biases and unknown parameters.

    Args:
        momentum: Decay rate of the first moment of hidden matrices.
        nesterov: Use Nesterov's momentum.
        ns_steps: Newton-Schulz iterations that orthogonalize the update.
        betas: AdamW's decay rates of the first and second moment.
        eps: Added to the root of AdamW's second moment.
        adamw_for: Further parameters for AdamW, by role, parameter name or `re:` pattern, such as `re:.*fc.*` for a
            classifier.
    """

    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    adamw_for: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """See `OptimizerFactory.__post_init__`."""
        super().__post_init__()
        require(1 <= self.ns_steps < 100, "ns_steps", "in 1..99", self.ns_steps)
        for entry in self.adamw_for:
            try:
                re.compile(entry.removeprefix("re:"))
            except re.error as error:
                raise ValueError(f"adamw_for: {entry!r} is not a valid regular expression: {error}") from error

    def build(self, module: nn.Module) -> Optimizer:
        """See `OptimizerFactory.build`."""
        hidden, rest = self._hidden_and_rest(module)
        muon = {"momentum": self.momentum, "nesterov": self.nesterov, "ns_steps": self.ns_steps}
        flat = [member for member in hidden if not member[1].role.batch_axes]
        stacked = [member for member in hidden if member[1].role.batch_axes]
        groups: list[dict[str, Any]] = [
            *({**group, **muon, "rule": "muon", "stacked": False} for group in self.grouped(flat)),
            *({**group, **muon, "rule": "muon", "stacked": True} for group in self.grouped(stacked)),
            *({**group, "betas": self.betas, "eps": self.eps, "rule": "adamw"} for group in self.grouped(rest)),
        ]
        return MuonWithAdamW(groups, lr=self.lr)

    def predict_state_bytes(self, module: nn.Module) -> int:
        """See `OptimizerFactory.predict_state_bytes`: the momentum of hidden matrices, AdamW's moments of the rest."""
        hidden, rest = self._hidden_and_rest(module)
        momentum = sum(p.numel() * p.element_size() for p, _ in hidden if p.requires_grad)
        return momentum + adamw_state_bytes(p for p, _ in rest)

    def _hidden_and_rest(self, module: nn.Module) -> tuple[list[_Member], list[_Member]]:
        """The parameters for Muon and those for AdamW.

        Raises:
            ValueError: Muon gets no parameter, or an entry of `adamw_for` matches none.
        """
        members = self.members(module)
        trainable = [found for parameter, found in members if parameter.requires_grad]
        for entry in self.adamw_for:
            if not any(_matches(entry, found) for found in trainable):
                present = ", ".join(sorted({role for found in trainable for role in found.role.roles}))
                raise ValueError(
                    f"adamw_for: {entry!r} matches no trainable parameter; this model has the roles {present}"
                )
        hidden: list[_Member] = []
        rest: list[_Member] = []
        for parameter, found in members:
            is_hidden = HIDDEN.issuperset(found.role.roles) and parameter.ndim >= 2
            for_muon = is_hidden and not any(_matches(entry, found) for entry in self.adamw_for)
            (hidden if for_muon else rest).append((parameter, found))
        if not any(parameter.requires_grad for parameter, _ in hidden):
            raise ValueError(
                "Muon needs hidden matrices, and this model has none to train: only embeddings, output "
                "heads, vectors and parameters of unknown role; use AdamW"
            )
        return hidden, rest


def _matches(entry: str, found: ParameterPartition) -> bool:
    if entry.startswith("re:"):
        return re.fullmatch(entry.removeprefix("re:"), found.name) is not None
    return entry == found.name or entry in found.role.roles


class MuonWithAdamW(RuleOptimizer):
    """torch's Muon for the groups with `rule` "muon", and torch's AdamW for those with "adamw".

    Each step creates both anew, over the state that this class holds. So schedules, scalers and checkpoints see one
    state and one list of groups, and nothing has to be synchronized with them.

    Args:
        groups: Groups with all options of their rule. In a Muon group, `stacked` says that the first dimension of each
            tensor counts matrices; without it, a tensor is one matrix with all dimensions but the first flattened.
        lr: Learning rate of groups without their own.

    Raises:
        ValueError: A group without a rule, or a vector in a Muon group.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr})
        for group in self.param_groups:
            if group.get("rule") not in ("muon", "adamw"):
                raise ValueError(f"a group's rule must be 'muon' or 'adamw', not {group.get('rule')!r}")
            if group["rule"] == "muon" and any(p.ndim < 2 + group["stacked"] for p in group["params"]):
                raise ValueError("Muon trains matrices; put vectors and scalars into a group with the rule 'adamw'")
        self._adamw()  # sets the defaults of its groups, so that they are the same before and after a step

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
        """Step a Muon group: its matrices and momentum buffers are views of the parameters and of the state."""
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
            if not weight.is_contiguous():  # channels last: flattening copies, so the result is written back
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
    """The matrices of a tensor: one for each index of the first dimension if stacked, else one in all."""
    parts = tensor.unbind(0) if stacked else [tensor]
    return [part.flatten(1) for part in parts]
