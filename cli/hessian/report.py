"""What all commands save and log: settings, versions, tables and pictures, and a page with all of them."""

from __future__ import annotations

import base64
import logging
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_adam_mini.measure import describe_machine, package_versions

from ...tasks.atomic_files import write_json, write_text
from ...tasks.plots import save_figure
from ..tables import text_table
from .problem import Problem

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["HessianReport", "PageTable", "common_settings"]

log = logging.getLogger(__name__)
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class PageTable:
    """A table of texts.

    Args:
        title: Above it.
        columns: Names.
        rows: Texts.
        note: What the columns are, in a sentence.
        left: Number of columns, from the first on, that are aligned to the left.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    left: int = 1


@dataclass
class HessianReport:
    """The results of a command: values as JSON, tables and pictures.

    Args:
        options: Of the command line.
        settings: What was computed, by name.
        tables: In the order of the page.
        pictures: Captions and figures by the stems of their files.
        notes: Sentences, above the tables of the page.
    """

    options: Namespace
    settings: Mapping[str, Any]
    tables: list[PageTable] = field(default_factory=list)
    pictures: dict[str, tuple[str, Figure]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def write(self, name: str, values: Mapping[str, Any]) -> list[Path]:
        """Write the pictures, the page and, last, the values, each atomically.

        Args:
            name: Of the file with the values.
            values: For JSON; numbers that are not finite become null.

        Returns:
            The files.
        """
        folder, paths, images = self.options.out, [], []
        for stem, (caption, figure) in self.pictures.items():
            save_figure(figure, path := folder / f"{stem}.png")
            paths.append(path)
            images.append((caption, base64.b64encode(path.read_bytes()).decode("ascii")))
        write_text(folder / "report.html", self._page(images))
        content = {**self.settings, **values}
        write_json(folder / name, content, nan_as_null=True)
        return [*paths, folder / "report.html", folder / name]

    def log(self, paths: Sequence[Path]) -> None:
        """Log the tables, the notes and the files."""
        for table in self.tables:
            lines = text_table([table.columns, *table.rows], left=table.left)
            log.info("%s\n", "\n".join([table.title, *lines]))
        for note in self.notes:
            log.info("note: %s", note)
        log.info("wrote %s", ", ".join(map(str, paths)))

    def _page(self, images: Sequence[tuple[str, str]]) -> str:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
        machine = self.settings["hardware"]
        shown = {
            **{name: _words(value) for name, value in self.settings.items() if not isinstance(value, dict)},
            "machine": f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, threads: {machine['threads']}",
            "versions": ", ".join(f"{name} {version}" for name, version in self.settings["versions"].items()),
        }
        return environment.get_template("page.html.j2").render(
            title=f"Hessian of {self.options.recipe}",
            settings=shown,
            tables=self.tables,
            notes=self.notes,
            images=images,
        )


def common_settings(options: Namespace, problem: Problem) -> dict[str, Any]:
    """The settings, machine and versions that each file of values begins with."""
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


def _words(value: Any) -> str:
    match value:
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.4g}"
    return str(value)
