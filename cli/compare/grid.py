"""All runs of a plan: every recipe with every optimizer, learning rate and seed."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from .plan import Plan
from .recipe import Recipe, copy_of, read_recipe
from .spec import OptimizerChoice, did_you_mean, own_weight_decay, parse_optimizers

__all__ = ["Grid", "Run", "expand", "format_lr"]

RESERVED = {
    "config": "give recipes as arguments",
    "optimizer": "give optimizers by --optimizers NAME:option=value",
    "run_dir": "each run has a folder of its own in --out",
    "seed_everything": "give --seeds",
    "data.seed": "give --seeds",
    "ckpt_path": "runs go on by themselves",
    "print_config": "see --dry-run",
}
"""Options that the comparison sets itself, with all that begin with them, and what to do instead."""

RESERVED_ALONE = dict.fromkeys(("data", "data.class_path"), "write a recipe with these data")
"""Options that would undo those; others that begin with them are the user's."""


@dataclass(frozen=True, order=True)
class Run:
    """One training: where it stands in the grid."""

    recipe: str
    optimizer: str
    lr: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The runs of a plan.

    Args:
        plan: The plan.
        recipes: Its recipes, by name.
        optimizers: Its optimizers, by label.
        lrs: Learning rates by recipe and label, rising; as many for each label of a recipe.
        reference: Label of the optimizer that the others are compared with.
    """

    plan: Plan
    recipes: Mapping[str, Recipe]
    optimizers: Mapping[str, OptimizerChoice]
    lrs: Mapping[tuple[str, str], tuple[float, ...]]
    reference: str

    def tuning_runs(self) -> list[Run]:
        """The runs that choose the learning rates, one seed of everything after the other."""
        return self._runs(self.plan.tuning_seeds, self.lrs)

    def final_runs(self, best: Mapping[tuple[str, str], float]) -> list[Run]:
        """The other seeds, at the best learning rate of each recipe and label."""
        return self._runs(self.plan.seeds[len(self.plan.tuning_seeds) :], {case: (lr,) for case, lr in best.items()})

    def folder(self, run: Run) -> Path:
        """The run's folder, below that of the comparison."""
        optimizer = self.optimizers[run.optimizer].folder
        return Path(self.recipes[run.recipe].folder, optimizer, f"lr_{format_lr(run.lr)}", f"seed_{run.seed}")

    def arguments(self, run: Run, out: Path) -> list[str]:
        """The command of a run, without the program's name, from the copy of its recipe once there is one.

        Args:
            run: The run.
            out: Folder of the comparison.
        """
        recipe, choice = self.recipes[run.recipe], self.optimizers[run.optimizer]
        copy = copy_of(recipe.name, out)
        decay = own_weight_decay(choice, recipe.optimizer) if recipe.weight_decay is not None else None
        return [
            *("fit", "--config", str(copy) if copy.exists() else recipe.name, *choice.arguments),
            *([] if decay is None else [f"--optimizer.weight_decay={decay}"]),
            *(f"--optimizer.lr={format_lr(run.lr)}", f"--seed_everything={run.seed}"),
            *([f"--data.seed={run.seed}"] if recipe.seeds_data else []),
            *(f"--run_dir={out / self.folder(run)}", "--trainer.enable_progress_bar=false"),
            *(f"--{option}" for option in self.plan.common),
        ]

    def _runs(self, seeds: tuple[int, ...], lrs: Mapping[tuple[str, str], tuple[float, ...]]) -> list[Run]:
        return [
            Run(recipe, label, lr, seed)
            for recipe in self.recipes
            for seed in seeds
            for label in self.optimizers
            for lr in lrs.get((recipe, label), ())
        ]


def expand(plan: Plan, out: Path | None = None) -> Grid:
    """Check a plan, and find its runs.

    Args:
        plan: The plan.
        out: Folder of the comparison, whose copies of the recipes are read where there are some.

    Raises:
        ValueError: There is no such recipe or optimizer, a learning rate is not positive, or the optimizers would not
            get the same number of learning rates.
    """
    recipes: dict[str, Recipe] = {}
    for name in plan.recipes:
        recipe = read_recipe(name, out)
        if other := next((other for other in recipes.values() if other.folder == recipe.folder), None):
            raise ValueError(f"the recipes {other.path} and {recipe.path} have the same name: rename one of them")
        recipes[recipe.name] = recipe
    choices = {choice.label: choice for choice in parse_optimizers(plan.optimizers)}
    for label in plan.lrs_of:
        if label not in choices:
            raise ValueError(f"--lr-of {label}: no optimizer has this label; {did_you_mean(label, choices)}")
    lrs = {
        (name, label): _resolve(plan.lrs_of.get(label, plan.lrs), recipe, f"--lr-of {label}")
        for name, recipe in recipes.items()
        for label in choices
    }
    _check_budget(lrs, list(recipes), list(choices))
    _check_common(plan.common)
    if plan.reference is not None and plan.reference not in choices:
        hint = did_you_mean(plan.reference, choices)
        raise ValueError(f"--reference {plan.reference}: no optimizer has this label; {hint}")
    default = next((label for label, choice in choices.items() if choice.name == "AdamW"), next(iter(choices), ""))
    return Grid(plan=plan, recipes=recipes, optimizers=choices, lrs=lrs, reference=plan.reference or default)


def format_lr(lr: float) -> str:
    """A learning rate as one writes it: 1e-3, 3.33e-4, 0.5 as 5e-1."""
    digits = Decimal(repr(lr)).normalize()
    mantissa = digits.scaleb(-digits.adjusted())
    return f"{mantissa:f}e{digits.adjusted()}"


def _resolve(texts: tuple[str, ...], recipe: Recipe, option: str) -> tuple[float, ...]:
    """Learning rates of one recipe, rising, from numbers and multiples of its own."""
    lrs = set()
    for text in texts:
        factor = text.removeprefix("x")
        try:
            value = float(factor)
        except ValueError:
            raise ValueError(f"--lr {text}: write a number, or a multiple of the recipe's own such as x3") from None
        if not 0.0 < value < math.inf:
            raise ValueError(f"--lr {text}: a learning rate must be positive and finite")
        if factor != text:
            if recipe.lr is None:
                raise ValueError(f"--lr {text}: recipe {recipe.name} has no learning rate of its own; give numbers")
            value = float(f"{value * recipe.lr:.6g}")  # the digits that somebody would write
        if value in lrs:
            raise ValueError(f"{option} or --lr: {text} is the learning rate {format_lr(value)} a second time")
        lrs.add(value)
    return tuple(sorted(lrs))


def _check_budget(lrs: Mapping[tuple[str, str], tuple[float, ...]], recipes: list[str], labels: list[str]) -> None:
    for recipe in recipes:
        counts = {label: len(lrs[recipe, label]) for label in labels}
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{label} {count}" for label, count in counts.items())
            raise ValueError(f"{recipe}: each optimizer must get the same number of learning rates, not {told}")


def _check_common(options: tuple[str, ...]) -> None:
    for option in options:
        name, equals, _ = option.partition("=")
        if not equals or not name or name.startswith("-"):
            raise ValueError(f"--set {option}: write KEY=VALUE, such as --set trainer.max_steps=50")
        plain = name.removesuffix("+").replace(".init_args", "").replace(".dict_kwargs", "")
        reserved = [remedy for own, remedy in RESERVED.items() if plain == own or plain.startswith(f"{own}.")]
        if remedy := RESERVED_ALONE.get(plain) or next(iter(reserved), None):
            raise ValueError(f"--set {option}: the comparison sets {name} itself: {remedy}")


def program() -> list[str]:
    """The start of each run's command: this Python, this package."""
    return [sys.executable, "-m", "lightning_adam_mini.cli.main"]
