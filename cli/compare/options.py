"""The command line of `adam-mini compare`."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ..arguments import Parser

__all__ = ["parse"]

DESCRIPTION = """Train each recipe with several optimizers, learning rates and seeds, and write a report. Each run is a
process and a folder of its own. What is finished is not run again: the same command, or `adam-mini compare --out DIR`,
goes on after any stop, and more recipes, optimizers, learning rates or seeds extend what is there."""


def parse(arguments: Sequence[str]) -> Namespace:
    """Parse the options.

    Raises:
        ArgumentError: The command line is wrong.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    options.seeds = _seeds(parser, options.seeds)
    if options.tuning_seeds is not None and options.tuning_seeds < 1:
        parser.error(f"--tuning-seeds {options.tuning_seeds}: learning rates need at least one seed to be chosen on")
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
        help="Learning rates, or multiples of the recipe's own; x0.333 x1 x3 by default.",
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
        help="Choose learning rates on the first K seeds; the others run at the best one alone. All by default.",
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
        help="Runs at a time; by default cores / threads, one a GPU, or all on a cluster.",
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
        help="Limit of each start of a run; the next start goes on from its checkpoint.",
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
    """The seeds; none where the option was not given."""
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
