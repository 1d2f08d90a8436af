"""The outcome of a study: rows, claims with what was measured, a picture, and the files that they are written to."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....tasks.atomic_files import read_json, write_json, write_text
from ....tasks.plots import save_figure
from ...arguments import make_folder
from ...tables import text_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .study import Study

__all__ = [
    "Claim",
    "Outcome",
    "Row",
    "as_csv",
    "as_text",
    "heat_map",
    "lines_with_range",
    "mean_and_spread",
    "medians",
    "prepare_folder",
    "write_outcome",
]

TABLE, FIGURE, RESULT = "table.csv", "figure.png", "result.json"
Row = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """A sentence that a measurement decides.

    Args:
        text: What is claimed, as a sentence.
        holds: Whether the measured values agree.
        measured: Those values, as text.
        source: Paper and figure or section; empty for a claim of our own.
    """

    text: str
    holds: bool
    measured: str
    source: str = ""


@dataclass(frozen=True)
class Outcome:
    """All results of a study.

    Args:
        rows: Lines of `table.csv`; all have the same columns.
        claims: What the study is about.
        draw: Draws into an empty figure.
        values: More values for `result.json`.
        size: Width and height of the picture in inches.
        summary: Lines for the terminal; all of `rows` where it is None.
    """

    rows: list[Row]
    claims: list[Claim]
    draw: Callable[[Figure], None]
    values: dict[str, Any] = field(default_factory=dict)
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
    left = max((number for number, value in enumerate(rows[0].values(), 1) if isinstance(value, str)), default=1)
    cells = [[_cell(value) for value in row.values()] for row in rows]
    return "\n".join(text_table([list(rows[0]), *cells], left=left))


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def prepare_folder(folder: Path, name: str) -> None:
    """Make the folder, and check before the work that it takes the files of a study.

    Args:
        folder: Where an outcome will be written.
        name: Of the study; an earlier outcome of the same one is replaced.

    Raises:
        ValueError: The folder cannot be written to, or has a file of the same name that no run of this study wrote.
    """
    make_folder(folder)
    if taken := [file for file in (RESULT, TABLE, FIGURE) if (folder / file).exists()]:
        found = _study_of(folder / RESULT)
        if found != name:
            whose = f"of the study {found}" if found else "of no finished study"
            raise ValueError(f"{folder / taken[0]} is {whose}: give another folder with --out, or remove it")


def write_outcome(folder: Path, study: Study, outcome: Outcome, *, command: str, seconds: float) -> list[Path]:
    """Write `table.csv`, `figure.png` and, last, `result.json`, which exists only if it belongs to the other two.

    Args:
        folder: Where; see `prepare_folder`.
        study: With the settings, seeds among them.
        outcome: What it found.
        command: The command line.
        seconds: How long it took.

    Returns:
        The files.
    """
    from matplotlib.figure import Figure

    from lightning_adam_mini.measure import describe_machine, package_versions

    figure = Figure(figsize=outcome.size, layout="constrained")
    outcome.draw(figure)
    result = {
        "command": command,
        "study": study.name,
        "settings": asdict(study.settings),
        "claims": [asdict(claim) for claim in outcome.claims],
        "values": outcome.values,
        "seconds": round(seconds, 1),
        "hardware": describe_machine(),
        "versions": package_versions(),
    }
    paths = [folder / name for name in (TABLE, FIGURE, RESULT)]
    paths[-1].unlink(missing_ok=True)
    write_text(paths[0], as_csv(outcome.rows))
    save_figure(figure, paths[1])
    write_json(paths[2], result)
    return paths


def _study_of(result: Path) -> str | None:
    """The study whose result a file is, None if it is no such file."""
    study = read_json(result).get("study")
    return None if study is None else str(study)


def lines_with_range(
    axes: Axes,
    series: Sequence[Sequence[float]],
    label: str,
    *,
    at: Sequence[float] | None = None,
    band: bool = True,
    **style: Any,
) -> None:
    """Draw the median of several runs as a line, and from the least to the largest as a band.

    Args:
        axes: Where.
        series: One run each, of equal length.
        label: In the legend.
        at: Positions; 0, 1, ... by default.
        band: Whether to draw the range.
        style: Of the line.
    """
    columns = [
        [value for value in column if math.isfinite(value)] or [math.nan] for column in zip(*series, strict=True)
    ]
    places = list(at) if at is not None else list(range(len(columns)))
    (line,) = axes.plot(places, [statistics.median(column) for column in columns], label=label, **style)
    if band:
        axes.fill_between(
            places, [min(c) for c in columns], [max(c) for c in columns], color=line.get_color(), alpha=0.2
        )


def heat_map(
    axes: Axes,
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    low: float,
    high: float,
) -> None:
    """Draw numbers as colours, each written in its cell.

    Args:
        axes: Where.
        values: Row by row.
        rows: Names of the rows.
        columns: Names of the columns.
        low: Value of the first colour.
        high: Value of the last colour.
    """
    axes.imshow(values, vmin=low, vmax=high, cmap="viridis_r", aspect="auto")
    for number, row in enumerate(values):
        for place, value in enumerate(row):
            color = "white" if value > (low + high) / 2 else "black"
            axes.text(place, number, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
