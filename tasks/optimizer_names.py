"""Optimizer states by the names of parameters, as `torch.distributed.checkpoint` has them, and by numbers, as torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["drop_unsaved", "name_parameters", "number_parameters"]

_REMEDY = "Continue with the optimizer, model and partition that saved it, or start a new run from its weights alone"


def number_parameters(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state by names as the optimizer itself saves it: parameters numbered through the groups."""
    numbers: dict[str, int] = {}
    for group in state["param_groups"]:
        for name in group["params"]:
            numbers[name] = len(numbers)
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]]
    values = {numbers[name]: values for name, values in state.get("state", {}).items()}
    return {"state": dict(sorted(values.items())), "param_groups": groups}


def name_parameters(state: Mapping[str, Any], own_groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A numbered state by names, matched by their positions in the groups, as torch's `load_state_dict` does.

    Args:
        state: What an optimizer saved, with whatever numbers.
        own_groups: Groups of this optimizer, with names under `params`.

    Raises:
        ValueError: The groups have other sizes.
    """
    groups = state["param_groups"]
    sizes, own_sizes = ([len(group["params"]) for group in some] for some in (groups, own_groups))
    if sizes != own_sizes:
        raise ValueError(
            f"the optimizer state has groups of {sizes} parameters, this optimizer has {own_sizes}: it belongs to "
            f"another model, or to other parameter groups. {_REMEDY}"
        )
    names: dict[Any, str] = {}
    for group, own in zip(groups, own_groups, strict=True):
        names |= dict(zip(group["params"], own["params"], strict=True))
    return {
        "state": {names[number]: values for number, values in state["state"].items()},
        "param_groups": [{**group, "params": [names[number] for number in group["params"]]} for group in groups],
    }


def drop_unsaved(state: dict[str, Any], saved: Mapping[str, Tensor]) -> None:
    """Check that a state by names fits what was saved, and leave out parameters that had no step, hence no state yet.

    Args:
        state: This optimizer's, changed in place.
        saved: Tensors by `state.PARAMETER.KEY`.

    Raises:
        ValueError: With the first tensor that differs.
    """
    own = {f"state.{name}.": values for name, values in state["state"].items()}
    known = {prefix + key for prefix, values in own.items() for key in values}
    if foreign := [name for name in saved if name.startswith("state.") and name not in known]:
        raise ValueError(
            f"the saved optimizer state has {foreign[0].removeprefix('state.')}, this one has not. {_REMEDY}"
        )
    for name in list(state["state"]):
        values = own[f"state.{name}."]
        found = [key for key in values if f"state.{name}.{key}" in saved]
        if not found and saved:
            del state["state"][name]
            continue
        for key, value in values.items():
            if key not in found:
                raise ValueError(f"the saved optimizer state has no {name}.{key}. {_REMEDY}")
            shape = tuple(saved[f"state.{name}.{key}"].shape)
            if isinstance(value, Tensor) and shape != tuple(value.shape):
                raise ValueError(
                    f"the saved {key} of {name!r} has shape {shape}, but here it has {tuple(value.shape)}. {_REMEDY}"
                )
