"""Four quadratics with heterogeneous and homogeneous blocks ("Why Transformers Need Adam", Cases 1 to 4).

Zhang et al. 2024. Cases 1 and 3 take eigenvalues of networks from files; cases 2 and 4 have the same nine eigenvalues
in three blocks, sorted into heterogeneous blocks or dealt to homogeneous ones.
"""

from __future__ import annotations

import csv
import statistics
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Generator

from .common.outcome import Claim, Outcome, Row, medians
from .common.quadratics import ScaledDescent, adam_scale, check_condition, random_quadratic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Settings", "read_spectra", "run"]

HETEROGENEOUS, HOMOGENEOUS = "heterogeneous blocks", "homogeneous blocks"
PAPER = "Why Transformers Need Adam, quadratic models"
Spectra = list[list[float]]


@dataclass(frozen=True)
class Settings:
    """Sizes of the study.

    Args:
        seeds: Of rotations and starts.
        top_eigenvalues: Largest eigenvalue of cases 2 and 4; a pair of cases for each.
        tolerance: Loss, relative to the first one, that iterations are counted to.
        heterogeneous_spectra: CSV with columns `block` and `eigenvalue` for case 1, a path or a file next to the
            packaged recipes (`heterogeneity` writes such files); None leaves case 1 out.
        homogeneous_spectra: The same for case 3.
    """

    seeds: list[int]
    top_eigenvalues: list[float]
    tolerance: float
    heterogeneous_spectra: str | None
    homogeneous_spectra: str | None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must be between 0 and 1, not {self.tolerance}")
        if low := [top for top in self.top_eigenvalues if top < 103]:
            raise ValueError(f"top_eigenvalues must be at least 103, above the other two blocks, not {low[0]}")
        check_condition("top_eigenvalues", max(self.top_eigenvalues))


def run(settings: Settings) -> Outcome:
    """Iterations of gradient descent and of Adam with a frozen second moment, each at its worst-case rate."""
    rows = [
        _row(case, kind, name, seed, spectra, settings.tolerance)
        for case, kind, name, spectra in _cases(settings)
        for seed in settings.seeds
    ]
    summary = medians(rows, ("case", "blocks", "spectrum"), ("gd", "adam", "condition_number", "adam_condition_number"))
    claims = [_claim(rows, line) for line in summary]
    return Outcome(rows, claims, partial(_draw, rows), size=(9, 4.5), summary=summary)


def read_spectra(path: str) -> Spectra:
    """Eigenvalues by block from a CSV.

    Raises:
        ValueError: A column is missing, a value is no positive number, or two are too far apart.
        OSError: The file cannot be read.
    """
    blocks: dict[str, list[float]] = {}
    with _find(path).open(encoding="utf-8", newline="") as file:
        try:
            rows = list(csv.DictReader(file))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no CSV: {error}") from error
    for number, row in enumerate(rows, 2):
        try:
            block, value = row["block"], float(row["eigenvalue"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: give columns block and eigenvalue (a number)") from error
        if not 0 < value < float("inf"):
            raise ValueError(
                f"{path}, line {number}: eigenvalue {value}; Adam's bound needs positive ones, so drop others"
            )
        blocks.setdefault(block, []).append(value)
    if not blocks:
        raise ValueError(f"{path}: no line with an eigenvalue")
    every = [value for values in blocks.values() for value in values]
    check_condition(path, max(every) / min(every))
    return list(blocks.values())


def _find(path: str) -> Path:
    """The file of a path, else of that name next to the packaged recipes."""
    given = Path(path).expanduser()
    packaged = Path(str(files("lightning_adam_mini.configs"))) / "studies" / path
    return packaged if packaged.is_file() and not given.is_file() else given


def _cases(settings: Settings) -> list[tuple[int, str, str, Spectra]]:
    """Number, kind, name of the spectrum and eigenvalues by block."""
    cases: list[tuple[int, str, str, Spectra]] = []
    if settings.heterogeneous_spectra:
        path = settings.heterogeneous_spectra
        cases.append((1, HETEROGENEOUS, Path(path).name, read_spectra(path)))
    if settings.homogeneous_spectra:
        path = settings.homogeneous_spectra
        cases.append((3, HOMOGENEOUS, Path(path).name, read_spectra(path)))
    for top in settings.top_eigenvalues:
        blocks = [[1.0, 2.0, 3.0], [99.0, 100.0, 101.0], [top - 2, top - 1, top]]
        cases.append((2, HETEROGENEOUS, f"1 to {top:.12g}", blocks))
        cases.append((4, HOMOGENEOUS, f"1 to {top:.12g}", [list(column) for column in zip(*blocks, strict=True)]))
    return cases


def _row(case: int, kind: str, name: str, seed: int, spectra: Spectra, tolerance: float) -> Row:
    problem = random_quadratic(spectra, Generator().manual_seed(seed))
    plain, adam = ScaledDescent(problem), ScaledDescent(problem, adam_scale(problem))
    return {
        "case": case,
        "blocks": kind,
        "spectrum": name,
        "seed": seed,
        "gd": plain.iterations_to(tolerance, plain.worst_case_rate),
        "adam": adam.iterations_to(tolerance, adam.worst_case_rate),
        "condition_number": plain.condition_number,
        "adam_condition_number": adam.condition_number,
    }


def _claim(rows: list[Row], line: Row) -> Claim:
    """Adam is 20 times as fast as gradient descent on heterogeneous blocks, and about as fast on homogeneous ones."""
    own = [row for row in rows if (row["case"], row["spectrum"]) == (line["case"], line["spectrum"])]
    faster = sum(row["adam"] < row["gd"] for row in own)
    ratios = [row["gd"] / row["adam"] for row in own]
    # quantiles() needs two numbers or more.
    low, _, high = statistics.quantiles(ratios * 2 if len(ratios) == 1 else ratios, n=4, method="inclusive")
    ratio = line["gd"] / line["adam"]
    measured = (
        f"median iterations GD {line['gd']:.0f}, Adam {line['adam']:.0f}; Adam faster on {faster} of {len(own)} seeds; "
        f"quartiles of GD / Adam {low:.2g} and {high:.2g}"
    )
    if line["blocks"] == HETEROGENEOUS:
        text, holds = "the median of Adam is at least 20 times as fast as GD", ratio >= 20
    else:
        text, holds = "the median of Adam is at most twice as fast as GD", ratio <= 2
    return Claim(f"case {line['case']} ({line['blocks']}, {line['spectrum']}): {text}", holds, measured, PAPER)


def _draw(rows: list[Row], figure: Figure) -> None:
    axes = figure.subplots()
    groups = list(dict.fromkeys((row["case"], row["blocks"], row["spectrum"]) for row in rows))
    for offset, method, color in ((-0.15, "gd", "tab:orange"), (0.15, "adam", "tab:blue")):
        series = [[row[method] for row in rows if (row["case"], row["blocks"], row["spectrum"]) == g] for g in groups]
        boxes = axes.boxplot(
            series,
            positions=[n + offset for n in range(len(groups))],
            widths=0.25,
            patch_artist=True,
            manage_ticks=False,
        )
        for box in boxes["boxes"]:
            box.set(facecolor=color, alpha=0.5)
        axes.plot([], [], color=color, label={"gd": "GD", "adam": "Adam, frozen v"}[method], linewidth=6, alpha=0.5)
    labels = [f"case {case}\n{blocks}\n{name}" for case, blocks, name in groups]
    axes.set_xticks(range(len(groups)), labels, fontsize=8)
    axes.set(yscale="log", ylabel="iterations to the tolerance")
    axes.legend()
