"""What all commands save and log: settings, versions, tables and pictures, a page with all of them, and progress."""

from __future__ import annotations

import base64
import json
import logging
import math
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_adam_mini.measure import describe_machine, package_versions

from ...tasks.atomic_files import write_text
from ...tasks.plots import save_figure
from ..tables import text_table
from .problem import Problem

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["HessianReport", "PageTable", "common_settings", "finite", "log_duration", "log_each"]

log = logging.getLogger(__name__)
TEMPLATES = Path(__file__).parent / "templates"
_MEASURED, _LONG, _APART = 5.0, 20.0, 1.0
"""Seconds of work before an estimate, total seconds that are worth a line, and seconds between two lines."""


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
        write_text(folder / name, json.dumps(finite(content), indent=1, allow_nan=False) + "\n")
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


def finite(value: Any) -> Any:
    """A value for JSON: numbers that are not finite become None."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {str(key): finite(some) for key, some in value.items()}
        case list() | tuple():
            return [finite(some) for some in value]
    return value


def log_duration(what: str, clock: Callable[[], float] = time.perf_counter) -> Callable[[float, float], None]:
    """A function of the work done and the work in all that logs once how long all of it takes, where that is long.

    Args:
        what: The work, for the line.
        clock: Returns seconds.
    """
    start, is_logged = clock(), False

    def update(done: float, total: float) -> None:
        nonlocal is_logged
        elapsed = clock() - start
        if is_logged or not done or done >= total or elapsed < _MEASURED:
            return
        is_logged = True
        if (seconds := elapsed / done * total) >= _LONG:
            log.info("%s: about %s in all", what, _duration(seconds))

    return update


def log_each(
    what: str, weights: Sequence[float] | None = None, clock: Callable[[], float] = time.perf_counter
) -> Callable[[str, int, int], None]:
    """A function for the start of each piece of work that logs its name and number, at most once a second.

    Args:
        what: The work, for the line about the whole duration.
        weights: How long each piece takes, in any unit; the same by default.
        clock: Returns seconds.
    """
    duration, last = log_duration(what, clock), -math.inf

    def update(name: str, number: int, total: int) -> None:
        nonlocal last
        if (now := clock()) - last >= _APART:
            log.info("%d of %d: %s", number, total, name)
            last = now
        shares = [1.0] * total if weights is None else weights
        duration(sum(shares[: number - 1]), sum(shares))

    return update


def _duration(seconds: float) -> str:
    for name, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {name}" if seconds < 10 * length else f"{seconds / length:.0f} {name}"
    return f"{seconds:.0f} seconds"
