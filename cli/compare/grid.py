"""All runs of a plan: each recipe with each optimizer, learning rate and seed."""

from __future__ import annotations

import hashlib
import math
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from ...tasks.atomic_files import replacing
from ..recipes import find_recipe, list_recipes, read_yaml
from .spec import (
    ComparisonPlan,
    OptimizerChoice,
    choose_from,
    command_of,
    merge,
    own_weight_decay,
    parse_optimizers,
    read_plan,
)

__all__ = ["ComparedRecipe", "Grid", "Run", "copy_of", "copy_recipe", "expand", "format_lr", "grid_of", "read_recipe"]

DEFAULTS = ComparisonPlan(optimizers=("AdamW", "AdamMini"), lrs=("x1/3", "x1", "x3"), seeds=(0, 1, 2))

RESERVED = {
    "config": "give recipes as arguments",
    "optimizer": "give optimizers by --optimizers NAME:option=value",
    "run_dir": "each run has its own folder in --out",
    "seed_everything": "give --seeds",
    "data.seed": "give --seeds",
    "ckpt_path": "runs resume automatically",
    "print_config": "see --dry-run",
}
"""Options that the comparison sets, including all that begin with them, and what to do instead."""

RESERVED_EXACTLY = dict.fromkeys(("data", "data.class_path"), "write a recipe with these data")
"""Options that would override those; users may set others that begin with them."""


@dataclass(frozen=True, kw_only=True)
class ComparedRecipe:
    """What a comparison needs to know about a recipe before it runs, read from its YAML.

    Args:
        name: Name of a packaged recipe without `.yaml`; path of another one.
        path: The file.
        digest: SHA-256 of the file, in hexadecimal digits.
        title: Its first line.
        optimizer: The optimizer that it is written for.
        lr: Its own learning rate, or None.
        weight_decay: Its own weight decay, or None.
        seeds_data: Whether its data module takes a `seed`, as all of this package do.
        devices: `trainer.devices`.
    """

    name: str
    path: Path
    digest: str
    title: str
    optimizer: str
    lr: float | None
    weight_decay: float | None
    seeds_data: bool
    devices: Any

    @property
    def folder(self) -> str:
        """Name of its folder."""
        name = Path(self.name)
        return (name.stem if name.is_absolute() else self.name).replace("/", "__")


@dataclass(frozen=True, order=True)
class Run:
    """One training: its place in the grid."""

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
        lrs: (recipe, label) -> learning rates, ascending; the same number for each label of a recipe.
        reference: Label of the optimizer that the others are compared with.
    """

    plan: ComparisonPlan
    recipes: Mapping[str, ComparedRecipe]
    optimizers: Mapping[str, OptimizerChoice]
    lrs: Mapping[tuple[str, str], tuple[float, ...]]
    reference: str

    def tuning_runs(self) -> list[Run]:
        """The runs that choose the learning rates, one seed of everything after the other."""
        return self._runs(self.plan.tuning_seeds, self.lrs)

    def final_runs(self, best: Mapping[tuple[str, str], float]) -> list[Run]:
        """The other seeds, at the best learning rate of each recipe and label."""
        return self._runs(self.plan.final_seeds, {case: (lr,) for case, lr in best.items()})

    def folder(self, run: Run) -> Path:
        """The run's folder, relative to that of the comparison."""
        optimizer = self.optimizers[run.optimizer].folder
        return Path(self.recipes[run.recipe].folder, optimizer, f"lr_{format_lr(run.lr)}", f"seed_{run.seed}")

    def arguments(self, run: Run, out: Path) -> list[str]:
        """The command of a run, without the program's name, with the copy of its recipe once there is one.

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


def grid_of(options: Namespace, out: Path) -> Grid:
    """The grid of a command, merged with the plan that its folder already holds.

    Args:
        options: The command line.
        out: Folder of the comparison.

    Raises:
        ValueError: The command does not fit the existing plan, or it cannot run.
    """
    old = read_plan(out)
    if old is None and not options.recipes:
        raise ValueError(f"{out} holds no comparison to continue: give recipes (`adam-mini recipes` lists them)")
    recipes = [read_recipe(name) for name in dict.fromkeys(options.recipes)]
    plan = ComparisonPlan(
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
        # Recipes that this command does not name may have changed as well.
        digests = {name: read_recipe(name).digest for name in old.recipes}
        plan = merge(old, replace(plan, digests={**digests, **plan.digests}))
    grid = expand(replace(plan, command=command_of(plan, out)))
    if old is None:
        _check_empty(grid, out)
    return grid


def _check_empty(grid: Grid, out: Path) -> None:
    """Refuse run folders without a plan: a killed comparison may have left them."""
    for recipe in grid.recipes.values():
        for choice in grid.optimizers.values():
            if (folder := out / recipe.folder / choice.folder).exists():
                raise ValueError(
                    f"{folder} holds runs, but {out} has no plan.json that they belong to; remove them, or choose "
                    "another --out"
                )


def expand(plan: ComparisonPlan, out: Path | None = None) -> Grid:
    """Check a plan, and find its runs.

    Args:
        plan: The plan.
        out: Folder of the comparison, whose copies of the recipes are read if there are some.

    Raises:
        ValueError: There is no such recipe or optimizer, a learning rate is not positive, or the optimizers would not
            get the same number of learning rates.
    """
    recipes: dict[str, ComparedRecipe] = {}
    for name in plan.recipes:
        recipe = read_recipe(name, out)
        if other := next((other for other in recipes.values() if other.folder == recipe.folder), None):
            raise ValueError(f"the recipes {other.path} and {recipe.path} have the same name: rename one of them")
        recipes[recipe.name] = recipe
    choices = {choice.label: choice for choice in parse_optimizers(plan.optimizers)}
    for label in plan.lrs_of:
        if label not in choices:
            raise ValueError(f"--lr-of {label}: no optimizer has this label{choose_from(label, choices)}")
    lrs = {
        (name, label): _resolve_lrs(plan.lrs_of.get(label, plan.lrs), recipe, f"--lr-of {label}")
        for name, recipe in recipes.items()
        for label in choices
    }
    for name in recipes:
        if len({len(lrs[name, label]) for label in choices}) > 1:
            counts = ", ".join(f"{label} {len(lrs[name, label])}" for label in choices)
            raise ValueError(f"{name}: each optimizer must get the same number of learning rates, not {counts}")
    _check_common(plan.common)
    if plan.reference is not None and plan.reference not in choices:
        hint = choose_from(plan.reference, choices)
        raise ValueError(f"--reference {plan.reference}: no optimizer has this label{hint}")
    default = next((label for label, choice in choices.items() if choice.name == "AdamW"), next(iter(choices), ""))
    return Grid(plan=plan, recipes=recipes, optimizers=choices, lrs=lrs, reference=plan.reference or default)


def format_lr(lr: float) -> str:
    """A learning rate as people write it: 1e-3, 3.33e-4, 0.5 as 5e-1."""
    digits = Decimal(repr(lr)).normalize()
    mantissa = digits.scaleb(-digits.adjusted())
    return f"{mantissa:f}e{digits.adjusted()}"


def _resolve_lrs(texts: tuple[str, ...], recipe: ComparedRecipe, option: str) -> tuple[float, ...]:
    """The learning rates of a recipe, ascending, from numbers and multiples of its own."""
    lrs = set()
    for text in texts:
        factor = text.removeprefix("x")
        numerator, slash, denominator = factor.partition("/")
        try:
            value = float(numerator) / float(denominator) if slash and factor != text else float(factor)
        except (ValueError, ZeroDivisionError):
            raise ValueError(
                f"--lr {text}: write a number, or a multiple of the recipe's own such as x3 or x1/3"
            ) from None
        if not 0.0 < value < math.inf:
            raise ValueError(f"--lr {text}: a learning rate must be positive and finite")
        if factor != text:
            if recipe.lr is None:
                raise ValueError(f"--lr {text}: recipe {recipe.name} has no learning rate of its own; give numbers")
            value = float(f"{value * recipe.lr:.3g}")
        if value in lrs:
            raise ValueError(f"{option} or --lr: {text} is the learning rate {format_lr(value)} a second time")
        lrs.add(value)
    return tuple(sorted(lrs))


def _check_common(options: tuple[str, ...]) -> None:
    for option in options:
        name, equals, _ = option.partition("=")
        if not equals or not name or name.startswith("-"):
            raise ValueError(f"--set {option}: write KEY=VALUE, such as --set trainer.max_steps=50")
        plain = name.removesuffix("+").replace(".init_args", "").replace(".dict_kwargs", "")
        reserved = [remedy for own, remedy in RESERVED.items() if plain == own or plain.startswith(f"{own}.")]
        if remedy := RESERVED_EXACTLY.get(plain) or next(iter(reserved), None):
            raise ValueError(f"--set {option}: the comparison sets {name} itself: {remedy}")


def read_recipe(name: str, out: Path | None = None) -> ComparedRecipe:
    """Find and read a recipe.

    Args:
        name: Name of a packaged recipe, with or without `.yaml`, or a path.
        out: Folder of a comparison, whose copy is read if there is one.

    Raises:
        ValueError: There is none, or it is no configuration of a run.
    """
    if out is not None and (copy := copy_of(name, out)).exists():
        return _parse_recipe(copy, name)
    path = find_recipe(name, given_as="recipe").resolve()
    packaged = (other for other in list_recipes() if path == find_recipe(other).resolve())
    return _parse_recipe(path, next((other.removesuffix(".yaml") for other in packaged), str(path)))


def copy_of(name: str, out: Path) -> Path:
    """Where a comparison keeps its copy of a recipe.

    Args:
        name: `ComparedRecipe.name`.
        out: Folder of the comparison.
    """
    path = Path(name)
    return out / "recipes" / (f"{path.stem}.yaml" if path.is_absolute() else f"{name}.yaml")


def copy_recipe(recipe: ComparedRecipe, out: Path) -> None:
    """Keep a copy of a recipe, which all runs read: the recipe itself may change while they wait.

    Raises:
        ValueError: The recipe has changed since it was read, or the copy since it was made.
    """
    copy = copy_of(recipe.name, out)
    if not copy.exists():
        raw = recipe.path.read_bytes()
        _check_digest(raw, recipe, recipe.path)
        with replacing(copy) as temporary:
            temporary.write_bytes(raw)
    _check_digest(copy.read_bytes(), recipe, copy)


def _check_digest(raw: bytes, recipe: ComparedRecipe, path: Path) -> None:
    if hashlib.sha256(raw).hexdigest() != recipe.digest:
        raise ValueError(
            f"{path} is not the recipe that this comparison began with; restore it, or choose another --out"
        )


def _parse_recipe(path: Path, name: str) -> ComparedRecipe:
    raw, content = path.read_bytes(), read_yaml(path, f"recipe {name}")
    text = raw.decode("utf-8-sig")
    if "model" not in content:
        raise ValueError(f"recipe {name}: it has no section `model`, so it is no configuration of a run")
    included = [value for value in content.values() if isinstance(value, str) and value.endswith((".yaml", ".yml"))]
    if included:  # the digest would not cover it
        raise ValueError(f"recipe {name}: it includes {included[0]}; write its content into the recipe")
    optimizer, options = _class_of(content.get("optimizer"), "AdamMini")
    data, _ = _class_of(content.get("data"), "")
    trainer = content.get("trainer")
    return ComparedRecipe(
        name=name,
        path=path,
        digest=hashlib.sha256(raw).hexdigest(),
        title=text.splitlines()[0].lstrip("# ").strip() if text.startswith("#") else path.stem,
        optimizer=optimizer.removeprefix("lightning_adam_mini.factory."),
        lr=_number(name, options, "lr"),
        weight_decay=_number(name, options, "weight_decay"),
        seeds_data=data.startswith("lightning_adam_mini."),
        devices=trainer.get("devices", "auto") if isinstance(trainer, dict) else "auto",
    )


def _class_of(section: Any, default: str) -> tuple[str, dict[str, Any]]:
    """The class of a section and its options; both may be missing."""
    if isinstance(section, str):
        return section, {}
    if not isinstance(section, dict):
        return default, {}
    options = section.get("init_args")
    return str(section.get("class_path", default)), options if isinstance(options, dict) else {}


def _number(recipe: str, options: dict[str, Any], name: str) -> float | None:
    """An option as a number; YAML 1.1 reads `1e-3` as a string."""
    value = options.get(name)
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        raise ValueError(f"recipe {recipe}: optimizer.{name} is no number: {value!r}") from None
