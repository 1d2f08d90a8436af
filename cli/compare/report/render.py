"""The report in Markdown, for places that show no page of HTML, with the charts as files beside it."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence

from .content import CommandGroup, Page
from .style import Drawing
from .tables import Cell, Row, Table
from .wording import plain

__all__ = ["FIGURES", "render_markdown"]

FIGURES = "figures"


def render_markdown(page: Page) -> str:
    """The same texts and tables as the page, in the same order."""
    return "\n\n".join(_blocks(page)) + "\n"


def _blocks(page: Page) -> Iterator[str]:
    yield f"# {_text(page.title)}"
    yield _text(page.summary)
    if page.notes:
        yield _list(page.notes)
    if page.overview:
        yield from _table(page.overview)
    for task in page.tasks:
        yield f"## {_text(task.name)}"
        yield _text(task.summary)
        yield from _table(task.verdicts)
        if task.notes:
            yield _list(task.notes)
        if task.drawings:
            yield _picture("legend", "Which line is which optimizer")
        yield from _drawings(task.drawings)
    if page.profiles:
        yield "## Across tasks"
        yield from _drawings(page.profiles)
    yield "## Failed, diverged and unfinished runs"
    if page.failures.rows:
        yield from _table(page.failures)
    else:
        yield "None: every run finished."
    yield "## Hardware and commands"
    if page.started:
        yield _text(f"First started {page.started}.")
    for table in page.conditions:
        yield from _table(table)
    for group in page.commands:
        yield from _commands(group)
    yield "## Definitions"
    yield _list([f"**{_text(term)}.** {_text(text)}" for term, text in page.definitions], escape=False)


def _text(text: str) -> str:
    """A text that means itself: no HTML, no Markdown."""
    escaped = html.escape(" ".join(plain(text).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|#~$@])", r"\\\1", escaped)


def _list(items: Sequence[str], *, escape: bool = True) -> str:
    return "\n".join(f"- {_text(item) if escape else item}" for item in items)


def _table(table: Table) -> Iterator[str]:
    yield _text(table.caption)
    lines = [
        [_text(column.label) for column in table.columns],
        ["--:" if c.is_number else "---" for c in table.columns],
    ]
    lines += [[_name(row), *map(_cell, row.cells)] for row in table.rows]
    yield "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _name(row: Row) -> str:
    return f"**{_text(row.name)}**{f' ({row.tag})' if row.tag else ''}"


def _cell(cell: Cell) -> str:
    text = f"**{_text(cell.text)}**" if cell.chip in ("better", "worse") else _text(cell.text)
    return "<br>".join([text, *map(_text, cell.notes)])


def _drawings(drawings: Sequence[Drawing]) -> Iterator[str]:
    for drawing in drawings:
        yield _picture(drawing.name, drawing.title)
        yield f"{_text(drawing.title)}. {_text(drawing.caption)}"


def _picture(name: str, title: str) -> str:
    return f"![{_text(title)}]({FIGURES}/{name}.svg)"


def _commands(group: CommandGroup) -> Iterator[str]:
    """A fence longer than any in the command, folded because there may be hundreds."""
    text = "\n\n".join((f"# {command.label}\n" if command.label else "") + command.text for command in group.commands)
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    yield f"<details><summary>{html.escape(group.title)}</summary>"
    yield f"{fence}bash\n{text}\n{fence}"
    yield "</details>"
