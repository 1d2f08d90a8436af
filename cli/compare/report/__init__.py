"""The report of `adam-mini compare`: a page, the same in Markdown, and tables for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..comparison import Comparison

__all__ = ["write_report"]


def write_report(comparison: Comparison, out: Path) -> dict[str, Path]:
    """Write the report of a comparison, also of one that is not complete.

    Each file is written beside its target and renamed; files of earlier reports are replaced.

    Args:
        comparison: What was found.
        out: Folder of the comparison.

    Returns:
        What is in each file -> the file: `page` (`report.html`, one file that needs no other), `markdown`
        (`report.md`, with the charts in `figures/`), `runs` (`report.csv`, a row for each run) and `summary`
        (`summary.csv`, a row for each optimizer on each task).
    """
    from .content import make_page
    from .files import write_csv, write_text
    from .html import render_html
    from .legend import legend_file
    from .render import FIGURES, render_markdown
    from .spreadsheets import RUN_COLUMNS, SUMMARY_COLUMNS, run_rows, summary_rows

    page = make_page(comparison)
    write_text(out / FIGURES / "legend.svg", legend_file(page.optimizers))
    for drawing in page.drawings:
        write_text(out / FIGURES / f"{drawing.name}.svg", drawing.file_text())
    return {
        "page": write_text(out / "report.html", render_html(page)),
        "markdown": write_text(out / "report.md", render_markdown(page)),
        "runs": write_csv(out / "report.csv", RUN_COLUMNS, run_rows(comparison)),
        "summary": write_csv(out / "summary.csv", SUMMARY_COLUMNS, summary_rows(comparison)),
    }
