"""The files of a study: each is written beside its place and then renamed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from lightning_adam_mini.measure import describe_machine, package_versions

from ...tasks.run_files import save_figure, write_text
from ..arguments import make_folder
from .common.outcome import Outcome, as_csv
from .common.study import Study

__all__ = ["prepare_folder", "write_outcome"]

TABLE, FIGURE, RESULT = "table.csv", "figure.png", "result.json"


def prepare_folder(folder: Path, name: str) -> None:
    """Make the folder, and make sure before the work that the files of a study can be put there.

    Args:
        folder: Where an outcome will be written.
        name: Of the study; an earlier outcome of the same one is replaced.

    Raises:
        ValueError: A file of the same name is there that no run of this study wrote.
        OSError: The folder cannot be made, or nothing can be written to it.
    """
    make_folder(folder)
    if taken := [file for file in (RESULT, TABLE, FIGURE) if (folder / file).exists()]:
        found = _study_of(folder / RESULT)
        if found != name:
            whose = f"of the study {found}" if found else "of no finished study"
            raise ValueError(f"{folder / taken[0]} is {whose}: give another folder with --out, or remove it")


def write_outcome(folder: Path, study: Study, outcome: Outcome, *, command: str, seconds: float) -> list[Path]:
    """Write `table.csv`, `figure.png` and, last, `result.json`, which is there only if it belongs to the other two.

    Args:
        folder: Where; see `prepare_folder`.
        study: With the settings, seeds among them.
        outcome: What it found.
        command: The command line.
        seconds: How long it took.

    Returns:
        The files.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=outcome.size, layout="constrained")
    outcome.draw(figure)
    result = {
        "command": command,
        "study": study.name,
        "settings": asdict(study.settings),
        "claims": [asdict(claim) for claim in outcome.claims],
        "figures": outcome.figures,
        "seconds": round(seconds, 1),
        "hardware": describe_machine(),
        "versions": package_versions(),
    }
    paths = [folder / name for name in (TABLE, FIGURE, RESULT)]
    paths[-1].unlink(missing_ok=True)
    write_text(paths[0], as_csv(outcome.rows))
    save_figure(figure, paths[1])
    write_text(paths[2], json.dumps(result, indent=1) + "\n")
    return paths


def _study_of(result: Path) -> str | None:
    """The study whose result a file is, None if it is no such file."""
    try:
        return str(json.loads(result.read_text("utf-8"))["study"])
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return None
