"""`adam-mini explain`: the blocks of a model and the optimizer state that it needs, before any training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .arguments import Parser
from .messages import quiet, show

if TYPE_CHECKING:
    from argparse import Namespace

    from lightning_adam_mini.measure import Explanation
    from lightning_adam_mini.verify import Verification

    from .models import Source

__all__ = ["main"]

DESCRIPTION = """Show the role and the blocks of every parameter, the bytes of the optimizer's state, and warnings. No
weights are made, no data are read and nothing is downloaded. With --verify the model runs once, with random weights and
a random input, and each parameter is reported as confirmed or not: does the forward pass use it in these blocks? The
exit code is 1 if one is contradicted."""


def main(arguments: Sequence[str]) -> int:
    """Explain the partition of a recipe's model, or of a model of another library.

    Returns:
        The exit code: 1 if the forward pass contradicts the partition.

    Raises:
        ArgumentError: The command line is wrong.
        ValueError: There is no such model, a package is missing, or the partition does not fit the model.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.partition == "":
        parser.error("--partition is empty: give a name, or leave it out")
    parser.check_model(options)
    overrides = _pairs(parser, "--override", options.override)
    layouts = _pairs(parser, "--layout", options.layout)

    from .models import SOURCES, check_partition

    if options.partition is not None:
        check_partition(options.partition)
    text, code = _explanation(SOURCES[options.source](options.model), options, overrides, layouts)
    show(text)
    return code


def _parser() -> Parser:
    parser = Parser(prog="adam-mini explain", description=DESCRIPTION)
    parser.add_model("hf", "timm", "diffusers")
    parser.add_argument("--partition", metavar="NAME", help="auto by default, or that of the recipe.")
    parser.add_argument(
        "--override",
        metavar="KEY=STRUCTURE",
        action="append",
        default=[],
        help="Block structure of a role, of a parameter or of a re: pattern, before those of the recipe; repeatable.",
    )
    parser.add_argument(
        "--layout",
        metavar="CLASS=LAYOUT",
        action="append",
        default=[],
        help="Name of the layout of an attention class; repeatable.",
    )
    parser.add_argument("--verify", action="store_true", help="Run the model once and check the blocks.")
    parser.add_argument("--full", action="store_true", help="A row for each parameter, not one for equal layers.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    return parser


def _pairs(parser: Parser, option: str, values: Sequence[str]) -> dict[str, str]:
    """Values of the form KEY=VALUE; a pattern may itself contain `=`."""
    pairs: dict[str, str] = {}
    for value in values:
        key, equals, meant = value.rpartition("=")
        if not (key and equals and meant):
            parser.error(f"{option} {value}: expected {'KEY=STRUCTURE' if option == '--override' else 'CLASS=LAYOUT'}")
        if key in pairs:
            parser.error(f"{option} {value}: {key} is given twice")
        pairs[key] = meant
    return pairs


def _explanation(
    source: Source, options: Namespace, overrides: dict[str, str], layouts: dict[str, str]
) -> tuple[str, int]:
    """The text of the command, and its exit code."""
    from lightning_adam_mini.measure import explain

    own = {key: structure for key, structure in source.overrides.items() if key not in overrides}
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
        keys = ", ".join(f"{key}={structure}" for key, structure in own.items())
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
    """The verdict of a forward pass of a model with random weights, and which layers that model leaves out."""
    from lightning_adam_mini import verify_partition

    from .runnable_models import dummy_inputs

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
    """Rows with their verdicts; a layer that was left out has that of the same parameter in other layers."""
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
    """What the forward pass contradicts, and the correct partition."""
    from lightning_adam_mini.measure.explanation_table import collapse

    counts = {status: len(verification.of_status(status)) for status in ("confirmed", "contradicted", "not seen")}
    lines = ["verified  " + ", ".join(f"{count} {status}" for status, count in counts.items())]
    lines += [f"note: {note}" for note in verification.notes]
    groups = collapse(
        verification.contradicted, name=lambda verdict: verdict.name, alike=lambda verdict: verdict.reason
    )
    lines += [f"contradicted: {name}: {members[0].reason}" for name, members in groups]
    if verification.remedy:
        lines += ["the correct partition:", verification.remedy]
    return "\n".join(lines)
