"""`adam-mini explain`: how a model would be cut, and what the optimizer would keep, before any training."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .arguments import Parser

if TYPE_CHECKING:
    from argparse import Namespace

    from lightning_adam_mini.measure import Explanation
    from lightning_adam_mini.verify import Verification

    from .model_building import Source

__all__ = ["main"]

DESCRIPTION = """Show the role, the cut and the blocks of every parameter, the bytes of the optimizer's state, and what
to look at. No weights are made, no data are read and nothing is downloaded. With --verify the model runs once, with
random weights and a random input, and tells of each parameter whether it uses it as it is cut; a contradiction ends the
command with 1."""


def main(arguments: Sequence[str]) -> int:
    """Explain the partition of a recipe's model, or of a model of another library.

    Returns:
        The exit code: 1 where the forward pass contradicts the partition.

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

    text, code = _explanation(SOURCES[kind](value), options, overrides, layouts)
    _write(text)
    return code


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
    parser.add_argument("--verify", action="store_true", help="Run the model once, and compare; 1 if it contradicts.")
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


def _explanation(
    source: Source, options: Namespace, overrides: dict[str, str], layouts: dict[str, str]
) -> tuple[str, int]:
    """The text of the command, and its exit code."""
    from lightning_adam_mini.measure import explain

    own = {key: cut for key, cut in source.overrides.items() if key not in overrides}
    partition, all_overrides = options.partition or source.partition, {**overrides, **own}
    all_layouts = {**source.layouts, **layouts}
    verification: Verification | None = None
    remarks: list[str] = []
    try:
        explanation = explain(
            source.model,
            partition,
            all_overrides,
            partition_layouts=all_layouts,
            exp_avg_dtype=source.exp_avg_dtype,
        )
    except ValueError as error:
        if not (own and overrides):
            raise
        keys = ", ".join(f"{key}={cut}" for key, cut in own.items())
        raise ValueError(f"{error} (the recipe itself overrides {keys}; --override with the same key wins)") from error
    if options.verify:
        verification, remarks = _verification(source, partition, all_overrides, all_layouts)
        explanation = _with_verdicts(explanation, verification)
    explanation = replace(explanation, warnings=(*source.warnings, *remarks, *explanation.warnings))
    if options.json:
        content = explanation.to_dict()
        if verification is not None:
            content["verification"] = verification.to_dict()
        text = json.dumps(content)
    else:
        text = explanation.table(full=options.full)
        if verification is not None:
            text += f"\n\n{_summary(verification)}"
    return text, int(verification is not None and bool(verification.contradicted))


def _verification(
    source: Source, partition: str, overrides: dict[str, str], layouts: Mapping[str, str]
) -> tuple[Verification, list[str]]:
    """The verdict of a forward pass on a model with random weights, and what that model lacks."""
    from lightning_adam_mini import verify_partition

    from .dummy_inputs import dummy_inputs
    from .model_building import quiet

    assert source.runnable is not None
    model, remarks = source.runnable()
    inputs = dummy_inputs(model)
    with quiet():
        try:
            found = verify_partition(
                model,
                partition=partition,
                partition_overrides=overrides,
                partition_layouts=layouts,
                **inputs,
            )
        except ValueError as error:
            shapes = ", ".join(f"{name} {list(getattr(value, 'shape', ()))}" for name, value in inputs.items())
            raise ValueError(f"--verify made up an input of {shapes}: {error}") from error
    return found, remarks


def _with_verdicts(explanation: Explanation, verification: Verification) -> Explanation:
    """Rows with their verdicts; layers that were left out have those of their like."""
    from lightning_adam_mini.measure.explanation_table import template

    alike: dict[str, set[str]] = {}
    for name, verdict in verification.parameters.items():
        alike.setdefault(template(name), set()).add(verdict.status.value)

    def status(name: str) -> str:
        if name in verification.parameters:
            return verification.parameters[name].status.value
        found = alike.get(template(name), set())
        return found.copy().pop() if len(found) == 1 else "not seen"

    return replace(explanation, rows=tuple(replace(row, verified=status(row.name)) for row in explanation.rows))


def _summary(verification: Verification) -> str:
    """What the forward pass contradicts, and what would be right."""
    from lightning_adam_mini.measure.explanation_table import collapse

    counts = {status: len(verification.of_status(status)) for status in ("confirmed", "contradicted", "not seen")}
    lines = ["verified  " + ", ".join(f"{count} {status}" for status, count in counts.items())]
    lines += [f"note: {note}" for note in verification.notes]
    groups = collapse(
        verification.contradicted, name=lambda verdict: verdict.name, alike=lambda verdict: verdict.reason
    )
    lines += [f"contradicted: {name}: {members[0].reason}" for name, members in groups]
    if verification.remedy:
        lines += ["correct arguments:", verification.remedy]
    return "\n".join(lines)


def _write(text: str) -> None:
    """Print; a reader that wants the first lines alone (`| head`) is no error."""
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
