"""An explanation as text for a terminal, with equal layers as one row."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import product
from typing import TYPE_CHECKING, TypeVar

from lightning_adam_mini.measure.memory import format_bytes
from lightning_adam_mini.partition import EVIDENCE, RECOMMENDED

if TYPE_CHECKING:
    from lightning_adam_mini.measure.explanation import ExplainedParameter, Explanation

__all__ = ["collapse", "collapse_names", "render", "template"]


def render(explanation: Explanation, *, full: bool) -> str:
    """See `Explanation.table`."""
    parts = [_rows(explanation, full=full), _roles(explanation), _totals(explanation)]
    parts += ["\n".join(f"warning: {warning}" for warning in explanation.warnings)]
    return "\n\n".join(part for part in parts if part)


def _rows(explanation: Explanation, *, full: bool) -> str:
    if not explanation.rows:
        return ""
    collapsed = collapse(explanation.rows, name=lambda row: row.name, alike=_likeness)
    if full:
        collapsed = [(row.name, [row]) for row in explanation.rows]
    is_verified = any(row.verified for row in explanation.rows)
    lines = [("parameter", "", "shape", "role", "structure", "blocks", "state", *["verified"] * is_verified, "why")]
    for name, members in collapsed:
        row, count = members[0], len(members)
        shape = " x ".join(map(str, row.shape)) or "()"
        why = row.why if count == 1 else _without_other_numbers(members)
        state = format_bytes(row.state_bytes)
        verified = [row.verified or ""] * is_verified
        times = f"x{count}" if count > 1 else ""
        lines.append((name, times, shape, row.role, row.structure, f"{row.blocks:,}", state, *verified, why))
    return _align(lines, right={1, 2, 5, 6})


def _likeness(row: ExplainedParameter) -> tuple[object, ...]:
    """What the rows of equal layers share; names in their reasons may differ in numbers, as their own names do."""
    return (row.shape, row.dtype, row.role, row.structure, row.blocks, row.verified, _unnumbered(row.why))


def _unnumbered(why: str) -> str:
    return re.sub(r"[^\s,;']+", lambda word: template(word[0]), why)


def _without_other_numbers(members: Sequence[ExplainedParameter]) -> str:
    """The reason of several rows, with `*` for the numbers in names where the reasons differ."""
    reasons = {row.why for row in members}
    return reasons.pop() if len(reasons) == 1 else _unnumbered(members[0].why)


def _roles(explanation: Explanation) -> str:
    lines = [("role", "tensors", "parameters", "second moment", "state", "AdamW")]
    lines += [
        (
            role,
            f"{totals.tensors:,}",
            f"{totals.elements:,}",
            f"{totals.blocks:,}",
            format_bytes(totals.state_bytes),
            format_bytes(totals.adamw_state_bytes),
        )
        for role, totals in explanation.role_totals.items()
    ]
    return _align(lines, right={1, 2, 3, 4, 5}) if explanation.rows else ""


def _totals(explanation: Explanation) -> str:
    totals = explanation.totals
    dtypes = ", ".join(dict.fromkeys(row.dtype for row in explanation.rows))
    lines = [
        ("partition", explanation.partition),
        ("parameters", f"{totals.elements:,} in {totals.tensors:,} tensors{f', {dtypes}' if dtypes else ''}"),
    ]
    if explanation.frozen_tensors:
        lines.append(("frozen", f"{explanation.frozen_elements:,} in {explanation.frozen_tensors:,} tensors, left out"))
    removed = f"{math.floor(100 * totals.second_moment_removed_percent) / 100:.2f} % removed"  # 100 only for all
    bytes_of_both = f"{format_bytes(totals.state_bytes)}, AdamW {format_bytes(totals.adamw_state_bytes)}"
    lines += [
        ("second moment", f"{totals.blocks:,} numbers of {totals.elements:,}, {removed}"),
        ("state", f"{bytes_of_both}: {_saving(totals.saving_percent)}"),
    ]
    if other := explanation.recommended:
        state = f"{format_bytes(other.state_bytes)}, {_saving(other.saving_percent)}"
        lines.append(("recommended", f"partition {RECOMMENDED.name}: {other.blocks:,} numbers, {state}; {EVIDENCE}"))
    return _align(lines, right=set())


def _saving(percent: float) -> str:
    return f"{percent:.2f} % saved" if percent >= 0 else f"{-percent:.2f} % more"


def _align(lines: Sequence[tuple[str, ...]], *, right: set[int]) -> str:
    """Columns two spaces apart; the last one is not padded."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


Item = TypeVar("Item")
Numbers = tuple[int, ...]


def template(name: str) -> str:
    """A name with `*` for each number between dots: equal for equal parts of equal layers."""
    return ".".join("*" if _is_number(segment) else segment for segment in name.split("."))


def collapse(
    items: Iterable[Item], *, name: Callable[[Item], str], alike: Callable[[Item], Hashable]
) -> list[tuple[str, list[Item]]]:
    """Group items that are alike and whose names differ in numbers only: `layers.0.w, layers.1.w` to `layers.{0,1}.w`.

    Args:
        items: Items with unique names.
        name: The name of an item.
        alike: The value that must be equal within a group.

    Returns:
        Pairs of a name and the items that it stands for, in the order of their first items. The braces in a name stand
        for exactly all combinations of the numbers in them, though a long list shows its ends alone.
    """
    groups: dict[Hashable, dict[Numbers, tuple[int, Item]]] = {}
    for position, item in enumerate(items):
        group = groups.setdefault((template(name(item)), alike(item)), {})
        group[_numbers(name(item))] = (position, item)
    found = []
    for group in groups.values():
        for sets in _products(list(group)):
            together = [group[combination] for combination in product(*sets)]
            found.append((together[0][0], _with_numbers(name(together[0][1]), sets), [item for _, item in together]))
    return [(pattern, members) for _, pattern, members in sorted(found, key=lambda entry: entry[0])]


def collapse_names(names: Iterable[str], *, limit: int = 6) -> str:
    """Names for a sentence: equal layers as one, at most `limit` of them."""
    collapsed = collapse(names, name=str, alike=lambda _: None)
    rest = sum(len(members) for _, members in collapsed[limit:])
    return ", ".join(pattern for pattern, _ in collapsed[:limit]) + (f" and {rest} more" if rest else "")


def _is_number(segment: str) -> bool:
    return segment.isdecimal() and segment == str(int(segment))


def _numbers(name: str) -> Numbers:
    return tuple(int(segment) for segment in name.split(".") if _is_number(segment))


def _products(combinations: Sequence[Numbers]) -> list[tuple[Numbers, ...]]:
    """Write combinations as products of sets: `(0, 0), (0, 1), (1, 0)` as `{0} x {0, 1}` and `{1} x {0}`."""
    if not combinations[0]:
        return [()]
    rests: dict[int, list[Numbers]] = {}
    for first, *rest in combinations:
        rests.setdefault(first, []).append(tuple(rest))
    with_same_rests: dict[frozenset[Numbers], list[int]] = {}
    for first, own in rests.items():
        with_same_rests.setdefault(frozenset(own), []).append(first)
    return [(tuple(firsts), *sets) for firsts in with_same_rests.values() for sets in _products(rests[firsts[0]])]


def _with_numbers(name: str, sets: Sequence[Numbers]) -> str:
    numbers = iter(sets)
    return ".".join(_braces(next(numbers)) if _is_number(segment) else segment for segment in name.split("."))


def _braces(numbers: Numbers, limit: int = 8) -> str:
    """One number as it is; several in braces, a run by its ends."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs]
    if len(parts) > limit:
        parts = [*parts[:2], "...", parts[-1]]
    return f"{{{','.join(parts)}}}"
