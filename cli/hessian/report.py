"""What all commands save: settings, versions, tables and pictures, and a page that holds them all."""

from __future__ import annotations

import base64
import io
import json
import logging
import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_adam_mini.measure import describe_machine, package_versions

from ...tasks.run_files import replacing, write_text
from .problem import Problem

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Report", "Table", "head", "text_table"]

log = logging.getLogger(__name__)
_WIDE = 40
"""Characters of a column that is a text."""
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Args:
        title: Above it.
        columns: Names.
        rows: Texts.
        note: What the columns are, in a sentence.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    @property
    def widths(self) -> list[int]:
        """Characters of the widest cell of each column."""
        return [max(map(len, cells)) for cells in zip(self.columns, *self.rows, strict=True)]

    @property
    def are_texts(self) -> list[bool]:
        """Which columns beside the first hold sentences, not figures."""
        return [number > 0 and width > _WIDE for number, width in enumerate(self.widths)]


@dataclass
class Report:
    """The outcome of a command: figures as JSON, tables and pictures.

    Args:
        options: Of the command line.
        settings: What was computed, by name.
        tables: In the order of the page.
        pictures: Captions and figures by the stems of their files.
        notes: Sentences, above the tables of the page.
    """

    options: Namespace
    settings: Mapping[str, Any]
    tables: list[Table] = field(default_factory=list)
    pictures: dict[str, tuple[str, Figure]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def write(self, name: str, figures: Mapping[str, Any]) -> list[Path]:
        """Write the pictures, the page and, last, the figures; each beside its place and then renamed.

        Args:
            name: Of the file with the figures.
            figures: For JSON; what is no finite number becomes null.

        Returns:
            The files.
        """
        folder, paths, images = self.options.out, [], []
        for stem, (caption, figure) in self.pictures.items():
            stream = io.BytesIO()
            figure.savefig(stream, dpi=120, format="png")
            with replacing(path := folder / f"{stem}.png") as beside:
                beside.write_bytes(stream.getvalue())
            paths.append(path)
            images.append((caption, base64.b64encode(stream.getvalue()).decode("ascii")))
        page = self._page(images)
        write_text(folder / "report.html", page)
        content = {**self.settings, **figures}
        write_text(folder / name, json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")
        return [*paths, folder / "report.html", folder / name]

    def tell(self, paths: Sequence[Path]) -> None:
        """Log the tables and the files."""
        for table in self.tables:
            log.info("%s\n", text_table(table))
        for note in self.notes:
            log.info("note: %s", note)
        log.info("wrote %s", ", ".join(map(str, paths)))

    def _page(self, images: Sequence[tuple[str, str]]) -> str:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
        machine = self.settings["hardware"]
        told = {
            **{name: _words(value) for name, value in self.settings.items() if not isinstance(value, dict)},
            "machine": f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, threads: {machine['threads']}",
            "versions": ", ".join(f"{name} {version}" for name, version in self.settings["versions"].items()),
        }
        return environment.get_template("page.html.j2").render(
            title=f"Hessian of {self.options.recipe}",
            settings=told,
            tables=self.tables,
            notes=self.notes,
            images=images,
        )


def head(options: Namespace, problem: Problem) -> dict[str, Any]:
    """What each file of figures begins with."""
    return {
        "command": options.command_line,
        "recipe": options.recipe,
        "weights": problem.weights,
        "task": type(problem.task).__name__,
        "parameters": sum(p.numel() for p in problem.task.parameters() if p.requires_grad),
        "batches": len(problem.batches),
        "precision": options.precision,
        "device": str(next(problem.task.parameters()).device),
        "seed": options.seed,
        "hardware": describe_machine(),
        "versions": package_versions(),
    }


def text_table(table: Table) -> str:
    """A table in columns: the first and texts to the left, the others to the right."""
    widths, are_texts = table.widths, table.are_texts
    lines = [
        "  ".join(
            text.ljust(width) if number == 0 or is_text else text.rjust(width)
            for number, (text, width, is_text) in enumerate(zip(row, widths, are_texts, strict=True))
        ).rstrip()
        for row in [table.columns, *table.rows]
    ]
    return "\n".join([table.title, *lines])


def _words(value: Any) -> str:
    match value:
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.4g}"
    return str(value)


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {str(key): _finite(some) for key, some in value.items()}
        case list() | tuple():
            return [_finite(some) for some in value]
    return value
