"""The tables of verdicts: each optimizer on one task with its costs, and the verdicts of all tasks side by side."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from . import wording
from .names import task_names
from .tables import Cell, Column, Row, Table

if TYPE_CHECKING:
    from ..comparison import Comparison, Entry, TaskComparison
    from ..outcomes import ToTarget

__all__ = ["overview_table", "verdict_table"]

CHIPS = {
    "better": "better",
    "worse": "worse",
    "failed": "failed",
    "within the spread": "even",
    "reference": "even",
    "no verdict": "even",
}


def overview_table(comparison: Comparison) -> Table | None:
    """The verdicts of all tasks side by side; None where there is no more than one to show."""
    if len(comparison.tasks) < 2 or len(comparison.optimizers) < 2:
        return None
    names = task_names(comparison)
    rows = tuple(
        Row(
            wording.plain(optimizer),
            tuple(_verdict_cell(task.entry(optimizer)) for task in comparison.tasks),
            key=series,
        )
        for series, optimizer in enumerate(comparison.optimizers)
        if optimizer != comparison.reference
    )
    columns = (Column("optimizer"), *(Column(wording.shorten(names[task.recipe], 28)) for task in comparison.tasks))
    caption = f"Final figure against {wording.plain(comparison.reference)}, on each task."
    return Table(caption, columns, rows)


def verdict_table(comparison: Comparison, task: TaskComparison) -> Table:
    """What each optimizer came to on a task, and what it cost."""
    better = "less" if task.primary_metric.mode == "min" else "more"
    labels = (
        ("best lr", True),
        (f"final {wording.plain(task.primary_metric.label)}", True),
        (f"difference to {wording.plain(comparison.reference)}, 95\u00a0% interval", True),
        ("verdict", False),
        ("steps to target", True),
        ("time to target", True),
        ("time per step", True),
        ("optimizer's update", True),
        ("peak memory", True),
        ("optimizer state", True),
    )
    columns = (Column("optimizer"), *(Column(label, is_number) for label, is_number in labels))
    reference = next((entry for entry in task.entries if entry.optimizer == comparison.reference), None)
    rows = tuple(
        Row(
            wording.plain(entry.optimizer),
            _verdict_cells(entry, task, reference),
            key=series,
            tag="reference" if entry is reference else "",
        )
        for series, entry in enumerate(task.entries)
    )
    caption = (
        f"{better.capitalize()} is better. Mean ± sample standard deviation over seeds at the best learning rate; "
    )
    caption += f"× is the factor of {wording.plain(comparison.reference)}'s figure."
    return Table(caption, columns, rows)


def _verdict_cells(entry: Entry, task: TaskComparison, reference: Entry | None) -> tuple[Cell, ...]:
    other = None if reference is None or entry is reference else reference
    return (
        _rate_cell(entry),
        _final_cell(entry),
        _difference_cell(entry),
        _verdict_cell(entry),
        _target_cell(entry.steps_to_target, other.steps_to_target if other else None, task, entry, seconds=False),
        _target_cell(entry.seconds_to_target, other.seconds_to_target if other else None, task, entry, seconds=True),
        *(
            Cell(text, _ratio_notes(factor if other else None))
            for text, factor in (
                (wording.milliseconds(entry.costs.step_milliseconds), entry.ratios.step_milliseconds),
                (wording.milliseconds(entry.costs.optimizer_milliseconds), entry.ratios.optimizer_milliseconds),
                (wording.size(entry.costs.peak_memory_bytes), entry.ratios.peak_memory_bytes),
                (wording.size(entry.costs.optimizer_state_bytes), entry.ratios.optimizer_state_bytes),
            )
        ),
    )


def _rate_cell(entry: Entry) -> Cell:
    rates = sorted(entry.lrs)
    notes = [f"of {len(rates)}"] if len(rates) > 1 else ["the only one"] if rates else []
    return Cell(wording.learning_rate(entry.best_lr), tuple(notes))


def _final_cell(entry: Entry) -> Cell:
    final, num_runs = entry.final, len(entry.best_runs)
    if final is None:
        return Cell("no finished run")
    seeds = f"{final.n} seed{'s' * (final.n != 1)}"
    return Cell(
        wording.with_spread(final.mean, final.std), (f"{final.n} of {num_runs} seeds" if final.n < num_runs else seeds,)
    )


def _difference_cell(entry: Entry) -> Cell:
    verdict = entry.verdict
    if verdict.word == "reference" or verdict.difference is None:
        return Cell(wording.MISSING)
    if verdict.interval is None:
        places = wording.decimals_for(entry.final.mean, 4) if entry.final else None
        return Cell(wording.signed(verdict.difference, decimals=places), ("no interval",))
    low, high = verdict.interval
    places = wording.spread_decimals((high - low) / 2)
    text = f"{wording.signed(low, decimals=places)} to\u00a0{wording.signed(high, decimals=places)}"
    return Cell(wording.signed(verdict.difference, decimals=places), (text,))


def _verdict_cell(entry: Entry) -> Cell:
    verdict = entry.verdict
    # The chip says the word; what is left is the reason.
    reason = ""
    if verdict.word in ("no verdict", "failed"):
        reason = re.sub(r"(?:: )?no verdict(?:: )?", "", wording.plain(verdict.text))
    return Cell(verdict.word, (reason,) if reason else (), chip=CHIPS[verdict.word])


def _target_cell(
    reached: ToTarget, other: ToTarget | None, task: TaskComparison, entry: Entry, *, seconds: bool
) -> Cell:
    if task.target is None or entry.best_lr is None:
        return Cell(wording.MISSING)
    in_steps = sum(value is not None for value in entry.steps_to_target.by_seed.values())
    num_seeds, num_reached = len(reached.by_seed), sum(value is not None for value in reached.by_seed.values())
    if seconds and num_reached < in_steps:
        return Cell(wording.MISSING, ("time not logged",))
    if reached.median is None:
        return Cell("mostly never", (f"{num_reached} of {num_seeds} seeds did",)) if num_reached else Cell("never")
    notes = _ratio_notes(_quotient(reached.median, other.median)) if other else ()
    if num_reached < num_seeds:
        notes = (*notes, f"{num_reached} of {num_seeds} seeds")
    return Cell(wording.duration(reached.median) if seconds else wording.count(reached.median), notes)


def _quotient(value: float | None, reference: float | None) -> float | None:
    return None if value is None or not reference else value / reference


def _ratio_notes(factor: float | None) -> tuple[str, ...]:
    return () if factor is None or not math.isfinite(factor) else (wording.factor(factor),)
