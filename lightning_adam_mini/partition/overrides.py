"""Overrides: cuts that the user gives by role, by parameter name or by pattern."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from lightning_adam_mini.partition.roles import ParameterRole, Role
from lightning_adam_mini.partition.strategies import Strategy, Structure

__all__ = ["Overrides"]


class Overrides:
    """Cuts by role, name or pattern, in order; it remembers which were used.

    Args:
        rules: Structure by role, name or `re:` pattern.
        plain_names: Names without what wrappers add, by the full names of parameters; both match.

    Raises:
        ValueError: A cut or a pattern that is not valid, or patterns that contradict each other.
    """

    def __init__(self, rules: Mapping[str, str], plain_names: Mapping[str, str]) -> None:
        self._plain_names = plain_names
        self._rules: dict[str, Structure] = {}
        self._patterns: dict[str, re.Pattern[str]] = {}
        self._used: set[str] = set()
        for key, cut in rules.items():
            if not isinstance(key, str):
                raise ValueError(f"partition_overrides: {key!r} is no role, name or pattern")
            if cut not in list(Structure):
                raise ValueError(
                    f"partition_overrides: unknown cut {cut!r} for {key!r}; choose from {', '.join(Structure)}"
                )
            self._rules[key] = Structure(cut)
            if key.startswith("re:"):
                try:
                    self._patterns[key] = re.compile(key.removeprefix("re:"))
                except re.error as error:
                    raise ValueError(f"partition_overrides: {key!r} is no regular expression: {error}") from error
        self._raise_if_contradictory()

    def cuts(self, name: str, role: ParameterRole, strategy: Strategy) -> tuple[dict[Role, Structure], str]:
        """The cut of each part of a parameter, and why."""
        cuts, reasons = {}, []
        for part_role in role.roles:
            key = next((key for key in self._rules if self._matches(key, name, part_role)), None)
            if key is None:
                cuts[part_role] = strategy.structure(part_role)
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
            near = difflib.get_close_matches(key, list(self._plain_names.values()), n=3)
            present = dict.fromkeys(part.value for role in roles.values() for part in role.roles)
            hint = f"did you mean {', '.join(near)}?" if near else f"this model has the roles {', '.join(present)}"
            raise ValueError(f"partition_overrides: {key!r} matches no parameter; {hint}")

    def _raise_if_contradictory(self) -> None:
        """Raise where two patterns of different cuts overlap and neither lies within the other.

        Roles are left out: a role before or after a name is a choice of which comes first, and so is a pattern before a
        wider one.
        """
        matched = {key: {name for name in self._plain_names if self._names(key, name)} for key in self._rules}
        decided: set[str] = set()
        for number, first in enumerate(matched):
            for second in list(matched)[number + 1 :]:
                both = (matched[first] & matched[second]) - decided
                differ = self._rules[first] != self._rules[second]
                if both and differ and not matched[first] <= matched[second] and not matched[second] <= matched[first]:
                    raise ValueError(
                        f"partition_overrides: {first!r} and {second!r} both match {min(both)} and ask for different "
                        f"cuts; make one of them narrower, or put a pattern for what they share before both"
                    )
            decided |= matched[first]

    def _matches(self, key: str, name: str, role: Role) -> bool:
        return key == role.value or self._names(key, name)

    def _names(self, key: str, name: str) -> bool:
        plain_name, pattern = self._plain_names.get(name, name), self._patterns.get(key)
        if pattern is not None:
            return pattern.fullmatch(plain_name) is not None or pattern.fullmatch(name) is not None
        return key in (name, plain_name)
