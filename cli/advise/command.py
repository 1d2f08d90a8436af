"""The command line of `adam-mini advise`, with one parser for each source. Nothing here imports torch."""

from __future__ import annotations

import argparse
import math
import shlex
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from lightning_adam_mini.hints import require_package

from ..arguments import Parser, cpu_threads, make_folder
from ..hessian.options import ADVISE, add_options, parse_options
from ..recipes import find_recipe

__all__ = ["SLIMADAM", "main", "parse"]

SOURCES = ("moments", "hessian")
SLIMADAM, LEAST_MEMORY = RULES = ("slimadam", "least-memory")
BOUND = 0.5
"""Default of `--bound`, in nats."""
DESCRIPTIONS = {
    "moments": "Which structure of the second moment each matrix needs, measured in a short run of the recipe with "
    "AdamW,\nas overrides of AdamMini's partition. Options of `adam-mini fit`, such as --data.batch_size 8, change the "
    "recipe.",
    "hessian": "Which block structure each matrix needs by the Hessian of the recipe's loss, without names and types,\n"
    "as overrides of AdamMini's partition.",
}
SECTIONS = ("model", "data", "optimizer", "schedule", "trainer")
"""Sections of `fit` that change the run."""


def main(arguments: Sequence[str]) -> int:
    """Measure, and print the advice as a part of a recipe.

    Args:
        arguments: The command line after `advise`.

    Returns:
        The exit code.

    Raises:
        ArgumentError: The command line is wrong.
        ValueError: There is no such recipe, its optimizer has no learning rate for AdamW, the data are missing, or
            training diverged.
        OSError: The results cannot be written.
    """
    options = parse(arguments)
    options.command_line = shlex.join(["adam-mini", "advise", *arguments])
    if options.source == "hessian":
        from ..hessian.command import run as run_hessian

        run_hessian(options)
        return 0
    recipe = find_recipe(options.recipe, given_as="RECIPE")
    require_package("lightning", "advise")
    if options.out is not None:
        make_folder(options.out)
    from .moments import run

    with cpu_threads(options.threads):
        run(options, recipe)
    return 0


def parse(arguments: Sequence[str]) -> Namespace:
    """Parse the options; those of the recipe are left in `recipe_options`.

    Raises:
        ArgumentError: The command line is wrong.
    """
    first = Parser(prog="adam-mini advise", add_help=False)
    _add_source(first)
    source = first.parse_known_args(arguments)[0].source
    parser = _parser(source)
    if source == "hessian":
        return parse_options(parser, ADVISE, arguments)
    options = parser.parse_with_recipe(arguments, SECTIONS)
    _check(parser, options)
    return options


def _add_source(parser: Parser) -> None:
    parser.add_argument(
        "--source",
        choices=SOURCES,
        default="moments",
        help="Of the advice: AdamW's second moments in a short run (moments, the default), or the Hessian.",
    )


def _parser(source: str) -> Parser:
    parser = Parser(
        prog="adam-mini advise" if source == "moments" else "adam-mini advise --source hessian",
        description=DESCRIPTIONS[source],
        epilog=_parser("hessian").format_help() if source == "moments" else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if source == "hessian":
        add_options(parser, ADVISE)
        _add_source(parser)
        return parser
    parser.add_recipe(help="Packaged recipe, or path of one or of a run's config.yaml.")
    _add_source(parser)
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="Steps of training; 300 by default.")
    parser.add_argument(
        "--from-step", type=int, default=100, metavar="N", help="First step that is observed; 100 by default."
    )
    parser.add_argument("--every", type=int, default=20, metavar="N", help="Steps between observations; 20 by default.")
    parser.add_argument(
        "--rule",
        choices=RULES,
        default=SLIMADAM,
        help="slimadam, the default: average along the axes of the largest signal-to-noise ratio, if it is above 1. "
        "least-memory: the fewest numbers whose log-deviation is below --bound.",
    )
    parser.add_argument(
        "--bound", type=float, metavar="NATS", help=f"Of least-memory, for the log-deviation; {BOUND:g} by default."
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; as many as torch takes by default.")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="Write advice.json and recipe.yaml there.")
    return parser


def _check(parser: Parser, options: Namespace) -> None:
    parser.check_least(options, steps=1, every=1, threads=1)
    if options.from_step < 1:
        parser.error(f"--from-step {options.from_step}: at least 1")
    if options.steps < options.from_step:
        parser.error(
            f"--steps {options.steps} is below --from-step {options.from_step}, so that nothing would be observed: "
            "raise --steps, or lower --from-step"
        )
    if options.bound is not None and options.rule != LEAST_MEMORY:
        parser.error(f"--bound {options.bound:g} has no effect on --rule {options.rule}: give --rule {LEAST_MEMORY}")
    if options.rule == LEAST_MEMORY:
        options.bound = BOUND if options.bound is None else options.bound
        if not 0 < options.bound < math.inf:
            parser.error(f"--bound {options.bound:g}: a deviation is positive")
    if options.out is not None:
        options.out = parser.folder(options.out)
