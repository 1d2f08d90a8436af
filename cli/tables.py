"""Text tables of all commands."""

from __future__ import annotations

import io
from collections.abc import Sequence

__all__ = ["text_table"]


def text_table(rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """The lines of a table, its columns two spaces apart.

    Args:
        rows: Cells; the first row is the head.
        left: Number of columns, from the first on, that are aligned to the left; the others are to the right.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0), collapse_padding=True)
    for number in range(len(rows[0])):
        table.add_column(justify="left" if number < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # A file, not a terminal: no colours, no line breaks, and no cell is read as markup.
    console = Console(file=io.StringIO(), width=10_000, color_system=None, markup=False, emoji=False, highlight=False)
    with console.capture() as captured:
        console.print(table)
    return [line.rstrip() for line in captured.get().splitlines()]
