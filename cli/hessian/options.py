"""The command line of `adam-mini hessian` and of `adam-mini advise --source hessian`. Nothing here imports torch."""

from __future__ import annotations

import argparse
import math
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ..arguments import Parser

__all__ = ["ADVISE", "COMMANDS", "add_options", "parse", "parse_options"]

COMMANDS = {
    "spectrum": "Densities of eigenvalues of each block, by stochastic Lanczos quadrature.",
    "js": "The same, and how different they are: Jensen-Shannon divergences between all pairs of blocks.",
    "exact": "Dense Hessians of small blocks, and how block-diagonal they are for each block structure.",
}
ADVISE = "advise"
"""The command that `adam-mini advise --source hessian` calls."""
DESCRIPTION = """{title} The loss is that of the recipe's task in eval mode, over the first batches of the
training data; the weights are fresh ones as `fit` would start with, or those of a checkpoint. Options of `adam-mini
fit`, such as --data.batch_size 8, change the recipe."""
PASSED_ON = ("model", "data", "optimizer")
"""Sections of `fit` that change the model, its data or its partition."""


def parse(arguments: Sequence[str]) -> Namespace:
    """Parse the options; those of the recipe are left in `recipe_options`.

    Raises:
        ArgumentError: The command line is wrong.
    """
    parser = Parser(
        prog="adam-mini hessian",
        description="The Hessian of a recipe's model.",
        usage="adam-mini hessian {spectrum,js,exact} RECIPE [options]",
        epilog="commands:\n" + "\n".join(f"  {name:<9} {title}" for name, title in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if not arguments or arguments[0] in ("-h", "--help"):
        parser.parse_args(["--help"])
    if (command := arguments[0]) not in COMMANDS:
        advice = "; for advice, adam-mini advise RECIPE --source hessian" if command == ADVISE else ""
        parser.error(f"hessian {command}: there is no such command; choose from {', '.join(COMMANDS)}{advice}")
    parser = Parser(
        prog=f"adam-mini hessian {command}",
        description=DESCRIPTION.format(title=COMMANDS[command]),
        allow_abbrev=False,
    )
    add_options(parser, command)
    return parse_options(parser, command, arguments[1:])


def parse_options(parser: Parser, command: str, arguments: Sequence[str]) -> Namespace:
    """Parse and check the options of one command.

    Args:
        parser: With the options of `add_options`.
        command: One of `COMMANDS`, or `ADVISE`.
        arguments: The command line after the command.

    Raises:
        ArgumentError: The command line is wrong.
    """
    options = parser.parse_with_recipe(arguments, PASSED_ON)
    options.command = command
    options.memory_text, options.memory = options.memory, parser.memory(options.memory, least=0)
    _check(parser, options)
    return options


def add_options(parser: Parser, command: str) -> None:
    """Add RECIPE and the options of a command, one of `COMMANDS` or `ADVISE`."""
    parser.add_recipe(help="Packaged recipe, or path of one or of a run's config.yaml.")
    parser.add_argument("--ckpt_path", metavar="PATH", help="Weights: a checkpoint, or `last` or `best` of the run.")
    parser.add_argument("--run_dir", metavar="DIR", help="Run that last and best are of; RECIPE's newest by default.")
    parser.add_argument(
        "--blocks",
        nargs="+",
        metavar="PATTERN",
        help="Parameters by name, by pattern (*.q_proj.weight) or re: pattern; with [K] or [*] behind a pattern, its "
        "blocks in the recipe's partition, such as heads. By default all trainable matrices.",
    )
    parser.add_argument("--batches", type=int, default=4, metavar="N", help="Training batches; 4 by default.")
    parser.add_argument(
        "--precision",
        choices=("float32", "float64"),
        default="float64" if command == "exact" else "float32",
        help="Of the computation; %(default)s by default.",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="CUDA where there is a GPU by default.")
    parser.add_argument(
        "--memory",
        default="2GiB",
        metavar="SIZE",
        help="For vectors of Lanczos (0 keeps none), or for a dense Hessian; 2GiB by default.",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; as many as torch takes by default.")
    parser.add_argument("--out", type=Path, metavar="DIR", help="runs/hessian/RECIPE/COMMAND by default.")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="Of random vectors and of noise in the loss.")
    if command in ("spectrum", "js"):
        parser.add_argument("--steps", type=int, default=100, metavar="N", help="Lanczos steps; 100 by default.")
        parser.add_argument("--probes", type=int, default=10, metavar="N", help="Random starts; 10 by default.")
        parser.add_argument("--whole", action="store_true", help="Also the spectrum of the whole Hessian.")
    if command == "js":
        parser.add_argument(
            "--scale",
            choices=("raw", "model", "top", "tenth"),
            default="raw",
            help="Eigenvalues as they are, in units of the largest absolute one of all blocks (model), or of the "
            "block's own largest absolute one (top) or 10th largest (tenth); raw by default.",
        )
        parser.add_argument(
            "--sigma", type=float, default=1e-5**0.5, help="Width of the blur, in the unit of --scale; 0.00316."
        )
    if command == ADVISE:
        parser.add_argument(
            "--method",
            choices=("auto", "exact", "sketch"),
            default="auto",
            help="Dense Hessians, some of their columns, or dense ones up to 1,024 elements (auto, the default).",
        )
        parser.add_argument("--columns", type=int, default=64, metavar="N", help="Of the sketch; 64 by default.")


def _check(parser: Parser, options: Namespace) -> None:
    least = {"batches": 1, "steps": 1, "probes": 1, "columns": 2, "threads": 1}
    for name, number in least.items():
        if (given := getattr(options, name, None)) is not None and given < number:
            parser.error(f"--{name} {given}: at least {number}")
    if not 0 < getattr(options, "sigma", 1.0) < math.inf:
        parser.error(f"--sigma {options.sigma}: a width is positive")
    if getattr(options, "scale", None) == "tenth" and options.steps < 10:
        parser.error(f"--scale tenth needs --steps 10 or more, not {options.steps}: fewer find no 10th eigenvalue")
    if options.out is not None:
        options.out = parser.folder(options.out)
    for name in ("ckpt_path", "run_dir"):
        if getattr(options, name) == "":
            parser.error(f"--{name} is empty: give a path, or leave it out")
    if options.run_dir is not None and options.ckpt_path not in ("last", "best"):
        parser.error("--run_dir names the run of a checkpoint: give --ckpt_path last or best with it")
