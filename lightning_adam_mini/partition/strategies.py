"""Strategies: tables from role to cut, and the cut of one parameter by a table.

`transformer`, `transformer_early` and `default` are the partitions of Zhang et al., "Adam-mini: Use Fewer Learning
Rates To Gain More" (2024): the final version's Algorithm 3, the first version's Algorithms 2 and 4, and the rule for
models that are no Transformers.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from lightning_adam_mini.blocks import Blocks, Segment
from lightning_adam_mini.partition.roles import ParameterRole, Part, Role

__all__ = ["STRATEGIES", "Overrides", "Strategy", "Structure", "StructureError", "partition_parameter"]


class StructureError(ValueError):
    """A parameter that cannot be cut as asked.

    Args:
        problem: Why not.
        structures: Those that it can have, the one to advise first.
    """

    def __init__(self, problem: str, *structures: Structure) -> None:
        super().__init__(problem)
        self.problem, self.structures = problem, structures


class Structure(StrEnum):
    """How a parameter of some role is cut."""

    HEAD = "head"
    ROW = "row"
    WHOLE = "whole"
    """The tensor as one block; in a fused tensor whose other parts are cut otherwise, the part as one block."""
    ELEMENT = "element"
    FACTORED = "factored"


@dataclass(frozen=True)
class Strategy:
    """A table from role to cut.

    Args:
        name: The name that recipes use.
        structures: The block structure of each role.
        otherwise: The cut of roles that the table does not list.
    """

    name: str
    structures: Mapping[Role, Structure]
    otherwise: Structure = Structure.ELEMENT

    def structure(self, role: Role) -> Structure:
        """The block structure of a role."""
        return self.structures.get(role, self.otherwise)


MATRICES = (
    Role.TOKEN_EMBEDDING,
    Role.POSITION_EMBEDDING,
    Role.OUTPUT_HEAD,
    Role.QUERY,
    Role.KEY,
    Role.VALUE,
    Role.ATTENTION_OUTPUT,
    Role.MLP,
    Role.LINEAR,
    Role.EXPERT,
    Role.LORA,
    Role.CONV,
    Role.FUSED_QKV,
)
_HEADS = {Role.QUERY: Structure.HEAD, Role.KEY: Structure.HEAD, Role.FUSED_QKV: Structure.HEAD}

STRATEGIES: Mapping[str, Strategy] = MappingProxyType(
    {
        strategy.name: strategy
        for strategy in (
            # Query and key by head, every other matrix by output neuron or token. Biases keep a full second moment
            # and norms one number, as in the authors' released code.
            Strategy(
                "transformer",
                {
                    **dict.fromkeys(MATRICES, Structure.ROW),
                    **_HEADS,
                    Role.CONV: Structure.WHOLE,
                    Role.NORM: Structure.WHOLE,
                },
            ),
            # Embedding and output head keep a full second moment; query and key by head; the rest whole.
            Strategy(
                "transformer_early",
                {
                    **dict.fromkeys(MATRICES, Structure.WHOLE),
                    **_HEADS,
                    Role.TOKEN_EMBEDDING: Structure.ELEMENT,
                    Role.OUTPUT_HEAD: Structure.ELEMENT,
                    Role.NORM: Structure.WHOLE,
                    Role.BIAS: Structure.WHOLE,
                },
            ),
            # Ours, not the paper's: a factored second moment for matrices, a full one for vectors.
            Strategy("factored", dict.fromkeys(MATRICES, Structure.FACTORED)),
            Strategy("default", {}, otherwise=Structure.WHOLE),
            Strategy("element", {}, otherwise=Structure.ELEMENT),
        )
    }
)


def partition_parameter(
    shape: tuple[int, ...], role: ParameterRole, cuts: Mapping[Role, Structure], *, is_overridden: bool = False
) -> Blocks:
    """Cut one parameter.

    Args:
        shape: Its shape.
        role: Its role, with parts where it is fused.
        cuts: The cut for each role that the parameter has.
        is_overridden: Whether a user asked for these cuts, and not a strategy for all tensors.

    Returns:
        The blocks of the parameter.

    Raises:
        StructureError: A cut by head without a known head size, or parts of a fused parameter with cuts that one tensor
            cannot hold together.
    """
    wanted = {cuts[part.role] for part in role.parts}
    if Structure.HEAD in wanted and (role.problem or any(_lacks_head(part, cuts[part.role]) for part in role.parts)):
        of_one_role = (
            (Structure.ROW, Structure.WHOLE) if role.roles in ((Role.QUERY,), (Role.KEY,)) else (Structure.ROW,)
        )
        raise StructureError(role.problem or f"{role.name} has no heads to cut by", *of_one_role)
    if role.axis is None or wanted == {Structure.ELEMENT} or (len(shape) <= 1 and wanted == {Structure.FACTORED}):
        return Blocks.element(shape)
    if wanted == {Structure.WHOLE}:
        # A strategy of one block a tensor means it; a user who speaks of stacked matrices means each of them.
        is_one = role.roles == (Role.CONV,) or (role.roles == (Role.OTHER,) and not is_overridden)
        return Blocks.whole(shape, batch_axes=() if is_one else role.batch_axes)
    if wanted == {Structure.ROW}:
        return Blocks.rows(shape, axis=role.axis, batch_axes=role.batch_axes)
    if wanted == {Structure.FACTORED}:
        lengths = tuple(part.length for part in role.parts)
        return Blocks.factored(
            shape, axis=role.axis, batch_axes=role.batch_axes, segment_lengths=lengths, repeats=role.repeats
        )
    if wanted & {Structure.ELEMENT, Structure.FACTORED}:
        raise StructureError(
            f"the parts of a fused parameter ({role.name}) cannot mix element or factored with other cuts; all of "
            f"them need the same",
            Structure.FACTORED,
        )
    segments = tuple(_segment(part, cuts[part.role], role.repeats) for part in role.parts)
    return Blocks.segmented(shape, segments, axis=role.axis, repeats=role.repeats, batch_axes=role.batch_axes)


def _lacks_head(part: Part, cut: Structure) -> bool:
    return cut is Structure.HEAD and part.head_dim is None


def _segment(part: Part, cut: Structure, repeats: int) -> Segment:
    if cut is Structure.HEAD:
        assert part.head_dim is not None
        return Segment(part.length, part.head_dim)
    return Segment(part.length, 1 if cut is Structure.ROW else part.length * repeats)


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
