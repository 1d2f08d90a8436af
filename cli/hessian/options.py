"""The command line of `adam-mini hessian`. Nothing here imports torch."""

from __future__ import annotations

import argparse
import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ..arguments import Parser

__all__ = ["COMMANDS", "parse"]

COMMANDS = {
    "spectrum": "Densities of eigenvalues of each block, by stochastic Lanczos quadrature.",
    "js": "The same, and how different they are: Jensen-Shannon divergences between all pairs of blocks.",
    "exact": "Dense Hessians of small blocks, and how block-diagonal they are for each cut.",
    "advise": "Which cut each matrix asks for, without regard to its name or type, as partition_overrides.",
}
DESCRIPTION = """{title} The loss is that of the recipe's task in eval mode, over the first batches of the
training data; the weights are fresh ones as `fit` would start with, or those of a checkpoint. Options of `adam-mini
fit`, such as --data.batch_size 8, change the recipe."""
UNITS = {"": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
PASSED_ON = ("--model.", "--data.", "--trainer.", "--optimizer.", "--schedule.", "--seed_everything")


def parse(arguments: Sequence[str]) -> Namespace:
    """Parse the options; those of the recipe are left in `recipe_options`.

    Raises:
        ArgumentError: The command line is wrong.
    """
    parser = Parser(
        prog="adam-mini hessian",
        description="The Hessian of a recipe's model.",
        usage="adam-mini hessian {spectrum,js,exact,advise} RECIPE [options]",
        epilog="commands:\n" + "\n".join(f"  {name:<9} {title}" for name, title in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if not arguments or arguments[0] in ("-h", "--help"):
        parser.parse_args(["--help"])
    if arguments[0] not in COMMANDS:
        parser.error(f"hessian {arguments[0]}: there is no such command; choose from {', '.join(COMMANDS)}")
    options, rest = _parser(command := arguments[0]).parse_known_args(arguments[1:])
    options.command = command
    options.recipe_options = _recipe_options(parser, rest)
    options.memory = _bytes(parser, options.memory)
    _check(parser, options)
    return options


def _parser(command: str) -> Parser:
    parser = Parser(
        prog=f"adam-mini hessian {command}",
        description=DESCRIPTION.format(title=COMMANDS[command]),
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="Packaged recipe, or path of one or of a run's config.yaml.")
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
        default="float64" if command in ("exact", "advise") else "float32",
        help="Of the computation; %(default)s by default.",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="CUDA where there is a GPU by default.")
    parser.add_argument(
        "--memory",
        default="2GiB",
        metavar="SIZE",
        help="For vectors of Lanczos, or for a dense Hessian; 2GiB by default.",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="runs/hessian/RECIPE/COMMAND by default.")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="Of random vectors and of noise in the loss.")
    if command in ("spectrum", "js"):
        parser.add_argument("--steps", type=int, default=100, metavar="N", help="Lanczos steps; 100 by default.")
        parser.add_argument("--probes", type=int, default=10, metavar="N", help="Random starts; 10 by default.")
        parser.add_argument("--whole", action="store_true", help="Also the spectrum of the whole Hessian.")
    if command == "js":
        parser.add_argument(
            "--scale",
            choices=("raw", "top", "tenth"),
            default="raw",
            help="Eigenvalues as they are, or over the block's largest absolute or 10th largest; raw by default.",
        )
        parser.add_argument(
            "--sigma", type=float, default=1e-5**0.5, help="Width of the blur, in the unit of --scale; 0.00316."
        )
    if command == "advise":
        parser.add_argument(
            "--method",
            choices=("auto", "exact", "sketch"),
            default="auto",
            help="Dense Hessians, random signs, or dense ones up to 1,024 elements (auto).",
        )
        parser.add_argument("--probes", type=int, default=8, metavar="N", help="Of the sketch; 8 by default.")
    return parser


def _recipe_options(parser: Parser, rest: Sequence[str]) -> list[str]:
    """What goes to the recipe; any other option is an error here."""
    options = [text for text in rest if text.startswith("-")]
    if (rest and not rest[0].startswith("-")) or any(not text.startswith(PASSED_ON) for text in options):
        wrong = next((text for text in options if not text.startswith(PASSED_ON)), rest[0])
        parser.error(f"there is no option {wrong}; `adam-mini hessian COMMAND --help` lists them")
    return list(rest)


def _check(parser: Parser, options: Namespace) -> None:
    if not options.recipe:
        parser.error("RECIPE is empty: give a name; `adam-mini recipes` lists them")
    least = {"batches": 1, "steps": 1, "probes": 2 if options.command == "advise" else 1}
    for name, number in least.items():
        if getattr(options, name, number) < number:
            parser.error(f"--{name} {getattr(options, name)}: at least {number}")
    if getattr(options, "sigma", 1.0) <= 0:
        parser.error(f"--sigma {options.sigma}: a width is positive")
    if options.out is not None:
        options.out = parser.folder(options.out)
    if options.run_dir is not None and options.ckpt_path is None:
        parser.error("--run_dir names the run of a checkpoint: give --ckpt_path last or best with it")


def _bytes(parser: Parser, text: str) -> int:
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-z]*)\s*", text.lower())
    if found is None or found[2] not in UNITS:
        parser.error(f"--memory {text}: give a number with a unit, such as 2GB, 2GiB or 500MB")
    return int(float(found[1]) * UNITS[found[2]])
