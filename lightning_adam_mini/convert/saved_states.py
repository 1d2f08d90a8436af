"""Saved optimizer states in one form, and which saved parameter belongs to which parameter of a model.

`Optimizer.state_dict()` numbers parameters, in newer torch with their names under `param_names`; `torch.distributed`
keys them by name; the package `adam-mini` has a named group for each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import takewhile
from typing import Any

from torch import Tensor

from lightning_adam_mini.optim.distributed import is_dtensor
from lightning_adam_mini.optim.state import saved_tensor

__all__ = ["SavedBy", "SavedParameter", "Wanted", "match", "saved_by", "saved_parameters", "whole"]

_OPTIONS_OF_OLDER_STATES = {
    *("params", "param_names", "lr", "initial_lr", "betas", "eps", "weight_decay", "maximize", "capturable")
}
"""Group options of early AdamMini states, which do not name their partition."""


class SavedBy(StrEnum):
    """What saved a state."""

    ADAMW = "AdamW"
    ADAM_MINI = "AdamMini"
    PACKAGE = "the package adam-mini"


@dataclass(frozen=True)
class SavedParameter:
    """One parameter of a saved state.

    Args:
        label: Its name in messages.
        name: Its name, if the state or the user gives it.
        group: Number of its group.
        state: Its state; empty if it never had a gradient.
        signature: Its blocks (`Blocks.signature`), if the state has them.
    """

    label: str
    name: str | None
    group: int
    state: Mapping[str, Any] = field(repr=False)
    signature: str | None = None

    @property
    def first_moment(self) -> Tensor | None:
        """`exp_avg`, or the package's `m`, whose shape may differ from the parameter's."""
        return self.state.get("exp_avg", self.state.get("m"))

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the state may belong to a parameter of `shape`; an empty state fits all."""
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
    """What saved a state, by the options of its groups and the keys of its parameters.

    Raises:
        ValueError: No optimizer state, or one of an optimizer with other moments.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            "this is no optimizer state: it has no `state` and `param_groups`; pass optimizer.state_dict()"
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
    raise ValueError(
        f"the optimizer state keeps {', '.join(sorted(map(str, keys))) or 'nothing'} for a parameter: only states of "
        "AdamW, Adam, AdamMini and the package adam-mini can be converted; start a new optimizer from the weights alone"
    )


def saved_parameters(state_dict: Mapping[str, Any], names: Sequence[str] | None = None) -> list[SavedParameter]:
    """The parameters of a state, group after group.

    Args:
        state_dict: The state.
        names: Their names in this order, if the state has none.

    Raises:
        ValueError: The numbers of names, signatures and parameters differ.
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
    """The full tensor on this rank; gathering a DTensor is collective over its ranks."""
    tensor = saved_tensor(value).detach()
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def _names(group: Mapping[str, Any], keys: Sequence[Any]) -> Sequence[str | None]:
    """Names of the parameters of a group: from newer torch, from the package, or the keys themselves."""
    if "param_names" in group:
        return list(group["param_names"])
    if {"beta1", "name"} <= group.keys():
        return [group["name"]] * len(keys)
    return [key if isinstance(key, str) else None for key in keys]


_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_MOST_POINTERS = 10_000
"""Limit of partial assignments of parameters to groups; beyond it the order counts as ambiguous."""


@dataclass(frozen=True)
class Wanted:
    """The parameters that a state is converted for.

    Args:
        groups: Names of the parameters of each group.
        shapes: Their shapes by name.
        model_order: Names and shapes in the order of `model.named_parameters()`, frozen ones too.
        named: Whether the names come from a model; else they are numbers.
        frozen: Names in `groups` that are not trained, which the state may lack.
    """

    groups: Sequence[Sequence[str]]
    shapes: dict[str, tuple[int, ...]]
    model_order: Sequence[tuple[str, tuple[int, ...]]]
    named: bool = True
    frozen: frozenset[str] = frozenset()


def match(saved: Sequence[SavedParameter], wanted: Wanted) -> dict[str, SavedParameter]:
    """The saved parameter for each wanted one; frozen ones may be missing.

    Names decide if the state has them. Otherwise the order decides, with every shape checked: the order of the groups,
    of the model, or the only assignment of the model's parameters, in their order, to the saved groups.

    Raises:
        ValueError: The state belongs to another model, or its order is ambiguous.
    """
    if wanted.named and saved and all(parameter.name is not None for parameter in saved):
        found = _by_name(saved, wanted)
    else:
        found = _by_order(saved, wanted)
    for name, parameter in found.items():
        if name in wanted.shapes and not parameter.fits(wanted.shapes[name]):
            raise ValueError(_other_shape(parameter, name, wanted.shapes[name]))
    return {name: parameter for name, parameter in found.items() if name in wanted.shapes}


def _by_name(saved: Sequence[SavedParameter], wanted: Wanted) -> dict[str, SavedParameter]:
    own = {_plain(name): name for name, _ in wanted.model_order}
    names = [_plain(str(parameter.name)) for parameter in saved]
    if len(own) < len(wanted.model_order):  # a module of the model has a wrapper's name, such as `module`
        own, names = {name: name for name, _ in wanted.model_order}, [str(parameter.name) for parameter in saved]
    lowered = {plain.lower(): name for plain, name in own.items()}
    if all(name == name.lower() for name in names) and len(lowered) == len(own):  # the package lowers names
        own = lowered
    names = _with_prefix(names, set(own))
    found: dict[str, SavedParameter] = {}
    for name, parameter in zip(names, saved, strict=True):
        if name in own:
            found[own[name]] = parameter
        elif parameter.state:
            raise ValueError(
                f"the optimizer state has the parameter {parameter}, which this model lacks: it belongs to another "
                "model; build the optimizer over the model that was trained"
            )
    for name in wanted.shapes:
        if name not in found and name not in wanted.frozen:
            raise ValueError(
                f"the optimizer state has no parameter {name!r} of shape {wanted.shapes[name]}: it belongs to another "
                "model, or this one trains more parameters; build the optimizer over those that were trained"
            )
    return found


def _with_prefix(names: list[str], own: set[str]) -> list[str]:
    """Names with the prefix of the model's, if one of the two models was part of a larger module."""
    if not names or own & set(names):
        return names
    longer = {name[: -len(names[0])] for name in own if name.endswith(f".{names[0]}")}
    for prefix in sorted(longer):
        if own >= {prefix + name for name in names}:
            return [prefix + name for name in names]
    shorter = {names[0][: -len(name)] for name in own if names[0].endswith(f".{name}")}
    for prefix in sorted(shorter):
        if all(name.startswith(prefix) and name[len(prefix) :] in own for name in names):
            return [name[len(prefix) :] for name in names]
    return names


def _by_order(saved: Sequence[SavedParameter], wanted: Wanted) -> dict[str, SavedParameter]:
    sizes = [sum(parameter.group == number for parameter in saved) for number in range(_num_groups(saved))]
    trained = [name for name, _ in wanted.model_order if name in wanted.shapes and name not in wanted.frozen]
    shapes = dict(wanted.model_order) | wanted.shapes
    orders = [trained, [name for name, _ in wanted.model_order]]
    of_trained = [[name for name in group if name not in wanted.frozen] for group in wanted.groups]
    of_trained = [group for group in of_trained if group]
    for groups in (wanted.groups, wanted.groups[::-1], of_trained, of_trained[::-1]):
        if [len(group) for group in groups] == sizes:
            orders.insert(0 if groups is wanted.groups else 1, [name for group in groups for name in group])
    for order in orders:
        if len(order) == len(saved) and all(p.fits(shapes[n]) for n, p in zip(order, saved, strict=True)):
            return dict(zip(order, saved, strict=True))
    if len(saved) != len(trained):
        raise ValueError(
            f"the optimizer state has {len(saved)} parameters without names, this model trains {len(trained)}: it "
            "belongs to another model; build the optimizer over the parameters that were trained"
        )
    assigned = _assign(saved, [(name, shapes[name]) for name in trained])
    if assigned is None:
        raise ValueError(
            "the optimizer state has no names, and its groups and shapes are ambiguous; pass names=[...], the names of "
            "the parameters in the order of the optimizer that saved it"
        )
    if not assigned:
        # All orders fail; report the one that fits the most parameters.
        candidates = [order for order in orders if len(order) == len(saved)]
        furthest = max(candidates, key=lambda order: _num_agreeing(order, saved, shapes))
        index = _num_agreeing(furthest, saved, shapes)
        raise ValueError(_other_shape(saved[index], furthest[index], shapes[furthest[index]]))
    return assigned


def _assign(
    saved: Sequence[SavedParameter], order: Sequence[tuple[str, tuple[int, ...]]]
) -> dict[str, SavedParameter] | None:
    """Assign parameters, in order, to groups whose next saved parameter has their shape.

    A dynamic program over the numbers of parameters that each group has got, with the number of ways to get there.

    Returns:
        The only assignment; empty if there is none, None if there are several.
    """
    groups = [[parameter for parameter in saved if parameter.group == n] for n in range(_num_groups(saved))]
    levels: list[dict[tuple[int, ...], tuple[int, int]]] = [{(0,) * len(groups): (1, -1)}]
    for _, shape in order:
        following: dict[tuple[int, ...], tuple[int, int]] = {}
        for pointers, (ways, _) in levels[-1].items():
            for number, pointer in enumerate(pointers):
                if pointer < len(groups[number]) and groups[number][pointer].fits(shape):
                    moved = (*pointers[:number], pointer + 1, *pointers[number + 1 :])
                    before = following.get(moved, (0, 0))[0]
                    following[moved] = (before + ways, number)
        if len(following) > _MOST_POINTERS:
            return None
        levels.append(following)
    end = tuple(len(group) for group in groups)
    if end not in levels[-1]:
        return {}
    if levels[-1][end][0] > 1:
        return None
    assigned, pointers = {}, end
    for level, (name, _) in zip(reversed(levels), reversed(order), strict=False):
        number = level[pointers][1]
        pointers = (*pointers[:number], pointers[number] - 1, *pointers[number + 1 :])
        assigned[name] = groups[number][pointers[number]]
    return assigned


def _num_agreeing(order: Sequence[str], saved: Sequence[SavedParameter], shapes: dict[str, tuple[int, ...]]) -> int:
    """How many leading parameters have the saved shapes."""
    fits = (parameter.fits(shapes[name]) for name, parameter in zip(order, saved, strict=True))
    return sum(takewhile(bool, fits))


def _num_groups(saved: Sequence[SavedParameter]) -> int:
    return 1 + max((parameter.group for parameter in saved), default=-1)


def _plain(name: str) -> str:
    """A name without the wrappers of torch.compile, FSDP and DDP."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(parts[1:] if len(parts) > 1 and parts[0] == "module" else parts)


def _other_shape(parameter: SavedParameter, name: str, shape: tuple[int, ...]) -> str:
    return (
        f"the optimizer state has {parameter}, where this model has {name!r} of shape {shape}: it belongs to another "
        "model; build the optimizer over the model that was trained"
    )
