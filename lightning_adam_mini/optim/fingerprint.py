"""The fingerprint of a saved state: the cut of each parameter, so that no state is taken for another partition's.

Shapes alone do not tell: a fused matrix of queries, keys and values keeps as many numbers in one order of its rows as
in another. So each group saves the signatures of its parameters (`Blocks.signature`), joined by `; `, as `partition`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["check_partition", "partition_changes"]

_NAMED = 3
"""Parameters that a message names."""


def partition_changes(
    saved_groups: Sequence[Mapping[str, Any]], own_groups: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> dict[str, tuple[str, str]]:
    """Saved and own signature of each parameter that is cut otherwise than it was.

    Args:
        saved_groups: `param_groups` of a saved state; groups without `partition`, of older states, are not compared.
        own_groups: `param_groups` of the optimizer.
        names: Names of the parameters, group after group.

    Raises:
        ValueError: Groups of other numbers of parameters.
    """
    changes: dict[str, tuple[str, str]] = {}
    start = 0
    for number, (saved, own) in enumerate(zip(saved_groups, own_groups, strict=True)):
        members = names[start : start + len(own["params"])]
        start += len(members)
        if not isinstance(saved.get("partition"), str) or not members:
            continue
        before, now = saved["partition"].split("; "), own["partition"].split("; ")
        if len(before) != len(now):
            raise ValueError(
                f"group {number} of the optimizer state has the cuts of {len(before)} parameters, here it has "
                f"{len(now)}: it belongs to another model, or to other parameter groups"
            )
        changes |= {name: (old, new) for name, old, new in zip(members, before, now, strict=True) if old != new}
    return changes


def check_partition(
    saved_groups: Sequence[Mapping[str, Any]], own_groups: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> None:
    """Refuse a state that was saved with another partition.

    Args:
        saved_groups: `param_groups` of a saved state; groups without `partition`, of older states, are accepted.
        own_groups: `param_groups` of the optimizer.
        names: Names of the parameters, group after group.

    Raises:
        ValueError: With the parameters that differ, how each was cut and is cut, and how to convert the state.
    """
    changes = partition_changes(saved_groups, own_groups, names)
    if not changes:
        return
    told = [f"{name!r} was cut {old!r} and is cut {new!r}" for name, (old, new) in list(changes.items())[:_NAMED]]
    more = f", and {len(changes) - _NAMED} more" if len(changes) > _NAMED else ""
    raise ValueError(
        f"the optimizer state has another partition: {'; '.join(told)}{more}. Continue with the partition that saved "
        "it, or convert the state: lightning_adam_mini.convert.repartition(state, optimizer), or `adam-mini convert`"
    )
