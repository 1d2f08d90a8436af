"""`adam-mini study`: runs a study, logs its claims, and writes its table and picture."""

from __future__ import annotations

import argparse
import logging
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from lightning_adam_mini.hints import require_package

from ..arguments import Parser, cpu_threads
from .common.study import list_studies, load_study

__all__ = ["main"]

log = logging.getLogger(__name__)

DESCRIPTION = """Run a study of the papers' claims at the sizes of its recipe. It writes table.csv, figure.png and
result.json, which has the claims with what was measured, the settings, the seeds and the machine."""


def main(arguments: Sequence[str]) -> int:
    """Run one study.

    Args:
        arguments: The command line after `study`.

    Returns:
        0, also where a claim does not hold: that is a finding, which is logged and saved.

    Raises:
        ArgumentError: The command line is wrong.
        ValueError: There is no such study or setting, a package is missing, or the folder has files of something else.
        OSError: The results cannot be written.
    """
    names = list_studies()
    width = max(map(len, names))
    listing = "\n".join(f"  {name:<{width}}  {title}" for name, title in names.items())
    parser = Parser(
        prog="adam-mini study",
        description=DESCRIPTION,
        epilog=f"studies:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_recipe("name", metavar="NAME", help="A study of the list below, or the path of a recipe.")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="runs/studies/NAME by default; older files of it are replaced."
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="changes", help="Change a setting; repeatable."
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads; 1 by default.")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error(f"--threads {options.threads}: at least 1")
    require_package("matplotlib", "a study")
    study = load_study(options.name, options.changes)
    folder = parser.folder(options.out or Path("runs/studies") / study.name)

    from .common.outcome import as_text, prepare_folder, write_outcome

    prepare_folder(folder, study.name)
    start = time.perf_counter()
    with cpu_threads(options.threads):
        outcome = study.run(study.settings)
        seconds = time.perf_counter() - start
        command = shlex.join(["adam-mini", "study", *arguments])
        paths = write_outcome(folder, study, outcome, command=command, seconds=seconds)
    log.info("%s\n", as_text(outcome.summary or outcome.rows))
    for claim in outcome.claims:
        source = f" ({claim.source})" if claim.source else ""
        log.info("%s: %s%s: %s", "holds" if claim.holds else "DOES NOT HOLD", claim.text, source, claim.measured)
    log.info("\nwrote %s in %.0f s", ", ".join(map(str, paths)), seconds)
    return 0
