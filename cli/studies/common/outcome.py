"""What a study leaves: rows, claims with what was measured, and a picture."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Claim", "Outcome", "Row", "as_csv", "as_text", "mean_and_spread", "medians"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """A sentence that a figure decides.

    Args:
        text: What is claimed, as a sentence.
        holds: Whether the measured figures agree.
        measured: Those figures, as text.
        source: Paper and figure or section; empty for a claim of our own.
    """

    text: str
    holds: bool
    measured: str
    source: str = ""


@dataclass(frozen=True)
class Outcome:
    """Everything that a study found.

    Args:
        rows: Lines of `table.csv`; all have the same columns.
        claims: What the study is about.
        draw: Draws into an empty figure.
        figures: More figures for `result.json`.
        size: Width and height of the picture in inches.
        summary: Lines for the terminal; all of `rows` where it is None.
    """

    rows: list[Row]
    claims: list[Claim]
    draw: Callable[[Figure], None]
    figures: dict[str, Any] = field(default_factory=dict)
    size: tuple[float, float] = (9.0, 4.0)
    summary: list[Row] | None = None

    def __post_init__(self) -> None:
        """Check that the rows are a table."""
        assert self.rows, "a study without rows"
        assert all(list(row) == list(self.rows[0]) for row in self.rows), "rows of several tables"


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of a sample; the latter is 0 for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def medians(rows: Sequence[Row], by: Sequence[str], of: Sequence[str]) -> list[Row]:
    """One line for each combination of `by` in the order of the rows, with medians of the columns `of`."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in by), []).append(row)
    return [
        dict(zip(by, key, strict=True)) | {column: statistics.median(row[column] for row in group) for column in of}
        for key, group in groups.items()
    ]


def as_csv(rows: Sequence[Row]) -> str:
    """Rows of the same columns as comma-separated values, the names of the columns first."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_text(rows: Sequence[Row]) -> str:
    """Rows as an aligned table, numbers with four digits."""
    lines = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
