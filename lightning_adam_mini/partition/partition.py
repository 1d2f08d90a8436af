"""The partition of a model: roles, a strategy and overrides brought together."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from lightning_adam_mini.blocks import Blocks
from lightning_adam_mini.partition.inference import has_tokens, infer_roles
from lightning_adam_mini.partition.roles import ParameterRole, Part, Role
from lightning_adam_mini.partition.strategies import STRATEGIES, Cut, Strategy, cut_parameter

__all__ = ["CutParameter", "Overrides", "partition_module", "partition_tensors", "resolve_strategy"]

WRAPPER_PREFIXES = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"})


@dataclass(frozen=True)
class CutParameter:
    """One row of a partition: a parameter, what it does and how it is cut.

    Args:
        name: Its name in `module.named_parameters()`.
        role: What it does.
        blocks: How it is cut.
        why: The rule or override that decided.
    """

    name: str
    role: ParameterRole
    blocks: Blocks
    why: str


def partition_module(
    module: nn.Module, strategy: str | Strategy = "auto", overrides: Mapping[str, str] | None = None
) -> dict[str, CutParameter]:
    """Cut every parameter of a model.

    Args:
        module: The model.
        strategy: Name of a strategy, or one of your own. `auto` takes `transformer` where the model looks tokens
            up or attends over them, else `default`.
        overrides: Cuts by role (`value`), parameter name (`lm_head.weight`) or pattern over whole names
            (`re:.*router.*`). The first that matches a parameter wins.

    Returns:
        Cut parameters by name, in the order of `module.named_parameters()`.

    Raises:
        ValueError: An unknown strategy or cut, an override that matches nothing, or a parameter that cannot be cut as
            asked.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    return cut_parameters(shapes, infer_roles(module), resolve_strategy(strategy, module), overrides)


def partition_tensors(
    shapes: Mapping[str, tuple[int, ...]], strategy: str | Strategy = "auto", overrides: Mapping[str, str] | None = None
) -> dict[str, CutParameter]:
    """Cut parameters of which nothing but names and shapes is known: all have `Role.OTHER`.

    Raises:
        ValueError: The strategy decides by role, or as for `partition_module`.
    """
    table = resolve_strategy(strategy, None)
    if table.cuts:
        raise ValueError(
            f"partition {table.name!r} needs to know what each parameter does: pass the model itself, as in "
            f"AdamMini(model, ...), or beside your groups, as in AdamMini(groups, ..., module=model)"
        )
    roles = {
        name: ParameterRole((Part(Role.OTHER, shape[0] if shape else 1),), "no module given", 0 if shape else None)
        for name, shape in shapes.items()
    }
    return cut_parameters(shapes, roles, table, overrides)


def cut_parameters(
    shapes: Mapping[str, tuple[int, ...]],
    roles: Mapping[str, ParameterRole],
    strategy: Strategy,
    overrides: Mapping[str, str] | None,
) -> dict[str, CutParameter]:
    """Cut parameters of known roles by a strategy and overrides.

    Raises:
        ValueError: As for `partition_module`.
    """
    rules = Overrides(overrides or {})
    partition = {}
    for name, role in roles.items():
        cuts, why = rules.cuts(name, role, strategy)
        partition[name] = CutParameter(name, role, cut_parameter(name, shapes[name], role, cuts), why)
    rules.raise_if_unused(roles)
    return partition


def resolve_strategy(strategy: str | Strategy, module: nn.Module | None) -> Strategy:
    """The strategy of a name; `auto` looks at the module.

    Raises:
        ValueError: No strategy has that name.
    """
    if isinstance(strategy, Strategy):
        return strategy
    if strategy == "auto":
        return STRATEGIES["transformer" if module is not None and has_tokens(module) else "default"]
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown partition {strategy!r}; choose from auto, {', '.join(STRATEGIES)}")
    return STRATEGIES[strategy]


class Overrides:
    """Cuts by role, name or pattern, in order; it remembers which were used.

    Args:
        rules: Cut by role, name or `re:` pattern.

    Raises:
        ValueError: A cut or a pattern that is not valid.
    """

    def __init__(self, rules: Mapping[str, str]) -> None:
        self._rules: dict[str, Cut] = {}
        self._patterns: dict[str, re.Pattern[str]] = {}
        self._used: set[str] = set()
        for key, cut in rules.items():
            if cut not in list(Cut):
                raise ValueError(f"partition_overrides: unknown cut {cut!r} for {key!r}; choose from {', '.join(Cut)}")
            self._rules[key] = Cut(cut)
            if key.startswith("re:"):
                try:
                    self._patterns[key] = re.compile(key.removeprefix("re:"))
                except re.error as error:
                    raise ValueError(f"partition_overrides: {key!r} is no regular expression: {error}") from error

    def cuts(self, name: str, role: ParameterRole, strategy: Strategy) -> tuple[dict[Role, Cut], str]:
        """The cut of each part of a parameter, and why."""
        cuts, reasons = {}, []
        for part_role in role.roles:
            key = next((key for key in self._rules if self._matches(key, name, part_role)), None)
            if key is None:
                cuts[part_role] = strategy.cut(part_role)
            else:
                self._used.add(key)
                cuts[part_role] = self._rules[key]
                reasons.append(f"override {key!r}")
        return cuts, "; ".join([role.why, *dict.fromkeys(reasons)])

    def raise_if_unused(self, roles: Mapping[str, ParameterRole]) -> None:
        """Raise where an override decided nothing.

        Raises:
            ValueError: With the names that are near, or the roles that the model has.
        """
        for key in self._rules:
            if key in self._used:
                continue
            shadowed = any(self._matches(key, name, part) for name, role in roles.items() for part in role.roles)
            if shadowed:
                raise ValueError(f"partition_overrides: {key!r} comes after overrides that match all it would match")
            near = difflib.get_close_matches(key, [clean_name(name) for name in roles], n=3)
            present = dict.fromkeys(part.value for role in roles.values() for part in role.roles)
            hint = f"did you mean {', '.join(near)}?" if near else f"this model has the roles {', '.join(present)}"
            raise ValueError(f"partition_overrides: {key!r} matches no parameter; {hint}")

    def _matches(self, key: str, name: str, role: Role) -> bool:
        pattern = self._patterns.get(key)
        if pattern is not None:
            return pattern.fullmatch(clean_name(name)) is not None
        return key in (role.value, name, clean_name(name))


def clean_name(name: str) -> str:
    """A parameter's name without the prefixes that torch.compile, DDP, FSDP and checkpointing wrap around modules."""
    return ".".join(part for part in name.split(".") if part not in WRAPPER_PREFIXES)
