"""From the command line, and what its folder holds already, to the grid."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from .grid import Grid, expand
from .plan import Plan, merge, read_plan
from .recipe import read_recipe
from .reproduce import command_of

__all__ = ["grid_of"]

DEFAULTS = Plan(optimizers=("AdamW", "AdamMini"), lrs=("x0.333", "x1", "x3"), seeds=(0, 1, 2))


def grid_of(options: Namespace, out: Path) -> Grid:
    """The grid of a command and of what its folder holds already.

    Args:
        options: The command line.
        out: Folder of the comparison.

    Raises:
        ValueError: The command does not fit what is there, or it cannot run.
    """
    old = read_plan(out)
    if old is None and not options.recipes:
        raise ValueError(f"{out} holds no comparison to continue: give recipes (`adam-mini recipes` lists them)")
    recipes = [read_recipe(name) for name in dict.fromkeys(options.recipes)]
    plan = Plan(
        recipes=tuple(dict.fromkeys(recipe.name for recipe in recipes)),
        digests={recipe.name: recipe.digest for recipe in recipes},
        optimizers=tuple(options.optimizers),
        lrs=tuple(options.lr),
        lrs_of=options.lrs_of,
        seeds=options.seeds,
        num_tuning_seeds=options.tuning_seeds,
        common=tuple(options.common),
        reference=options.reference,
        folder=str(Path.cwd()),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    if old is None:
        plan = replace(
            plan,
            optimizers=plan.optimizers or DEFAULTS.optimizers,
            lrs=plan.lrs or DEFAULTS.lrs,
            seeds=plan.seeds or DEFAULTS.seeds,
        )
    else:
        # What this command does not name may have changed as well.
        digests = {name: read_recipe(name).digest for name in old.recipes}
        plan = merge(old, replace(plan, digests={**digests, **plan.digests}))
    grid = expand(replace(plan, command=command_of(plan, out)))
    if old is None:
        _check_empty(grid, out)
    return grid


def _check_empty(grid: Grid, out: Path) -> None:
    """Refuse folders of runs of which nobody knows the comparison: a killed one may have left them."""
    for recipe in grid.recipes.values():
        for choice in grid.optimizers.values():
            if (folder := out / recipe.folder / choice.folder).exists():
                raise ValueError(
                    f"{folder} holds runs, but {out} no plan.json that they belong to; remove them, or choose "
                    "another --out"
                )
