"""`adam-mini report`: the report of what a folder holds, also while a comparison runs there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..arguments import Parser
from .assemble import load_comparison
from .progress import say
from .status import FINISHED, LOST

__all__ = ["report"]


def report(arguments: Sequence[str]) -> int:
    """Write the report of what a folder holds.

    Args:
        arguments: The folder.

    Returns:
        The exit code: 1 where a run that was started has no result.

    Raises:
        ArgumentError: The command line is wrong.
        ValueError: The folder holds no comparison.
    """
    parser = Parser(prog="adam-mini report", description="Write the report of a comparison again.", allow_abbrev=False)
    parser.add_argument("out", metavar="DIR", help="The folder that `adam-mini compare --out` was given.")
    out = Path(parser.parse_args(arguments).out).expanduser().resolve()
    comparison = load_comparison(out)
    from .report import write_report

    write_report(comparison, out)
    say(f"report: {out / 'report.html'}, report.md, report.csv")
    counts = comparison.statuses
    missing = {status: count for status, count in counts.items() if status not in FINISHED}
    if missing:
        told = ", ".join(f"{count} {status}" for status, count in missing.items())
        say(
            f"{sum(missing.values())} of {sum(counts.values())} runs have no result: {told}. The same command tries "
            "again."
        )
    return 1 if missing.keys() & set(LOST) else 0
