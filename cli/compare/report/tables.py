"""Tables as texts, the same for every format of the report; those of runs, machines and software."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import wording
from .names import task_names

if TYPE_CHECKING:
    from ..comparison import Comparison

__all__ = ["Cell", "Column", "Row", "Table", "failures_table", "hardware_table", "versions_table"]


@dataclass(frozen=True)
class Column:
    """Heading of a column; numbers are aligned to the right."""

    label: str
    is_number: bool = False


@dataclass(frozen=True)
class Cell:
    """One cell.

    Args:
        text: What it says.
        notes: Less important lines below.
        chip: Kind of the verdict that it is; empty for other cells.
        is_message: Whether it is running text, with line breaks of its own.
    """

    text: str
    notes: tuple[str, ...] = ()
    chip: str = ""
    is_message: bool = False


@dataclass(frozen=True)
class Row:
    """One row: its name, the number of its series in the charts, a word beside the name, and the other cells."""

    name: str
    cells: tuple[Cell, ...]
    key: int | None = None
    tag: str = ""


@dataclass(frozen=True)
class Table:
    """A caption, the columns with that of the names first, and the rows."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


def failures_table(comparison: Comparison) -> Table:
    """Every run that did not come to its end, with its reason."""
    columns = ("task", "optimizer", "lr", "seed", "status", "steps", "message")
    numbers, names = {"lr", "seed", "steps"}, task_names(comparison)
    rows = tuple(
        Row(
            names[run.recipe],
            (
                Cell(wording.plain(run.optimizer)),
                Cell(wording.learning_rate(run.lr)),
                Cell(str(run.seed)),
                Cell(run.status, chip="even" if run.status in ("pending", "interrupted") else "failed"),
                Cell(wording.count(run.steps)),
                Cell(_message(run.message), is_message=True),
            ),
        )
        for run in comparison.runs
        if run.status != "done"
    )
    caption = f"{len(rows)} of {len(comparison.runs)} runs. They are counted, never left out of the budget."
    return Table(caption, tuple(Column(label, label in numbers) for label in columns), rows)


def _message(text: str) -> str:
    """With its own line breaks, and no other control characters."""
    return "\n".join(wording.plain(line) for line in text.strip().splitlines()) or "no message"


def hardware_table(machine: Mapping[str, Any], caption: str) -> Table:
    """One machine."""
    rows = []
    for name, value in machine.items():
        label, text = name.replace("_", " "), value
        if name.endswith("_bytes") and isinstance(value, int | float):
            label, text = label.removesuffix(" bytes"), wording.size(value)
        rows.append(Row(label, (Cell(wording.MISSING if text is None else wording.plain(str(text))),)))
    return Table(caption, (Column("hardware"), Column("value")), tuple(rows))


def versions_table(versions: Mapping[str, str]) -> Table:
    """The software."""
    rows = tuple(Row(wording.plain(name), (Cell(wording.plain(str(text))),)) for name, text in versions.items())
    return Table("Software.", (Column("package"), Column("version")), rows)
