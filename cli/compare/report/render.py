"""The report as files: one page of HTML that needs no other file, the same in Markdown, and CSV."""

from __future__ import annotations

import csv
import html
import re
from collections.abc import Iterable, Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from ....tasks.atomic_files import replacing
from .content import CommandGroup, Page, make_page
from .style import Chart
from .tables import RUN_COLUMNS, SUMMARY_COLUMNS, Cell, ReportTable, Row, run_rows, summary_rows
from .wording import plain

if TYPE_CHECKING:
    from ..analysis import Comparison

__all__ = ["write_report"]

FIGURES = "figures"
TEMPLATES = Path(__file__).parent / "templates"


def write_report(comparison: Comparison, out: Path) -> dict[str, Path]:
    """Write the report of a comparison, also of an incomplete one.

    Each file is written next to its target and renamed; files of earlier reports are replaced.

    Args:
        comparison: The comparison.
        out: Its folder.

    Returns:
        Kind of file -> the file: `page` (`report.html`, which needs no other file), `markdown` (`report.md`, with the
        charts in `figures/`), `runs` (`report.csv`, a row for each run) and `summary` (`summary.csv`, a row for each
        optimizer on each task).
    """
    page = make_page(comparison)
    for chart in page.charts:
        _write_text(out / FIGURES / f"{chart.name}.svg", chart.file_text())
    return {
        "page": _write_text(out / "report.html", _render_html(page)),
        "markdown": _write_text(out / "report.md", "\n\n".join(_markdown(page)) + "\n"),
        "runs": _write_csv(out / "report.csv", RUN_COLUMNS, run_rows(comparison)),
        "summary": _write_csv(out / "summary.csv", SUMMARY_COLUMNS, summary_rows(comparison)),
    }


def _write_text(path: Path, text: str) -> Path:
    """Write a text unchanged, with `?` for what UTF-8 cannot hold; readers see the old file or the new one."""
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8", errors="replace", newline="")
    return path


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    """Write a table as in RFC 4180; None is an empty field."""
    stream = StringIO()
    writer = csv.writer(stream)
    writer.writerow(columns)
    writer.writerows(rows)
    return _write_text(path, stream.getvalue())


def _render_html(page: Page) -> str:
    """The page; every text in it is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.globals["zip"] = zip
    style = (TEMPLATES / "report.css").read_text("utf-8")
    return environment.get_template("report.html.j2").render(page=page, style=style)


def _markdown(page: Page) -> Iterator[str]:
    """The blocks of the Markdown: the texts and tables of the page, in its order."""
    yield f"# {_text(page.title)}"
    yield _text(page.summary)
    if page.notes:
        yield "\n".join(f"- {_text(note)}" for note in page.notes)
    if page.overview:
        yield from _table(page.overview)
    for task in page.tasks:
        yield f"## {_text(task.name)}"
        yield _text(task.summary)
        yield from _table(task.verdicts)
        if task.notes:
            yield "\n".join(f"- {_text(note)}" for note in task.notes)
        yield from _pictures(task.charts)
    if page.across:
        yield "## Across tasks"
        yield from _pictures(page.across)
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
    yield "\n".join(f"- **{_text(term)}.** {_text(text)}" for term, text in page.definitions)


def _text(text: str) -> str:
    """A text without the meaning that HTML or Markdown would give it."""
    escaped = html.escape(" ".join(plain(text).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|#~$@])", r"\\\1", escaped)


def _table(table: ReportTable) -> Iterator[str]:
    yield _text(table.caption)
    lines = [
        [_text(column.label) for column in table.columns],
        ["--:" if column.is_number else "---" for column in table.columns],
        *([_name(row), *map(_cell, row.cells)] for row in table.rows),
    ]
    yield "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _name(row: Row) -> str:
    return f"**{_text(row.name)}**{f' ({row.tag})' if row.tag else ''}"


def _cell(cell: Cell) -> str:
    text = f"**{_text(cell.text)}**" if cell.chip in ("better", "worse") else _text(cell.text)
    return "<br>".join([text, *map(_text, cell.notes)])


def _pictures(charts: Sequence[Chart]) -> Iterator[str]:
    for chart in charts:
        yield f"![{_text(chart.title)}]({FIGURES}/{chart.name}.svg)"
        yield f"{_text(chart.title)}. {_text(chart.caption)}"


def _commands(group: CommandGroup) -> Iterator[str]:
    """A fence longer than any in the commands, folded because there may be hundreds."""
    text = "\n\n".join((f"# {command.label}\n" if command.label else "") + command.text for command in group.commands)
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    yield f"<details><summary>{html.escape(group.title)}</summary>"
    yield f"{fence}bash\n{text}\n{fence}"
    yield "</details>"
