"""`adam-mini hessian`: reads the command line, and calls the function of the command."""

from __future__ import annotations

import shlex
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from lightning_adam_mini.hints import require_package

from ..arguments import cpu_threads, make_folder
from ..recipes import find_recipe, name_of
from .options import parse

__all__ = ["main", "run"]


def main(arguments: Sequence[str]) -> int:
    """Analyse a recipe's Hessian, and write the results to a folder.

    Args:
        arguments: The command line after `hessian`.

    Returns:
        The exit code.

    Raises:
        ArgumentError: The command line is wrong.
        ValueError: There is no such recipe, checkpoint or block, the data are missing, or memory does not suffice.
        OSError: The results cannot be written.
    """
    options = parse(arguments)
    options.command_line = shlex.join(["adam-mini", "hessian", *arguments])
    run(options)
    return 0


def run(options: Namespace) -> None:
    """Call the function of the options' command; see `main` for what it raises.

    Args:
        options: From `parse_options`, with `command_line`.
    """
    recipe = find_recipe(options.recipe, given_as="RECIPE")
    for package in ("lightning", "matplotlib", "jinja2"):
        require_package(package, "hessian")
    if options.out is None:
        options.out = Path("runs") / "hessian" / name_of(recipe) / options.command
    make_folder(options.out)
    if options.command in ("spectrum", "js"):
        from .spectra import run as run_command
    elif options.command == "exact":
        from .block_structure import run_exact as run_command
    else:
        from .block_structure import run_advise as run_command
    with cpu_threads(options.threads):
        run_command(options)
