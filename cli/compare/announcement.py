"""What a comparison is about to do, in words."""

from __future__ import annotations

import shlex
from pathlib import Path

from .grid import Grid, format_lr
from .notes import settings_of
from .progress import say
from .status import FINISHED, read_status

__all__ = ["tell_commands", "tell_plan"]


def tell_plan(grid: Grid, out: Path, num_jobs: int | None, threads: int | None) -> None:
    """Print how many runs there are, with which learning rates, and what else a user must know of them.

    Args:
        grid: The runs.
        out: Folder of the comparison.
        num_jobs: Runs at a time; None for no limit.
        threads: Threads of each; None where its job decides.
    """
    plan, tuning = grid.plan, grid.tuning_runs()
    others = len(plan.seeds) - len(plan.tuning_seeds)
    num_final = others * len(grid.lrs)
    done = sum(read_status(out / grid.folder(run))["status"] in FINISHED for run in tuning)
    num_lrs = len(next(iter(grid.lrs.values())))
    say(
        f"{len(grid.recipes)} recipe(s) x {len(grid.optimizers)} optimizer(s) x {num_lrs} learning rate(s) x "
        f"{len(plan.tuning_seeds)} tuning seed(s): {len(tuning)} runs, {done} of them finished"
    )
    if others:
        say(
            f"then {others} more seed(s) at each best learning rate: {num_final} runs; {len(tuning) + num_final} in all"
        )
    for name in grid.recipes:
        by_lrs: dict[str, list[str]] = {}
        for label in grid.optimizers:
            by_lrs.setdefault(" ".join(map(format_lr, grid.lrs[name, label])), []).append(label)
        say(f"  {name}: " + "; ".join(f"lr {lrs} of {', '.join(labels)}" for lrs, labels in by_lrs.items()))
    say(f"reference {grid.reference}; seeds {' '.join(map(str, plan.seeds))}")
    if plan.common:
        say(f"all runs: {' '.join(plan.common)}")
    for note in settings_of(grid):
        say(f"note: {note}")
    at_a_time = "all at once" if num_jobs is None else f"{num_jobs} at a time"
    each = "as many threads as their jobs give them" if threads is None else f"{threads} thread(s) each"
    say(f"{at_a_time} with {each}, in {out}")


def tell_commands(grid: Grid, out: Path) -> None:
    """Print the command of each run."""
    for run in grid.tuning_runs():
        say(shlex.join(["adam-mini", *grid.arguments(run, out)]))
    if len(grid.plan.tuning_seeds) < len(grid.plan.seeds):
        say("and, once the best learning rates are known, the same with the other seeds")
