"""Parameter groups: what decays and what does not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor

from lightning_adam_mini.partition import ParameterPartition, Role

__all__ = ["WeightDecayPolicy", "decay_groups", "decays"]

WeightDecayPolicy = Literal["matrices", "all"]


def decays(cut: ParameterPartition, policy: WeightDecayPolicy) -> bool:
    """Whether weight decay applies to a parameter.

    Args:
        cut: The parameter and its role.
        policy: `matrices` spares biases, norm scales and all other vectors and scalars, of whatever shape; `all` spares
            nothing, as the AdamW baseline of the Adam-mini paper.
    """
    if policy == "all":
        return True
    shape, roles = cut.blocks.shape, cut.role.roles
    if Role.OTHER in roles:  # a class token of shape (1, 1, width) is a vector
        return sum(size > 1 for size in shape) >= 2
    return len(shape) >= 2 and Role.BIAS not in roles and Role.NORM not in roles


def decay_groups(
    parameters: Iterable[tuple[Tensor, ParameterPartition]], *, weight_decay: float, policy: WeightDecayPolicy
) -> list[dict[str, Any]]:
    """Split parameters into a group that decays and one that does not; an empty one is left out."""
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for parameter, cut in parameters:
        groups[decays(cut, policy)].append(parameter)
    decay, no_decay = groups[True], groups[False]
    return [
        {"params": params, "weight_decay": decay_rate}
        for params, decay_rate in ((decay, weight_decay), (no_decay, 0.0))
        if params
    ]
