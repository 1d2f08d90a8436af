"""What the user asks a comparison to do: its options, its optimizers, and `plan.json`, which keeps both."""

from __future__ import annotations

import json
import math
import re
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from importlib import import_module
from inspect import isabstract
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from lightning_adam_mini.hints import did_you_mean

from ...tasks.atomic_files import write_json
from ..arguments import Parser

if TYPE_CHECKING:
    from lightning_adam_mini.factory import OptimizerFactory

__all__ = [
    "ComparisonPlan",
    "OptimizerChoice",
    "choose_from",
    "command_of",
    "merge",
    "own_weight_decay",
    "parse_optimizers",
    "parse_options",
    "read_plan",
    "write_plan",
]

PLAN_FILE = "plan.json"

DESCRIPTION = """Train each recipe with several optimizers, learning rates and seeds, and write a report. Each run has
its own process and folder. Finished runs are not run again: the same command, or `adam-mini compare --out DIR`, resumes
after any stop, and more recipes, optimizers, learning rates or seeds extend a comparison."""

T = TypeVar("T")


def parse_options(arguments: Sequence[str]) -> Namespace:
    """Parse the command line.

    Raises:
        ArgumentError: The command line is wrong.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    options.seeds = _seeds(parser, options.seeds)
    if options.tuning_seeds is not None and options.tuning_seeds < 1:
        parser.error(f"--tuning-seeds {options.tuning_seeds}: at least one seed must choose the learning rates")
    for name in ("jobs", "threads"):
        if (number := getattr(options, name)) is not None and number < 1:
            parser.error(f"--{name} {number}: at least 1")
    if options.timeout is not None and not 0.0 < options.timeout < math.inf:
        parser.error(f"--timeout {options.timeout}: a positive number of seconds")
    options.lrs_of = {}
    for label, *lrs in options.lr_of:
        if not lrs or label in options.lrs_of:
            parser.error(f"--lr-of {label}: {'it is given twice' if lrs else 'write LABEL LR LR ...'}")
        options.lrs_of[label] = tuple(lrs)
    options.launcher_options = _launcher_options(parser, options)
    return options


def _parser() -> Parser:
    parser = Parser(prog="adam-mini compare", description=DESCRIPTION, allow_abbrev=False)
    parser.add_recipe("recipes", nargs="*", help="Packaged recipes, or paths.")
    parser.add_argument(
        "--optimizers",
        nargs="+",
        metavar="OPTIMIZER",
        default=[],
        help="NAME, NAME:option=value,option=value or LABEL=NAME:option=value; AdamW and AdamMini by default.",
    )
    parser.add_argument(
        "--lr",
        nargs="+",
        metavar="LR",
        default=[],
        help="Learning rates, or multiples of the recipe's own; x1/3 x1 x3 by default.",
    )
    parser.add_argument(
        "--lr-of",
        nargs="+",
        action="append",
        default=[],
        metavar="LABEL LR",
        help="Learning rates of one optimizer, as many as the others have; may be repeated.",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        metavar="N",
        default=[],
        help="One number N: the seeds 0 to N-1; more: these seeds. 3 by default.",
    )
    parser.add_argument(
        "--tuning-seeds",
        type=int,
        metavar="K",
        help="Choose learning rates on the first K seeds; the others run at the best one only. All by default.",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="common",
        help="Option of `adam-mini fit` for all runs, such as trainer.max_steps=50; may be repeated.",
    )
    parser.add_argument("--reference", metavar="LABEL", help="What the others are compared with; AdamW by default.")
    parser.add_argument("--out", metavar="DIR", default="runs/compare", help="Folder; runs/compare by default.")
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="Runs at a time; by default cores / threads, one per GPU, or all on a cluster.",
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="Threads of a run; by default OMP_NUM_THREADS, else cores / jobs; on a cluster cpus_per_task.",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="Time limit of each start of a run; the next start resumes from its checkpoint.",
    )
    parser.add_argument("--launcher", choices=("local", "submitit"), default="local", help="Where runs are trained.")
    parser.add_argument(
        "--launcher-options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="Options of submitit's executor: cluster=slurm timeout_min=240 slurm_partition=gpu gpus_per_node=1.",
    )
    parser.add_argument("--dry-run", action="store_true", help="Print the plan and the commands, and run nothing.")
    return parser


def _seeds(parser: Parser, given: list[int]) -> tuple[int, ...]:
    """The seeds; empty if the option was not given."""
    if any(seed < 0 for seed in given) or given == [0]:
        parser.error(f"--seeds {' '.join(map(str, given))}: give their number, at least 1, or two or more seeds from 0")
    if len(set(given)) < len(given):
        parser.error(f"--seeds {' '.join(map(str, given))}: a seed is given twice")
    return tuple(range(given[0])) if len(given) == 1 else tuple(given)


def _launcher_options(parser: Parser, options: Namespace) -> Mapping[str, Any]:
    if options.launcher_options and options.launcher == "local":
        parser.error("--launcher-options are those of --launcher submitit")
    found = {}
    for option in options.launcher_options:
        name, equals, value = option.partition("=")
        if not (name and equals):
            parser.error(f"--launcher-options {option}: write KEY=VALUE")
        found[name] = yaml.safe_load(value)
    return found


@dataclass(frozen=True, kw_only=True)
class ComparisonPlan:
    """A comparison in the words of the command line, so that it can be stopped, resumed and extended.

    Args:
        recipes: Names of packaged recipes and paths of others, in order.
        digests: SHA-256 of the file of each recipe.
        optimizers: Items of `--optimizers`.
        lrs: Learning rates of all optimizers: numbers, or multiples such as `x3` of the recipe's own.
        lrs_of: Label -> learning rates of this optimizer only.
        seeds: All seeds.
        num_tuning_seeds: The first so many seeds choose the learning rates; None for all.
        common: Options of `adam-mini fit` that all runs get, each `KEY=VALUE`.
        reference: Label of the optimizer that the others are compared with; None for AdamW, or else the first.
        folder: Working folder of the runs: relative paths in recipes start there.
        created: First start, ISO 8601 in UTC.
        command: The single command that starts the same comparison.
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
        """The seeds that choose the learning rates."""
        return self.seeds[: self.num_tuning_seeds]

    @property
    def final_seeds(self) -> tuple[int, ...]:
        """The other seeds, which run at the best learning rates only."""
        return self.seeds[len(self.tuning_seeds) :]


def merge(old: ComparisonPlan, new: ComparisonPlan) -> ComparisonPlan:
    """A plan with what a later start adds: recipes, optimizers, learning rates and seeds.

    What the later start does not give stays unchanged. An optimizer that gets its own learning rates keeps those it
    has run with: they count in its budget.

    Raises:
        ValueError: It changes what the existing runs have in common, so they could not be compared.
    """
    for name, digest in new.digests.items():
        if old.digests.get(name, digest) != digest:
            raise ValueError(f"the recipe {name} has changed since this comparison began; choose another --out")
    if new.common and sorted(new.common) != sorted(old.common):
        before = " ".join(f"--set {option}" for option in old.common) or "no --set"
        raise ValueError(f"this comparison began with {before}, and all its runs share that; choose another --out")
    labels = {choice.label for choice in map(_parse_optimizer, old.optimizers)}

    def lrs_of(label: str) -> tuple[str, ...]:
        before = old.lrs_of.get(label, old.lrs if label in labels else ())
        return _union(before, new.lrs_of.get(label, ()))

    return replace(
        new,
        recipes=_union(old.recipes, new.recipes),
        digests={**old.digests, **new.digests},
        optimizers=_union(old.optimizers, new.optimizers),
        lrs=_union(old.lrs, new.lrs),
        lrs_of={label: lrs_of(label) for label in (*old.lrs_of, *new.lrs_of)},
        seeds=_union(old.seeds, new.seeds),
        num_tuning_seeds=old.num_tuning_seeds if new.num_tuning_seeds is None else new.num_tuning_seeds,
        common=old.common,
        reference=new.reference or old.reference,
        folder=old.folder,
        created=old.created,
    )


def _union(old: tuple[T, ...], new: tuple[T, ...]) -> tuple[T, ...]:
    return tuple(dict.fromkeys((*old, *new)))


def read_plan(out: Path) -> ComparisonPlan | None:
    """The plan of a comparison; None if there is none.

    Raises:
        ValueError: The file is damaged, or of another version.
    """
    path = out / PLAN_FILE
    if not path.exists():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text("utf-8"))
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
        }
        values["lrs_of"] = {label: tuple(lrs) for label, lrs in content["lrs_of"].items()}
        return ComparisonPlan(**values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no plan of this version of adam-mini ({error}); choose another --out") from error


def write_plan(plan: ComparisonPlan, out: Path) -> None:
    """Write the plan into the folder of the comparison."""
    write_json(out / PLAN_FILE, asdict(plan))


def command_of(plan: ComparisonPlan, out: Path) -> tuple[str, ...]:
    """The single command that starts the same comparison, which several commands may have extended.

    Args:
        plan: The comparison.
        out: Its folder.
    """
    counted = plan.seeds == tuple(range(len(plan.seeds)))
    seeds = (len(plan.seeds),) if counted else plan.seeds
    folder = out.relative_to(plan.folder) if out.is_relative_to(plan.folder) else out
    return (
        *("adam-mini", "compare", *plan.recipes),
        *("--optimizers", *plan.optimizers),
        *("--lr", *plan.lrs),
        *(word for label, lrs in plan.lrs_of.items() for word in ("--lr-of", label, *lrs)),
        *("--seeds", *map(str, seeds)),
        *(() if plan.num_tuning_seeds is None else ("--tuning-seeds", str(plan.num_tuning_seeds))),
        *(word for option in plan.common for word in ("--set", option)),
        *(() if plan.reference is None else ("--reference", plan.reference)),
        *("--out", str(folder)),
    )


@dataclass(frozen=True)
class OptimizerChoice:
    """One optimizer of a comparison.

    Args:
        label: Its name in the report.
        name: Class of the factory.
        options: Pairs of option and value, as on the command line.
    """

    label: str
    name: str
    options: tuple[tuple[str, str], ...] = ()

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return re.sub(r"[^\w.=+-]+", "_", self.label).strip("_")

    @property
    def arguments(self) -> tuple[str, ...]:
        """The options of `adam-mini fit`, without the learning rate."""
        return ("--optimizer", self.name, *(f"--optimizer.{option}={value}" for option, value in self.options))


def parse_optimizers(items: Sequence[str]) -> tuple[OptimizerChoice, ...]:
    """Parse `NAME`, `NAME:option=value,option=value` and `LABEL=NAME:...`, and check them against the factories.

    Raises:
        ValueError: An item is malformed, there is no such optimizer or option, or a label is given twice.
    """
    choices = tuple(map(_parse_optimizer, items))
    for choice in choices:
        known = [each.name for each in fields(_factory(choice.name))]
        for option, _ in choice.options:
            if (name := option.partition(".")[0]) not in known:
                hint = choose_from(name, known)
                raise ValueError(f"--optimizers {choice.label}: {choice.name} has no option {name!r}{hint}")
    folders: dict[str, str] = {}
    for choice in choices:
        if (other := folders.setdefault(choice.folder.casefold(), choice.label)) != choice.label:
            raise ValueError(
                f"--optimizers: {other} and {choice.label} would share a folder; write OTHER={choice.name}"
            )
    labels = [choice.label for choice in choices]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"--optimizers: {twice[0]} is given twice; give one of them a label: OTHER={twice[0]}")
    return choices


def _parse_optimizer(item: str) -> OptimizerChoice:
    head, colon, rest = item.partition(":")
    label, equals, name = head.partition("=")
    if not equals:
        label, name = item, head
    if not name or not label or (colon and not rest):
        raise ValueError(f"--optimizers {item}: write NAME, NAME:option=value,option=value or LABEL=NAME:option=value")
    options = []
    for part in _split(rest):
        option, equals, value = part.partition("=")
        if not (option and equals):
            raise ValueError(f"--optimizers {item}: {part!r} is not of the form option=value")
        if option == "lr":
            raise ValueError(f"--optimizers {item}: give learning rates by --lr, or --lr-of {label} LR LR ...")
        options.append((option, value))
    return OptimizerChoice(label, name, tuple(options))


def _split(text: str) -> list[str]:
    """Parts between commas outside of brackets and quotes: a value may be JSON."""
    parts, depth, quote, start = [], 0, "", 0
    for position, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in "]})":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    return [*parts, text[start:]] if text else []


def own_weight_decay(choice: OptimizerChoice, recipe_optimizer: str) -> float | None:
    """The default weight decay that an optimizer keeps if the recipe's is of the other kind; else None.

    A coefficient of decoupled decay (Loshchilov and Hutter 2019) is far too large for an L2 term of the gradient, which
    SGD and Adam have.

    Args:
        choice: The optimizer.
        recipe_optimizer: The optimizer that the recipe is written for.
    """
    if any(option == "weight_decay" for option, _ in choice.options):
        return None
    own, of_recipe = _factory(choice.name), _factory(recipe_optimizer)
    if getattr(own, "decoupled_weight_decay", True) == getattr(of_recipe, "decoupled_weight_decay", True):
        return None
    default = next(each.default for each in fields(own) if each.name == "weight_decay")
    return None if default is MISSING else float(default)


def _factory(name: str) -> type[OptimizerFactory]:
    """The factory of a name, or of the dotted path of a class outside this package."""
    from lightning_adam_mini import factory

    module, _, cls_name = name.rpartition(".")
    known = [name for name in factory.__all__ if _is_concrete(getattr(factory, name))]
    if module in ("", factory.__name__):
        if cls_name not in known:
            raise ValueError(f"--optimizers {name}: there is no such optimizer{choose_from(name, known)}")
        cls = getattr(factory, cls_name)
    else:
        try:
            cls = getattr(import_module(module), cls_name)
        except (ImportError, AttributeError):
            raise ValueError(f"--optimizers {name}: there is no such class{choose_from(cls_name, known)}") from None
        if not _is_concrete(cls):
            raise ValueError(f"--optimizers {name}: it is no OptimizerFactory; choose from {', '.join(known)}")
    chosen: type[OptimizerFactory] = cls
    return chosen


def _is_concrete(cls: object) -> bool:
    from lightning_adam_mini.factory import OptimizerFactory

    return isinstance(cls, type) and issubclass(cls, OptimizerFactory) and not isabstract(cls)


def choose_from(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: similar names, or all."""
    return did_you_mean(name, known, otherwise=f"; choose from {', '.join(sorted(known))}", count=2)
