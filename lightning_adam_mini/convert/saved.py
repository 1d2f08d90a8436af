"""Saved optimizer states in one form, whoever wrote them.

`Optimizer.state_dict()` numbers parameters, in newer torch with their names under `param_names`; `torch.distributed`
keys them by name; the authors' package makes a named group for each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from torch import Tensor

from lightning_adam_mini.optim.distributed import is_dtensor
from lightning_adam_mini.optim.state import saved_tensor

__all__ = ["SavedBy", "SavedParameter", "saved_by", "saved_parameters", "whole"]

_OPTIONS_OF_OLDER_STATES = {
    *("params", "param_names", "lr", "initial_lr", "betas", "eps", "weight_decay", "maximize", "capturable")
}
"""Options of the groups of an AdamMini that did not name its partition yet."""


class SavedBy(StrEnum):
    """What wrote a state."""

    ADAMW = "AdamW"
    ADAM_MINI = "AdamMini"
    PACKAGE = "the package adam-mini"


@dataclass(frozen=True)
class SavedParameter:
    """One parameter of a saved state.

    Args:
        label: What messages call it.
        name: Its name, where the state or the user tells it.
        group: Number of its group.
        state: Its state; empty where it never had a gradient.
        signature: Its cut (`Blocks.signature`), where the state tells it.
    """

    label: str
    name: str | None
    group: int
    state: Mapping[str, Any] = field(repr=False)
    signature: str | None = None

    @property
    def first_moment(self) -> Tensor | None:
        """`exp_avg`, or the package's `m`, which may have another shape than the parameter."""
        return self.state.get("exp_avg", self.state.get("m"))

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the state may belong to a parameter of `shape`; without a state, anything may."""
        moment = self.first_moment
        if moment is None:
            return True
        if "exp_avg" in self.state:
            return tuple(moment.shape) == tuple(shape)
        return moment.numel() == math.prod(shape)

    def __str__(self) -> str:
        """The label with the shape."""
        moment = self.first_moment
        return self.label if moment is None else f"{self.label} of shape {tuple(moment.shape)}"


def saved_by(state_dict: Any) -> SavedBy:
    """What wrote a state, told by the options of its groups and the keys of its parameters.

    Raises:
        ValueError: No optimizer state, or that of an optimizer that keeps other moments.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            "this is no optimizer state: it has no `state` and `param_groups`; give optimizer.state_dict()"
        )
    options = {option for group in state_dict["param_groups"] for option in group}
    keys = {key for state in state_dict["state"].values() for key in state}
    if {"beta1", "beta2", "name"} <= options and (not keys or keys & {"vmean", "v"}):
        return SavedBy.PACKAGE
    if options >= {"betas", "amsgrad"} and keys <= {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}:
        return SavedBy.ADAMW
    own = {"step", "exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"}
    if "partition" in options or (options <= _OPTIONS_OF_OLDER_STATES and keys and keys <= own):
        return SavedBy.ADAM_MINI
    told = ", ".join(sorted(map(str, keys))) or "nothing"
    raise ValueError(
        f"the optimizer state keeps {told} for a parameter: it comes from none of AdamW, Adam, AdamMini and the "
        "package adam-mini, whose states can be converted; start the optimizer afresh from the weights alone"
    )


def saved_parameters(state_dict: Mapping[str, Any], names: Sequence[str] | None = None) -> list[SavedParameter]:
    """The parameters of a state, group after group.

    Args:
        state_dict: The state.
        names: Their names in this order, where the state has none.

    Raises:
        ValueError: Numbers of names, signatures and parameters that do not agree.
    """
    states = state_dict["state"]
    found: list[SavedParameter] = []
    for number, group in enumerate(state_dict["param_groups"]):
        keys = list(group["params"])
        known = _names(group, keys)
        signatures: list[str | None] = [None] * len(keys)
        if isinstance(group.get("partition"), str) and keys:
            signatures = list(group["partition"].split("; "))
        if len(signatures) != len(keys) or len(known) != len(keys):
            raise ValueError(f"group {number} of the optimizer state names {len(known)} of its {len(keys)} parameters")
        for key, name, signature in zip(keys, known, signatures, strict=True):
            given = names[len(found)] if names is not None and len(found) < len(names) else name
            label = repr(given) if given else f"parameter {len(found)} (group {number})"
            found.append(SavedParameter(label, given, number, states.get(key, {}), signature))
    if names is not None and len(names) != len(found):
        raise ValueError(f"names has {len(names)} names, but the optimizer state {len(found)} parameters")
    listed = {key for group in state_dict["param_groups"] for key in group["params"]}
    if unlisted := [key for key in states if key not in listed]:
        raise ValueError(f"the optimizer state has a state of {unlisted[0]!r}, which is in none of its groups")
    return found


def whole(value: Any) -> Tensor:
    """A tensor that is on this rank alone: a DTensor is gathered, on all of its ranks together."""
    tensor = saved_tensor(value).detach()
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def _names(group: Mapping[str, Any], keys: Sequence[Any]) -> Sequence[str | None]:
    """Names of the parameters of a group: of newer torch, of the package, or the keys themselves."""
    if "param_names" in group:
        return list(group["param_names"])
    if {"beta1", "name"} <= group.keys():
        return [group["name"]] * len(keys)
    return [key if isinstance(key, str) else None for key in keys]
