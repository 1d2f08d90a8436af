"""What a reader of a comparison must know: definitions, and settings that differ between optimizers."""

from __future__ import annotations

from .grid import Grid
from .optimizers import own_weight_decay

__all__ = ["notes_of", "settings_of"]


def notes_of(grid: Grid) -> list[str]:
    """Definitions and settings, one sentence each."""
    plan, reference = grid.plan, grid.reference
    tuning, others = plan.tuning_seeds, plan.seeds[len(plan.tuning_seeds) :]
    seeds = f"over the seeds {_list(tuning)}" if len(tuning) > 1 else f"on seed {tuning[0]}"
    notes = [
        f"The best learning rate has the best mean {seeds}; one at which a run diverged or failed is taken only where "
        "that is so of all."
    ]
    if others:
        notes.append(f"The seeds {_list(others)} ran at each optimizer's best learning rate alone.")
    else:
        notes.append("The figures at the best learning rate are of the runs that it was chosen by.")
    notes += [
        f"The target of a task is the mean over the seeds of the last value of {reference}'s curve, at its best "
        "learning rate. Steps and seconds to it are those of the first validation that reaches it; the median over the "
        "seeds counts.",
        "Seconds are of training steps alone, without validation.",
        f"A difference to {reference} is called better or worse where its 95 % confidence interval by Welch's t, over "
        "the seeds, does not hold zero.",
    ]
    if len(grid.recipes) > 1:
        notes.append(
            "Performance profiles (Dolan and More 2002) count the tasks on which an optimizer reaches the target "
            "within a factor of the quickest; tasks on which none does are left out."
        )
    return notes + settings_of(grid)


def settings_of(grid: Grid) -> list[str]:
    """Settings that are not the same for all optimizers or seeds, one sentence each."""
    notes = []
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


def _list(items: list[str] | tuple[int, ...]) -> str:
    return ", ".join(map(str, items))
