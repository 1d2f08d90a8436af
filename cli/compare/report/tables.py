"""The tables of the report, as text for readers and as rows of CSV for other programs."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from ..analysis import CostRatios
from ..run_records import Costs
from . import wording

if TYPE_CHECKING:
    from ..analysis import Comparison, OptimizerSummary, TaskComparison
    from ..run_records import RunRecord
    from ..stats import TimeToTarget

__all__ = [
    "RUN_COLUMNS",
    "SUMMARY_COLUMNS",
    "Cell",
    "Column",
    "ReportTable",
    "Row",
    "failures_table",
    "hardware_table",
    "overview_table",
    "run_rows",
    "summary_rows",
    "verdict_table",
    "versions_table",
]

COSTS = tuple(each.name for each in fields(Costs))
RATIOS = tuple(each.name for each in fields(CostRatios))
RUN_COLUMNS = (
    *("recipe", "optimizer", "lr", "seed", "status", "message", "is_best_lr", "is_tuning_seed"),
    *("primary_metric", "primary_metric_mode", "value", "selection", "steps", *COSTS),
    *("wall_seconds", "num_jobs", "folder", "command"),
)
SUMMARY_COLUMNS = (
    *("recipe", "optimizer", "is_reference", "options", "best_lr", "num_lrs", "primary_metric", "primary_metric_mode"),
    *("mean", "std", "n", "verdict", "difference", "interval_low", "interval_high", "p_value", "target"),
    *("steps_to_target", "seconds_to_target", *COSTS, *(f"{name}_ratio" for name in RATIOS), "message"),
)

CHIPS = {"better": "better", "worse": "worse", "failed": "failed"}
"""Verdict -> class of its cell; the others are neutral."""


@dataclass(frozen=True)
class Column:
    """Heading of a column; numbers are right-aligned."""

    label: str
    is_number: bool = False


@dataclass(frozen=True)
class Cell:
    """One cell.

    Args:
        text: Its content.
        notes: Less important lines below.
        chip: Kind of the verdict that it shows; empty for other cells.
        is_message: Whether it is running text with its own line breaks.
    """

    text: str
    notes: tuple[str, ...] = ()
    chip: str = ""
    is_message: bool = False


@dataclass(frozen=True)
class Row:
    """One row: its name, the other cells, and a word next to the name."""

    name: str
    cells: tuple[Cell, ...]
    tag: str = ""


@dataclass(frozen=True)
class ReportTable:
    """A caption, the columns with that of the names first, and the rows."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


def run_rows(comparison: Comparison) -> list[Sequence[object]]:
    """One row of `RUN_COLUMNS` for each run, in the order of the comparison."""

    def row(task: TaskComparison, summary: OptimizerSummary, run: RunRecord) -> Sequence[object]:
        return (
            *(run.recipe, run.optimizer, run.lr, run.seed, run.status, run.message),
            *(run.lr == summary.best_lr, run.seed in comparison.tuning_seeds),
            *(task.primary_metric.metric, task.primary_metric.mode, run.value, run.selection, run.steps),
            *(getattr(run.costs, name) for name in COSTS),
            *(run.wall_seconds, run.num_jobs, run.folder, shlex.join(run.command)),
        )

    return [row(task, summary, run) for task in comparison.tasks for summary in task.summaries for run in summary.runs]


def summary_rows(comparison: Comparison) -> list[Sequence[object]]:
    """One row of `SUMMARY_COLUMNS` for each optimizer on each task."""

    def row(task: TaskComparison, summary: OptimizerSummary) -> Sequence[object]:
        final, verdict = summary.final, summary.verdict
        low, high = verdict.interval or (None, None)
        return (
            *(task.recipe, summary.optimizer, summary.optimizer == comparison.reference, shlex.join(summary.options)),
            *(summary.best_lr, len(summary.lrs), task.primary_metric.metric, task.primary_metric.mode),
            *((final.mean, final.std, final.n) if final else (None, None, 0)),
            *(verdict.word, verdict.difference, low, high, verdict.p_value, task.target),
            *(summary.steps_to_target.median, summary.seconds_to_target.median),
            *(getattr(summary.costs, name) for name in COSTS),
            *(getattr(summary.ratios, name) for name in RATIOS),
            summary.message,
        )

    return [row(task, summary) for task in comparison.tasks for summary in task.summaries]


def overview_table(comparison: Comparison, names: Mapping[str, str]) -> ReportTable | None:
    """The verdicts of all tasks next to each other; None if there is no more than one to show.

    Args:
        comparison: The comparison.
        names: Recipe -> its short name.
    """
    if len(comparison.tasks) < 2 or len(comparison.optimizers) < 2:
        return None
    rows = tuple(
        Row(wording.plain(optimizer), tuple(_verdict_cell(task.summary_of(optimizer)) for task in comparison.tasks))
        for optimizer in comparison.optimizers
        if optimizer != comparison.reference
    )
    columns = (Column("optimizer"), *(Column(wording.shorten(names[task.recipe], 28)) for task in comparison.tasks))
    return ReportTable(f"Final value against {wording.plain(comparison.reference)}, on each task.", columns, rows)


def verdict_table(comparison: Comparison, task: TaskComparison) -> ReportTable:
    """Values, verdicts and costs of each optimizer on a task."""
    reference = next((each for each in task.summaries if each.optimizer == comparison.reference), None)
    reference_name = wording.plain(comparison.reference)
    columns = (
        Column("optimizer"),
        Column("best lr", is_number=True),
        Column(f"final {wording.plain(task.primary_metric.label)}", is_number=True),
        Column(f"difference to {reference_name}, 95\u00a0% interval", is_number=True),
        Column("verdict"),
        Column("steps to target", is_number=True),
        Column("time to target", is_number=True),
        Column("time per step", is_number=True),
        Column("optimizer's update", is_number=True),
        Column("peak memory", is_number=True),
        Column("optimizer state", is_number=True),
    )
    rows = tuple(
        Row(
            wording.plain(summary.optimizer),
            _cells(summary, task, reference),
            tag="reference" if summary is reference else "",
        )
        for summary in task.summaries
    )
    better = "Less" if task.primary_metric.mode == "min" else "More"
    caption = (
        f"{better} is better. Mean ± sample standard deviation over seeds at the best learning rate; × is the factor "
        f"of {reference_name}'s value."
    )
    return ReportTable(caption, columns, rows)


def _cells(summary: OptimizerSummary, task: TaskComparison, reference: OptimizerSummary | None) -> tuple[Cell, ...]:
    other = None if summary is reference else reference
    rates = len(summary.lrs)
    costs, ratios = summary.costs, summary.ratios
    return (
        Cell(
            wording.learning_rate(summary.best_lr), (f"of {rates}" if rates > 1 else "the only one",) if rates else ()
        ),
        _final_cell(summary),
        _difference_cell(summary),
        _verdict_cell(summary),
        _target_cell(summary.steps_to_target, other.steps_to_target if other else None, task, summary, "steps"),
        _target_cell(summary.seconds_to_target, other.seconds_to_target if other else None, task, summary, "seconds"),
        *(
            Cell(text, _ratio_notes(factor if other else None))
            for text, factor in (
                (wording.milliseconds(costs.step_milliseconds), ratios.step_milliseconds),
                (wording.milliseconds(costs.optimizer_milliseconds), ratios.optimizer_milliseconds),
                (wording.size(costs.peak_memory_bytes), ratios.peak_memory_bytes),
                (wording.size(costs.optimizer_state_bytes), ratios.optimizer_state_bytes),
            )
        ),
    )


def _final_cell(summary: OptimizerSummary) -> Cell:
    final, num_runs = summary.final, len(summary.best_runs)
    if final is None:
        return Cell("no finished run")
    seeds = f"{final.n} of {num_runs} seeds" if final.n < num_runs else f"{final.n} seed{'s' * (final.n != 1)}"
    return Cell(wording.with_spread(final.mean, final.std), (seeds,))


def _difference_cell(summary: OptimizerSummary) -> Cell:
    verdict = summary.verdict
    if verdict.word == "reference" or verdict.difference is None:
        return Cell(wording.MISSING)
    if verdict.interval is None:
        places = wording.decimals_for(summary.final.mean, 4) if summary.final else None
        return Cell(wording.signed(verdict.difference, decimals=places), ("no interval",))
    low, high = verdict.interval
    places = wording.spread_decimals((high - low) / 2)
    text = f"{wording.signed(low, decimals=places)} to\u00a0{wording.signed(high, decimals=places)}"
    return Cell(wording.signed(verdict.difference, decimals=places), (text,))


def _verdict_cell(summary: OptimizerSummary) -> Cell:
    verdict = summary.verdict
    # The chip shows the word; what is left is the reason.
    reason = ""
    if verdict.word in ("no verdict", "failed"):
        reason = re.sub(r"(?:: )?no verdict(?:: )?", "", wording.plain(verdict.text))
    return Cell(verdict.word, (reason,) if reason else (), chip=CHIPS.get(verdict.word, "neutral"))


def _target_cell(
    reached: TimeToTarget, other: TimeToTarget | None, task: TaskComparison, summary: OptimizerSummary, axis: str
) -> Cell:
    if task.target is None or summary.best_lr is None:
        return Cell(wording.MISSING)
    in_steps = sum(value is not None for value in summary.steps_to_target.by_seed.values())
    num_seeds, num_reached = len(reached.by_seed), sum(value is not None for value in reached.by_seed.values())
    if axis == "seconds" and num_reached < in_steps:
        return Cell(wording.MISSING, ("time not logged",))
    if reached.median is None:
        return Cell("mostly never", (f"{num_reached} of {num_seeds} seeds did",)) if num_reached else Cell("never")
    notes = _ratio_notes(reached.median / other.median) if other and other.median else ()
    if num_reached < num_seeds:
        notes = (*notes, f"{num_reached} of {num_seeds} seeds")
    return Cell(wording.duration(reached.median) if axis == "seconds" else wording.count(reached.median), notes)


def _ratio_notes(factor: float | None) -> tuple[str, ...]:
    return () if factor is None or not math.isfinite(factor) else (wording.factor(factor),)


def failures_table(comparison: Comparison, names: Mapping[str, str]) -> ReportTable:
    """Every run that did not finish, with its reason.

    Args:
        comparison: The comparison.
        names: Recipe -> its short name.
    """
    columns = ("task", "optimizer", "lr", "seed", "status", "steps", "message")
    rows = tuple(
        Row(
            names[run.recipe],
            (
                Cell(wording.plain(run.optimizer)),
                Cell(wording.learning_rate(run.lr)),
                Cell(str(run.seed)),
                Cell(run.status, chip="neutral" if run.status in ("pending", "interrupted") else "failed"),
                Cell(wording.count(run.steps)),
                Cell(_message(run.message), is_message=True),
            ),
        )
        for run in comparison.runs
        if run.status != "done"
    )
    caption = f"{len(rows)} of {len(comparison.runs)} runs. They count in the budget."
    return ReportTable(caption, tuple(Column(each, each in ("lr", "seed", "steps")) for each in columns), rows)


def _message(text: str) -> str:
    """With its own line breaks, and no other control characters."""
    return "\n".join(wording.plain(line) for line in text.strip().splitlines()) or "no message"


def hardware_table(machine: Mapping[str, Any], caption: str) -> ReportTable:
    """One machine."""
    rows = []
    for name, value in machine.items():
        label, text = name.replace("_", " "), value
        if name.endswith("_bytes") and isinstance(value, int | float):
            label, text = label.removesuffix(" bytes"), wording.size(value)
        rows.append(Row(label, (Cell(wording.MISSING if text is None else wording.plain(str(text))),)))
    return ReportTable(caption, (Column("hardware"), Column("value")), tuple(rows))


def versions_table(versions: Mapping[str, str]) -> ReportTable:
    """The software."""
    rows = tuple(Row(wording.plain(name), (Cell(wording.plain(str(text))),)) for name, text in versions.items())
    return ReportTable("Software.", (Column("package"), Column("version")), rows)
