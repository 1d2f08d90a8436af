"""What an optimizer is given: parameters, pairs of a name and a parameter, or groups of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lightning_adam_mini.optim.distributed import is_dtensor

__all__ = ["Form", "form_of", "listed", "named_parameters", "parameter_of"]


Form = tuple[object, ...]
"""What the cut, the state and the shard of a parameter were made for."""


def form_of(parameter: Tensor) -> Form:
    """The form of a parameter as it is now."""
    form = (type(parameter), parameter.shape, parameter.dtype, parameter.device)
    return (*form, parameter.device_mesh, parameter.placements) if is_dtensor(parameter) else form


def parameter_of(entry: Tensor | tuple[str, Tensor]) -> Tensor:
    """The parameter of an entry that may have a name."""
    return entry[1] if isinstance(entry, tuple) else entry


def listed(entries: Iterable[Any]) -> list[Any]:
    """Checked entries that can be read more than once, where they or their parameters come from a generator."""
    if isinstance(entries, Tensor):
        entries = [entries]
    checked = [_checked(entry) for entry in entries]
    if len({isinstance(entry, dict) for entry in checked}) > 1:
        raise ValueError("AdamMini got parameters beside groups; put them in a group of their own, {'params': [...]}")
    return checked


def _checked(entry: Any) -> Any:
    match entry:
        case {"params": params}:
            return {**entry, "params": listed(params)}
        case Tensor() | (str(), Tensor()):
            return entry
    raise ValueError(
        "AdamMini takes a model, parameters, pairs of a name and a parameter, or groups {'params': [...]} of them, not "
        f"an entry of type {type(entry).__name__}"
    )


def named_parameters(entries: Iterable[Any], *, offset: int = 0) -> dict[str, Tensor]:
    """Names and parameters from a list of either, or from groups of lists; unnamed ones are numbered."""
    named: dict[str, Tensor] = {}
    for entry in entries:
        if isinstance(entry, dict):
            found = named_parameters(entry["params"], offset=offset + len(named))
        elif isinstance(entry, tuple):
            found = {entry[0]: entry[1]}
        else:
            found = {f"parameter {offset + len(named)}": entry}
        if twice := named.keys() & found.keys():
            raise ValueError(f"two parameters have the name {min(twice)!r}; give each a name of its own")
        named.update(found)
    return named
