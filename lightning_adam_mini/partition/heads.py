"""Checks of the heads of one attention module across its projections."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from lightning_adam_mini.partition.roles import ParameterRole, Role

__all__ = ["checked_heads"]

Projections = Sequence[tuple[Tensor, ParameterRole]]


def checked_heads(projections: Projections) -> Iterator[tuple[Tensor, ParameterRole]]:
    """What the projections of one module tell about each other's heads.

    A query meets keys of its own size, so that keys whose heads a module counts under a name of its own have the size
    of the query's. And queries with twice the rows that the output projection takes hold something else beside.

    Args:
        projections: Parameters of one module with their roles.

    Yields:
        Parameters whose role is another one than was thought, with that role.
    """
    queries, keys = _alone(projections, Role.QUERY), _alone(projections, Role.KEY)
    sizes = {role.parts[0].head_dim for _, role in queries if not role.problem}
    for query, role in queries:
        if not role.problem and _has_gate(query, projections):
            yield query, replace(role, problem=f"its {_rows(role)} rows are twice what the output projection takes")
    if len(sizes) != 1:
        return
    (size,) = sizes
    for key, role in keys:
        if size and role.parts[0].head_dim != size:
            misfit = (
                f"its {_rows(role)} rows are no multiple of the query's head size {size}" if _rows(role) % size else ""
            )
            yield key, replace(role, parts=(replace(role.parts[0], head_dim=size),), problem=misfit)


def _alone(projections: Projections, role: Role) -> list[tuple[Tensor, ParameterRole]]:
    return [(parameter, found) for parameter, found in projections if found.roles == (role,)]


def _has_gate(query: Tensor, projections: Projections) -> bool:
    """Whether queries have twice as many rows as the output projection has inputs, where keys and values are alike."""
    keys, values = ({_rows(role) for _, role in _alone(projections, r)} for r in (Role.KEY, Role.VALUE))
    outputs = [parameter for parameter, _ in _alone(projections, Role.ATTENTION_OUTPUT) if parameter.dim() == 2]
    inputs = {parameter.shape[1] for parameter in outputs}
    return len(keys) == 1 and keys == values and inputs == {query.shape[0] / 2}


def _rows(role: ParameterRole) -> int:
    return role.parts[0].length
