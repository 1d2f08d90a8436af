"""Strategies: tables from role to block structure, the user's overrides, and the blocks of one parameter.

`transformer`, `transformer_early` and `default` are the partitions of Zhang et al., "Adam-mini: Use Fewer Learning
Rates To Gain More" (2024): the final version's Algorithm 3, the first version's Algorithms 2 and 4, and the rule for
models that are no Transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from lightning_adam_mini.blocks import Blocks, Segment
from lightning_adam_mini.hints import did_you_mean
from lightning_adam_mini.partition.roles import ParameterRole, Part, Role

__all__ = [
    "EVIDENCE",
    "PAPERS",
    "RECOMMENDED",
    "STRATEGIES",
    "Overrides",
    "Strategy",
    "Structure",
    "StructureError",
    "partition_parameter",
]


class StructureError(ValueError):
    """A parameter that cannot have the block structure that was asked for.

    Args:
        problem: Why not.
        structures: Structures that it can have; the first one is advised.
    """

    def __init__(self, problem: str, *structures: Structure) -> None:
        super().__init__(problem)
        self.problem, self.structures = problem, structures


class Structure(StrEnum):
    """What the elements of a block are."""

    HEAD = "head"
    """The rows of an attention head."""
    ROW = "row"
    """One row: an output neuron, token, channel."""
    COLUMN = "column"
    """One column of a matrix: an input neuron, input channel, embedding dimension."""
    WHOLE = "whole"
    """The tensor; in a fused tensor whose parts differ in structure, the part."""
    ELEMENT = "element"
    """One element, as in AdamW."""
    FACTORED = "factored"
    """No blocks: a mean for each row and one for each column (Adafactor, Sec. 3)."""


@dataclass(frozen=True)
class Strategy:
    """A table from role to block structure.

    Args:
        name: Its name in recipes.
        structures: The block structure of each role.
        otherwise: The block structure of all other roles.
    """

    name: str
    structures: Mapping[Role, Structure]
    otherwise: Structure = Structure.ELEMENT

    def structure(self, role: Role) -> Structure:
        """The block structure of a role."""
        return self.structures.get(role, self.otherwise)

    def structures_of(self, roles: Iterable[Role]) -> dict[Role, Structure]:
        """The block structures of the parts of one parameter.

        The blocks of a tensor are along one axis. So where only some parts of a fused matrix would have columns, these
        have rows.
        """
        found = {role: self.structure(role) for role in roles}
        if len(set(found.values())) > 1:
            found = {role: Structure.ROW if own is Structure.COLUMN else own for role, own in found.items()}
        return found


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
            # and norms one number, as in the reference implementation.
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
            # Kalra et al., "When Can You Get Away with Low Memory Adam?" (2025), Table 1: SlimAdam's rule that needs no
            # run. It says nothing of convolutions and of linear layers outside of Transformers: they are AdamW's.
            Strategy(
                "slimadam",
                {
                    **dict.fromkeys((Role.QUERY, Role.KEY), Structure.ROW),
                    **dict.fromkeys((Role.TOKEN_EMBEDDING, Role.POSITION_EMBEDDING, Role.OUTPUT_HEAD), Structure.ROW),
                    **dict.fromkeys((Role.VALUE, Role.ATTENTION_OUTPUT, Role.MLP, Role.EXPERT), Structure.COLUMN),
                },
            ),
            Strategy("default", {}, otherwise=Structure.WHOLE),
            Strategy("element", {}, otherwise=Structure.ELEMENT),
        )
    }
)


RECOMMENDED = STRATEGIES["factored"]
"""The strategy that reports stand beside those of the papers; `docs/results.md` has the figures."""
EVIDENCE = "within AdamW's spread on six of six tasks of docs/results.md, where the paper's partition is behind on two"
"""Why it is recommended, in the words of a line of a report."""
PAPERS = ("transformer", "transformer_early", "default")
"""The partitions of the Adam-mini papers, which `RECOMMENDED` stands beside in reports."""


def partition_parameter(
    shape: tuple[int, ...], role: ParameterRole, structures: Mapping[Role, Structure], *, is_overridden: bool = False
) -> Blocks:
    """The blocks of one parameter.

    Args:
        shape: Its shape.
        role: Its role, with several parts if it is fused.
        structures: The block structure for each role of its parts.
        is_overridden: Whether the user chose these structures, and not a strategy for all tensors.

    Raises:
        StructureError: Heads of unknown size, columns of a vector, or structures of a fused parameter that one tensor
            cannot combine.
    """
    wanted = {structures[part.role] for part in role.parts}
    unknown_heads = any(structures[part.role] is Structure.HEAD and part.head_dim is None for part in role.parts)
    if Structure.HEAD in wanted and (role.problem or unknown_heads):
        is_query_or_key = role.roles in ((Role.QUERY,), (Role.KEY,))
        possible = (Structure.ROW, Structure.WHOLE) if is_query_or_key else (Structure.ROW,)
        raise StructureError(role.problem or f"{role.name} has no heads", *possible)
    is_full = wanted == {Structure.ELEMENT}
    if len(shape) <= 1:  # a vector has nothing to factor, and no columns; who asks for these by an override is told
        is_full = is_full or wanted == {Structure.FACTORED} or (wanted == {Structure.COLUMN} and not is_overridden)
    if role.axis is None or is_full:
        return Blocks.element(shape)
    if wanted == {Structure.WHOLE}:
        # A strategy means the tensor, a user who overrides stacked matrices means each of them.
        is_one = role.roles == (Role.CONV,) or (role.roles == (Role.OTHER,) and not is_overridden)
        return Blocks.whole(shape, batch_axes=() if is_one else role.batch_axes)
    if wanted == {Structure.ROW}:
        return Blocks.rows(shape, axis=role.axis, batch_axes=role.batch_axes)
    if wanted == {Structure.COLUMN}:
        return Blocks.rows(shape, axis=_column_axis(shape, role), batch_axes=role.batch_axes)
    if wanted == {Structure.FACTORED}:
        lengths = tuple(part.length for part in role.parts)
        return Blocks.factored(
            shape, axis=role.axis, batch_axes=role.batch_axes, segment_lengths=lengths, repeats=role.repeats
        )
    if wanted & {Structure.COLUMN, Structure.ELEMENT, Structure.FACTORED}:
        raise StructureError(
            f"the parts of a fused parameter ({role.name}) cannot combine column, element or factored with other "
            f"structures; give all parts the same",
            Structure.FACTORED,
        )
    segments = tuple(_segment(part, structures[part.role], role.repeats) for part in role.parts)
    return Blocks.segmented(shape, segments, axis=role.axis, repeats=role.repeats, batch_axes=role.batch_axes)


def _column_axis(shape: tuple[int, ...], role: ParameterRole) -> int:
    """The axis of the inputs: the first of the reduced axes, or where it has size 1, as in a class token, the next.

    In a fused parameter all parts have the same inputs.

    Raises:
        StructureError: The parameter has no second axis.
    """
    inputs = [axis for axis in range(len(shape)) if axis != role.axis and axis not in role.batch_axes]
    if not inputs:
        raise StructureError(f"a parameter of shape {shape} has no columns", Structure.ELEMENT)
    if Role.CONV in role.roles:
        return inputs[0]  # input channels, even if there is one
    return next((axis for axis in inputs if shape[axis] > 1), inputs[0])


def _segment(part: Part, structure: Structure, repeats: int) -> Segment:
    if structure is Structure.HEAD:
        assert part.head_dim is not None
        return Segment(part.length, part.head_dim)
    return Segment(part.length, 1 if structure is Structure.ROW else part.length * repeats)


class Overrides:
    """Block structures by role, name or pattern, in order; it records which are used.

    Args:
        rules: Structure by role, name or `re:` pattern.
        plain_names: Names without the prefixes of wrappers, by the full names of parameters; both match.

    Raises:
        ValueError: An unknown structure, an invalid pattern, or patterns that contradict each other.
    """

    def __init__(self, rules: Mapping[str, str], plain_names: Mapping[str, str]) -> None:
        self._plain_names = plain_names
        self._rules: dict[str, Structure] = {}
        self._patterns: dict[str, re.Pattern[str]] = {}
        self._used: set[str] = set()
        for key, structure in rules.items():
            if not isinstance(key, str):
                raise ValueError(f"partition_overrides: {key!r} is not a role, name or pattern")
            if structure not in list(Structure):
                raise ValueError(
                    f"partition_overrides: unknown block structure {structure!r} for {key!r}; choose from "
                    f"{', '.join(Structure)}"
                )
            self._rules[key] = Structure(structure)
            if key.startswith("re:"):
                try:
                    self._patterns[key] = re.compile(key.removeprefix("re:"))
                except re.error as error:
                    message = f"partition_overrides: {key!r} is not a valid regular expression: {error}"
                    raise ValueError(message) from error
        self._raise_if_contradictory()

    def structures(self, name: str, role: ParameterRole, strategy: Strategy) -> tuple[dict[Role, Structure], str]:
        """The block structure of each part of a parameter, and the reason."""
        structures, reasons = strategy.structures_of(role.roles), []
        for part_role in role.roles:
            key = next((key for key in self._rules if self._matches(key, name, part_role)), None)
            if key is not None:
                self._used.add(key)
                structures[part_role] = self._rules[key]
                reasons.append(f"override {key!r}")
        return structures, "; ".join([role.why, *dict.fromkeys(reasons)])

    def raise_if_unused(self, roles: Mapping[str, ParameterRole]) -> None:
        """Check that each override decided something.

        Raises:
            ValueError: One did not; the message has similar names, or the roles of the model.
        """
        for key in self._rules:
            if key in self._used:
                continue
            if any(self._matches(key, name, part) for name, role in roles.items() for part in role.roles):
                raise ValueError(f"partition_overrides: {key!r} has no effect: earlier overrides match all it matches")
            present = dict.fromkeys(part.value for role in roles.values() for part in role.roles)
            hint = did_you_mean(
                key, self._plain_names.values(), otherwise=f"; this model has the roles {', '.join(present)}"
            )
            raise ValueError(f"partition_overrides: {key!r} matches no parameter{hint}")

    def _raise_if_contradictory(self) -> None:
        """Check that no two patterns of different structures overlap, unless one contains the other.

        A wider pattern after a narrower one is a clear choice, and so is a role before or after a name: roles do not
        count here.
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
                        f"block structures; make one of them narrower, or put a pattern for their overlap first"
                    )
            decided |= matched[first]

    def _matches(self, key: str, name: str, role: Role) -> bool:
        return key == role.value or self._names(key, name)

    def _names(self, key: str, name: str) -> bool:
        plain_name, pattern = self._plain_names.get(name, name), self._patterns.get(key)
        if pattern is not None:
            return pattern.fullmatch(plain_name) is not None or pattern.fullmatch(name) is not None
        return key in (name, plain_name)
