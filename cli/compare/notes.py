"""What a reader of a comparison must know: definitions, and settings that differ between optimizers or runs."""

from __future__ import annotations

from collections.abc import Sequence

from .grid import Grid
from .run_records import RunRecord
from .spec import own_weight_decay

__all__ = ["notes_of", "settings_of"]


def notes_of(grid: Grid, runs: Sequence[RunRecord]) -> list[str]:
    """Definitions and settings, one sentence or two each.

    Args:
        grid: The grid.
        runs: Its runs.
    """
    tuning, reference = grid.plan.tuning_seeds, grid.reference
    seeds = f"over the seeds {_list(tuning)}" if len(tuning) > 1 else f"on seed {tuning[0]}"
    notes = [
        f"The best learning rate has the best mean {seeds} of a validation metric, never of a test metric; one at "
        "which a run diverged or failed is only chosen if that happened at all of them.",
        _selection_bias(grid),
        f"The target of a task is the median over the seeds of the last value of {reference}'s curve, at its best "
        "learning rate; for an even number of seeds the worse of the middle two. Steps and seconds to the target end "
        "at the first validation that reaches it; the median over the seeds counts.",
        "Seconds are those of training steps, without validation.",
        f"A difference to {reference} is better or worse if its 95 % confidence interval by Welch's t-test, over the "
        "seeds, does not include zero. A difference within the spread shows neither a difference nor equality.",
    ]
    if len(grid.recipes) > 1:
        notes.append(
            "Performance profiles (Dolan and More 2002) count the tasks on which an optimizer reaches the target "
            "within a factor of the fastest; tasks on which none does are left out."
        )
    return notes + _timings(runs) + settings_of(grid)


def settings_of(grid: Grid) -> list[str]:
    """Settings that differ between optimizers or do not depend on the seed, one sentence each."""
    notes = _multiples(grid)
    for recipe in grid.recipes.values():
        if recipe.weight_decay is None:
            continue
        decays = {label: own_weight_decay(choice, recipe.optimizer) for label, choice in grid.optimizers.items()}
        kept = ", ".join(f"{label} {decay:g}" for label, decay in decays.items() if decay is not None)
        if kept:
            notes.append(
                f"{recipe.name}: its weight decay of {recipe.weight_decay:g} is meant for the other kind of decay "
                f"(decoupled, or an L2 term); these optimizers keep their own default: {kept}."
            )
    fixed = [recipe.name for recipe in grid.recipes.values() if not recipe.seeds_data]
    if fixed and len(grid.plan.seeds) > 1:
        notes.append(f"{_list(fixed)}: its data module is not from this package and keeps its own seed.")
    return notes


def _timings(runs: Sequence[RunRecord]) -> list[str]:
    """The conditions of the measured times."""
    done = [run for run in runs if run.status == "done"]
    notes = []
    num_jobs = max((run.num_jobs for run in done if run.num_jobs and run.launcher != "submitit"), default=0)
    if num_jobs > 1:
        notes.append(
            f"Up to {num_jobs} runs shared this machine: times and their ratios are indicative; --jobs 1 measures them."
        )
    if any(run.launcher == "submitit" for run in done):
        notes.append(
            "Runs were jobs of a cluster, which may have put several on one machine: times and their ratios are "
            "indicative."
        )
    if any(run.num_jobs is None and run.launcher != "submitit" for run in done):
        notes.append(
            "For some runs it was not recorded how many shared the machine: times and their ratios are indicative; "
            "--jobs 1 measures them."
        )
    machines = {repr(sorted(run.hardware.items())) for run in done if run.hardware}
    if len(machines) > 1:
        notes.append(
            f"The runs were made on {len(machines)} machines, or with different threads or cores on one (see "
            "Hardware): times and memory of different ones are not comparable."
        )
    return notes


def _selection_bias(grid: Grid) -> str:
    """Which values come from runs that chose the learning rate."""
    tuning, final = grid.plan.tuning_seeds, grid.plan.final_seeds
    if not final:
        return "The values at the best learning rate come from the runs that chose it: they are selected."
    only = f"The seeds {_list(final)} ran only at each optimizer's best learning rate."
    if len(tuning) > 1:
        return f"{only} Seeds {_list(tuning)}, which chose the learning rate, are included in the mean."
    return f"{only} Seed {tuning[0]}, which chose the learning rate, is included in the mean."


def _multiples(grid: Grid) -> list[str]:
    """Learning rates that are multiples of a recipe's own favour the optimizer that it was chosen for."""
    plan = grid.plan
    texts = [text for label in grid.optimizers for text in plan.lrs_of.get(label, plan.lrs)]
    multiples = list(dict.fromkeys(text for text in texts if text.startswith("x")))
    if not multiples:
        return []
    recipes: dict[str, list[str]] = {}
    for recipe in grid.recipes.values():
        recipes.setdefault(recipe.optimizer, []).append(recipe.name)
    chosen_for = ", ".join(f"{optimizer} ({_list(names)})" for optimizer, names in recipes.items())
    return [
        f"The learning rates {_list(multiples)} are multiples of the recipe's own, which was chosen for the recipe's "
        f"own optimizer: {chosen_for}."
    ]


def _list(items: Sequence[object]) -> str:
    return ", ".join(map(str, items))
