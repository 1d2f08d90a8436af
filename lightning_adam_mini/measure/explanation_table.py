"""An explanation as text for a terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_adam_mini.measure.collapse import collapse, template

if TYPE_CHECKING:
    from lightning_adam_mini.measure.explanation import ExplainedParameter, Explanation

__all__ = ["format_bytes", "render"]

UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def render(explanation: Explanation, *, full: bool) -> str:
    """See `Explanation.table`."""
    parts = [_rows(explanation, full=full), _roles(explanation), _totals(explanation)]
    parts += ["\n".join(f"warning: {warning}" for warning in explanation.warnings)]
    return "\n\n".join(part for part in parts if part)


def format_bytes(number: int) -> str:
    """Bytes in units of a power of 1000: 26.96 GB."""
    for size, unit in UNITS:
        if abs(number) >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number} B"


def _rows(explanation: Explanation, *, full: bool) -> str:
    if not explanation.rows:
        return ""
    collapsed = collapse(explanation.rows, name=lambda row: row.name, alike=_likeness)
    if full:
        collapsed = [(row.name, [row]) for row in explanation.rows]
    is_verified = any(row.verified for row in explanation.rows)
    lines = [("parameter", "", "shape", "role", "cut", "blocks", "state", *["verified"] * is_verified, "why")]
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
    """What equal layers have in common; names in the reason differ in numbers as their own do."""
    return (row.shape, row.dtype, row.role, row.structure, row.blocks, row.verified, _unnumbered(row.why))


def _unnumbered(why: str) -> str:
    return re.sub(r"[^\s,;']+", lambda word: template(word[0]), why)


def _without_other_numbers(members: Sequence[ExplainedParameter]) -> str:
    """The reason of several rows: as it is where it is the same, else with `*` for the numbers that differ."""
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
        left_out = f"{explanation.frozen_elements:,} in {explanation.frozen_tensors:,} tensors, left out"
        lines.append(("frozen", left_out))
    removed = f"{math.floor(100 * totals.second_moment_removed_percent) / 100:.2f} % removed"  # 100 only for all
    bytes_of_both = f"{format_bytes(totals.state_bytes)}, AdamW {format_bytes(totals.adamw_state_bytes)}"
    lines += [
        ("second moment", f"{totals.blocks:,} numbers of {totals.elements:,}, {removed}"),
        ("state", f"{bytes_of_both}: {_saving(totals.saving_percent)}"),
    ]
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
