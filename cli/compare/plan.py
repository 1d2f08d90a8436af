"""What a comparison is to do, kept in its folder, so that it can be stopped, continued and extended."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from ...tasks.atomic_files import write_json
from .optimizers import label_of

__all__ = ["Plan", "merge", "read_plan", "write_plan"]

FILE_NAME = "plan.json"

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A comparison as the user asked for it, in the words of the command line.

    Args:
        recipes: Names of packaged recipes and paths of others, in order.
        digests: SHA-256 of the file of each recipe.
        optimizers: Items of `--optimizers`.
        lrs: Learning rates of all optimizers: numbers, or multiples such as `x1` of the recipe's own.
        lrs_of: Learning rates of single optimizers, by label.
        seeds: All seeds.
        num_tuning_seeds: On how many of them, from the first, learning rates are chosen; None for all.
        common: Options of `adam-mini fit` that all runs get, each `KEY=VALUE`.
        reference: Label of the optimizer that the others are compared with; None for AdamW, or else the first.
        folder: Folder that the runs are started in: relative paths of recipes start there.
        created: First start, ISO 8601 in UTC.
        command: The one command that begins the same comparison.
    """

    recipes: tuple[str, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict)
    optimizers: tuple[str, ...] = ()
    lrs: tuple[str, ...] = ()
    lrs_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    num_tuning_seeds: int | None = None
    common: tuple[str, ...] = ()
    reference: str | None = None
    folder: str = ""
    created: str = ""
    command: tuple[str, ...] = ()

    @property
    def tuning_seeds(self) -> tuple[int, ...]:
        """The seeds on which learning rates are chosen."""
        return self.seeds[: self.num_tuning_seeds]


def merge(old: Plan, new: Plan) -> Plan:
    """A plan with what a later start adds: recipes, optimizers, learning rates and seeds.

    What the later start does not give stays as it was. An optimizer that gets learning rates of its own keeps those
    that it has run with: they count in its budget.

    Raises:
        ValueError: It changes what the runs that are there have in common, so that they could not be compared.
    """
    for name, digest in new.digests.items():
        if old.digests.get(name, digest) != digest:
            raise ValueError(f"the recipe {name} has changed since this comparison began; choose another --out")
    if new.common and sorted(new.common) != sorted(old.common):
        had = " ".join(f"--set {option}" for option in old.common) or "no --set"
        raise ValueError(f"this comparison was begun with {had}, and all its runs share that; choose another --out")
    return replace(
        new,
        recipes=_union(old.recipes, new.recipes),
        digests={**old.digests, **new.digests},
        optimizers=_union(old.optimizers, new.optimizers),
        lrs=_union(old.lrs, new.lrs),
        lrs_of={label: _union(_lrs_of(old, label), new.lrs_of.get(label, ())) for label in (*old.lrs_of, *new.lrs_of)},
        seeds=_union(old.seeds, new.seeds),
        num_tuning_seeds=old.num_tuning_seeds if new.num_tuning_seeds is None else new.num_tuning_seeds,
        common=old.common,
        reference=new.reference or old.reference,
        folder=old.folder,
        created=old.created,
    )


def read_plan(out: Path) -> Plan | None:
    """The plan of a comparison; None where there is none.

    Raises:
        ValueError: The file is damaged, or of another version.
    """
    path = out / FILE_NAME
    if not path.exists():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text("utf-8"))
        known = {name.name for name in fields(Plan)}
        if not content.keys() <= known:
            raise KeyError(*content.keys() - known)
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
        }
        values["lrs_of"] = {label: tuple(lrs) for label, lrs in content["lrs_of"].items()}
        return Plan(**values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no plan of this version of adam-mini ({error}); choose another --out") from error


def write_plan(plan: Plan, out: Path) -> None:
    """Keep a plan in the folder of the comparison."""
    write_json(out / FILE_NAME, asdict(plan))


def _union(old: tuple[T, ...], new: tuple[T, ...]) -> tuple[T, ...]:
    return tuple(dict.fromkeys((*old, *new)))


def _lrs_of(plan: Plan, label: str) -> tuple[str, ...]:
    """The learning rates of an optimizer; none where it has not run."""
    common = plan.lrs if label in map(label_of, plan.optimizers) else ()
    return plan.lrs_of.get(label, common)
