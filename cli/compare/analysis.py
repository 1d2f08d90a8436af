"""One optimizer on one task, from its runs and those of the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import median
from typing import Any, Literal

from .comparison import Entry, LearningRate, Ratios
from .grid import Grid, format_lr
from .outcomes import ToTarget, Verdict
from .run_records import Costs, RunResult
from .stats import estimate, first_reaching, to_target, verdict
from .status import FINISHED

__all__ = ["Side", "make_entry"]

WORDS = {"timeout": "ran out of time", "interrupted": "was interrupted", "pending": "is pending"}
"""How a run ended, after its seed; other statuses are words of their own."""


@dataclass(frozen=True)
class Side:
    """The runs of one optimizer on one task, and the learning rate that was chosen from them."""

    label: str
    runs: tuple[RunResult, ...]
    best_lr: float | None

    def at(self, lr: float | None) -> tuple[RunResult, ...]:
        """Its runs with a learning rate."""
        return tuple(run for run in self.runs if run.lr == lr)

    @property
    def at_best(self) -> tuple[RunResult, ...]:
        """Its runs with the best learning rate."""
        return self.at(self.best_lr)

    @property
    def values(self) -> list[float]:
        """PrimaryMetric figures at the best learning rate."""
        return [run.value for run in self.at_best if run.value is not None]


def make_entry(grid: Grid, ours: Side, reference: Side, target: float | None, mode: Literal["min", "max"]) -> Entry:
    """What an optimizer came to on a task.

    Args:
        grid: The grid.
        ours: Its runs.
        reference: Those of the reference; the same for the reference itself.
        target: The target of the task.
        mode: Whether less (`min`) or more (`max`) is better.
    """
    tuning = grid.plan.tuning_seeds
    lrs, others = _learning_rates(ours, tuning), _learning_rates(reference, tuning)
    costs, other = _middle_costs(ours.at_best), _middle_costs(reference.at_best)
    is_reference = ours.label == reference.label
    return Entry(
        optimizer=ours.label,
        options=grid.optimizers[ours.label].arguments,
        lrs=lrs,
        best_lr=ours.best_lr,
        runs=ours.runs,
        final=estimate(ours.values),
        steps_to_target=_to_target(ours.at_best, target, mode, "step"),
        seconds_to_target=_to_target(ours.at_best, target, mode, "seconds"),
        costs=costs,
        ratios=Ratios(**{field.name: _ratio(costs, other, field.name) for field in fields(Ratios)}),
        verdict=Verdict(word="reference", text="reference")
        if is_reference
        else _verdict(ours, reference, mode, _num_unfinished(lrs) + _num_unfinished(others)),
        message=_message(ours, lrs, "" if is_reference else _left_out(others, f"{reference.label}'s ")),
    )


def _learning_rates(side: Side, tuning: tuple[int, ...]) -> dict[float, LearningRate]:
    return {lr: _learning_rate(lr, side.at(lr), tuning) for lr in sorted({run.lr for run in side.runs})}


def _learning_rate(lr: float, runs: Sequence[RunResult], tuning: tuple[int, ...]) -> LearningRate:
    on_tuning = [run for run in runs if run.seed in tuning]
    found = [run.selection for run in on_tuning if run.selection is not None]
    return LearningRate(
        lr=lr,
        values={run.seed: run.value for run in runs},
        statuses={run.seed: run.status for run in runs},
        tuning=estimate(found),
        unfinished=tuple(run.seed for run in on_tuning if run.status not in FINISHED),
        eligible=len(found) == len(tuning),
    )


def _verdict(ours: Side, reference: Side, mode: str, unfinished: int) -> Verdict:
    if ours.runs and all(run.status == "failed" for run in ours.runs):
        return Verdict(word="failed", text="every run failed")
    missing = sum(run.value is None for run in (*ours.at_best, *reference.at_best))
    return verdict(ours.values, reference.values, mode, missing=missing, unfinished=unfinished)


def _num_unfinished(lrs: Mapping[float, LearningRate]) -> int:
    return sum(len(rate.unfinished) for rate in lrs.values())


def _message(side: Side, lrs: Mapping[float, LearningRate], of_reference: str) -> str:
    """Why there is no figure, or what its reader must know."""
    if side.best_lr is None:
        return next((run.message for run in side.runs if run.message), "no run has come to its end")
    parts = []
    lost = [run for run in side.at_best if run.status != "done"]
    if not lrs[side.best_lr].eligible:
        parts.append("at each learning rate a seed did not come to its end: the best of the others")
    elif lost:
        told = f": {lost[0].message}" if lost[0].message else ""
        parts.append(_ends({run.seed: run.status for run in lost}) + told)
    if left_out := _left_out(lrs):
        parts.append(left_out)
    if of_reference:
        parts.append(of_reference)
    if len(lrs) > 2 and side.best_lr in (min(lrs), max(lrs)):
        place = "smallest" if side.best_lr == min(lrs) else "largest"
        parts.append(f"its best learning rate is the {place} of those tried: a better one may lie beyond")
    return "; ".join(parts)


def _left_out(lrs: Mapping[float, LearningRate], owner: str = "") -> str:
    """The learning rates that were not tried on all tuning seeds, for no fault of the optimizer's."""
    # Where each rate has lost a seed, none is left out.
    verb = " was left out" if any(rate.eligible for rate in lrs.values()) else ""
    return "; ".join(
        f"{owner}lr {format_lr(lr)}{verb}: {_ends({seed: rate.statuses[seed] for seed in rate.unfinished})}"
        for lr, rate in lrs.items()
        if rate.unfinished
    )


def _ends(statuses: Mapping[int, str]) -> str:
    """`seed 1 failed, seed 2 ran out of time`."""
    return ", ".join(f"seed {seed} {WORDS.get(status, status)}" for seed, status in statuses.items())


def _to_target(
    runs: Sequence[RunResult], target: float | None, mode: Literal["min", "max"], what: Literal["step", "seconds"]
) -> ToTarget:
    if target is None:
        return to_target({})
    # A run that diverged never gets there, whatever it reached before; one that was stopped might have.
    reached = {
        run.seed: first_reaching(run.curve, target, mode) if run.status == "done" else None
        for run in runs
        if run.status in FINISHED
    }
    if what == "seconds" and any(point is not None and point.seconds is None for point in reached.values()):
        return to_target({})  # not logged, which is not never
    return to_target({seed: None if point is None else getattr(point, what) for seed, point in reached.items()})


def _middle_costs(runs: Sequence[RunResult]) -> Costs:
    """Medians over the runs that came to their end."""
    found: dict[str, Any] = {}
    for name in (field.name for field in fields(Costs)):
        values = [value for run in runs if run.status == "done" and (value := getattr(run.costs, name)) is not None]
        found[name] = None if not values else values[0] if isinstance(values[0], str) else median(values)
    return Costs(**found)


def _ratio(ours: Costs, reference: Costs, name: str) -> float | None:
    one, other = getattr(ours, name), getattr(reference, name)
    return one / other if one is not None and other else None
