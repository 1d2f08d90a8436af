"""What a reader of a comparison must know: definitions, and settings that differ between optimizers or runs."""

from __future__ import annotations

from collections.abc import Sequence

from .grid import Grid
from .run_records import RunResult
from .spec import own_weight_decay

__all__ = ["notes_of", "settings_of", "timings_of"]


def notes_of(grid: Grid, runs: Sequence[RunResult]) -> list[str]:
    """Definitions and settings, one sentence or two each.

    Args:
        grid: The grid.
        runs: Its runs.
    """
    tuning, reference = grid.plan.tuning_seeds, grid.reference
    seeds = f"over the seeds {_list(tuning)}" if len(tuning) > 1 else f"on seed {tuning[0]}"
    notes = [
        f"The best learning rate has the best mean {seeds}, by a figure of validation, never of a test; one at which a "
        "run diverged or failed is taken only where that is so of all.",
        _selection_bias(grid),
        f"The target of a task is the median over the seeds of the last value of {reference}'s curve, at its best "
        "learning rate; of an even number of seeds the worse of the middle two. Steps and seconds to it are those of "
        "the first validation that reaches it; the median over the seeds counts.",
        "Seconds are of training steps alone, without validation.",
        f"A difference to {reference} is called better or worse where its 95 % confidence interval by Welch's t, over "
        "the seeds, does not hold zero. One within the spread shows neither a difference nor equality.",
    ]
    if len(grid.recipes) > 1:
        notes.append(
            "Performance profiles (Dolan and More 2002) count the tasks on which an optimizer reaches the target "
            "within a factor of the quickest; tasks on which none does are left out."
        )
    return notes + timings_of(runs) + settings_of(grid)


def timings_of(runs: Sequence[RunResult]) -> list[str]:
    """What the times were measured beside, of the runs that have any."""
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
            "Of some runs it was not recorded how many shared the machine: times and their ratios are indicative; "
            "--jobs 1 measures them."
        )
    machines = {repr(sorted(run.hardware.items())) for run in done if run.hardware}
    if len(machines) > 1:
        notes.append(
            f"The runs were made on {len(machines)} machines, or with other threads or cores on one (see Hardware): "
            "times and memory of different ones do not compare."
        )
    return notes


def settings_of(grid: Grid) -> list[str]:
    """Settings that are not the same for all optimizers or seeds, one sentence each."""
    notes = _multiples(grid)
    for recipe in grid.recipes.values():
        if recipe.weight_decay is None:
            continue
        kept = {}
        for label, choice in grid.optimizers.items():
            if (own := own_weight_decay(choice, recipe.optimizer)) is not None:
                kept[label] = own
        if kept:
            told = ", ".join(f"{label} {own:g}" for label, own in kept.items())
            notes.append(
                f"{recipe.name}: its weight decay of {recipe.weight_decay:g} is meant for the other kind of decay "
                f"(decoupled, or an L2 term); these keep their own default: {told}."
            )
    fixed = [recipe.name for recipe in grid.recipes.values() if not recipe.seeds_data]
    if fixed and len(grid.plan.seeds) > 1:
        notes.append(f"{_list(fixed)}: its data module is not of this package and keeps its own seed.")
    return notes


def _selection_bias(grid: Grid) -> str:
    """Which figures are of runs that the rate was chosen by."""
    plan = grid.plan
    tuning, others = plan.tuning_seeds, plan.seeds[len(plan.tuning_seeds) :]
    if not others:
        return "The figures at the best learning rate are of the runs that it was chosen by: they are selected."
    alone = f"The seeds {_list(others)} ran at each optimizer's best learning rate alone."
    if len(tuning) > 1:
        return f"{alone} Seeds {_list(tuning)}, on which the rate was chosen, are in the mean."
    return f"{alone} Seed {tuning[0]}, on which the rate was chosen, is in the mean."


def _multiples(grid: Grid) -> list[str]:
    """Learning rates that are multiples of a recipe's own favour the optimizer that this was chosen for."""
    plan = grid.plan
    texts = [text for label in grid.optimizers for text in plan.lrs_of.get(label, plan.lrs)]
    multiples = list(dict.fromkeys(text for text in texts if text.startswith("x")))
    if not multiples:
        return []
    recipes: dict[str, list[str]] = {}
    for recipe in grid.recipes.values():
        recipes.setdefault(recipe.optimizer, []).append(recipe.name)
    told = ", ".join(f"{optimizer} ({_list(names)})" for optimizer, names in recipes.items())
    return [
        f"The learning rates {_list(multiples)} are multiples of the recipe's own, which was chosen for the recipe's "
        f"own optimizer: {told}."
    ]


def _list(items: Sequence[object]) -> str:
    return ", ".join(map(str, items))
