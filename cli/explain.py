"""`adam-mini explain`: how a model would be cut, and what the optimizer would keep, before any training."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .arguments import Parser

if TYPE_CHECKING:
    from argparse import Namespace

    from .model_building import Source

__all__ = ["main"]

DESCRIPTION = """Show the role, the cut and the blocks of every parameter, the bytes of the optimizer's state, and what
to look at. No weights are made, no data are read and nothing is downloaded."""


def main(arguments: Sequence[str]) -> None:
    """Explain the partition of a recipe's model, or of a model of another library.

    Raises:
        ArgumentError: The command line is wrong.
        ValueError: There is no such model, a package is missing, or the model cannot be cut as asked.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    for name in ("recipe", "hf", "timm", "diffusers", "partition"):
        if getattr(options, name) == "":
            parser.error(f"{'RECIPE' if name == 'recipe' else f'--{name}'} is empty: give a name, or leave it out")
    sources = {name: getattr(options, name) for name in ("recipe", "hf", "timm", "diffusers")}
    given = {name: value for name, value in sources.items() if value is not None}
    if len(given) != 1:
        parser.error("give exactly one of RECIPE, --hf, --timm and --diffusers")
    overrides = _pairs(parser, "--override", options.override)
    layouts = _pairs(parser, "--layout", options.layout)
    ((kind, value),) = given.items()

    from .model_sources import SOURCES

    _write(_explanation(SOURCES[kind](value), options, overrides, layouts))


def _parser() -> Parser:
    parser = Parser(prog="adam-mini explain", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="Packaged recipe, or path of one.")
    parser.add_argument(
        "--hf",
        metavar="NAME_OR_CONFIG.json",
        help="Model of transformers: its config.json, a folder with one, a name in the local cache of the hub, or the "
        """content of a config.json, such as '{"model_type": "gpt2"}'.""",
    )
    parser.add_argument("--timm", metavar="NAME", help="Model of timm, such as vit_base_patch16_224.")
    parser.add_argument(
        "--diffusers",
        metavar="CLASS_OR_CONFIG.json",
        help="Model of diffusers: a class, such as UNet2DConditionModel, with its defaults, or a config.json.",
    )
    parser.add_argument("--partition", metavar="NAME", help="auto by default, or what the recipe says.")
    parser.add_argument(
        "--override",
        metavar="KEY=CUT",
        action="append",
        default=[],
        help="Cut of a role, of a parameter or of a re: pattern, before those of the recipe; may be repeated.",
    )
    parser.add_argument(
        "--layout",
        metavar="CLASS=LAYOUT",
        action="append",
        default=[],
        help="Layout, by its name, of a class of attention; may be repeated.",
    )
    parser.add_argument("--full", action="store_true", help="One row for each parameter, not one for equal layers.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    return parser


def _pairs(parser: Parser, option: str, values: Sequence[str]) -> dict[str, str]:
    """Values of the form KEY=VALUE; a pattern may itself hold `=`."""
    pairs: dict[str, str] = {}
    for value in values:
        key, equals, meant = value.rpartition("=")
        if not (key and equals and meant):
            parser.error(f"{option} {value}: expected {'KEY=CUT' if option == '--override' else 'CLASS=LAYOUT'}")
        if key in pairs:
            parser.error(f"{option} {value}: {key} is given twice")
        pairs[key] = meant
    return pairs


def _explanation(source: Source, options: Namespace, overrides: dict[str, str], layouts: dict[str, str]) -> str:
    """The text of the command."""
    from lightning_adam_mini.measure import explain

    own = {key: cut for key, cut in source.overrides.items() if key not in overrides}
    try:
        explanation = explain(
            source.model,
            options.partition or source.partition,
            {**overrides, **own},
            partition_layouts={**source.layouts, **layouts},
            exp_avg_dtype=source.exp_avg_dtype,
        )
    except ValueError as error:
        if not (own and overrides):
            raise
        told = ", ".join(f"{key}={cut}" for key, cut in own.items())
        raise ValueError(f"{error} (the recipe itself overrides {told}; --override with the same key wins)") from error
    explanation = replace(explanation, warnings=(*source.warnings, *explanation.warnings))
    return json.dumps(explanation.to_dict()) if options.json else explanation.table(full=options.full)


def _write(text: str) -> None:
    """Print; a reader that wants the first lines alone (`| head`) is no error."""
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
