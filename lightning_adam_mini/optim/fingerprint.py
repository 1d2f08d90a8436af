"""The fingerprint of a saved state: the cut of each parameter, so that no state is taken for another partition's.

Shapes alone do not tell: a fused matrix of queries, keys and values keeps as many numbers in one order of its rows as
in another. So each group saves the signatures of its parameters (`Blocks.signature`), joined by `; `, as `partition`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["NO_STATE", "check_partition", "partition_changes", "saved_signatures"]

NO_STATE = "none"
"""In the place of the signature of a parameter that had no state when its group was saved, as frozen ones have none."""

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
    signatures = saved_signatures(saved_groups)
    now = [signature for group in own_groups for signature in group["partition"].split("; ") if group["params"]]
    before = zip(names, signatures, now, strict=True)
    return {name: (old, new) for name, old, new in before if old is not None and old not in (new, NO_STATE)}


def saved_signatures(saved_groups: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """The signature of each parameter of a saved state, `NO_STATE` or, where the groups have none, None.

    Raises:
        ValueError: A group has another number of signatures than of parameters.
    """
    signatures: list[str | None] = []
    for number, group in enumerate(saved_groups):
        size, saved = len(group["params"]), group.get("partition")
        if saved is None or not size:
            signatures += [None] * size
            continue
        found = saved.split("; ") if isinstance(saved, str) else []
        if len(found) != size:
            raise ValueError(
                f"group {number} of the optimizer state has the cuts of {len(found)} parameters, here it has "
                f"{size}: it belongs to another model, or to other parameter groups"
            )
        signatures += found
    return signatures


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
