"""The files of a study: each is written beside its place and then renamed."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path

from lightning_adam_mini.measure import describe_machine, package_versions

from ...tasks.run_files import save_figure, write_text
from .outcome import Outcome
from .registry import Study

__all__ = ["write_outcome"]


def write_outcome(folder: Path, study: Study, outcome: Outcome, *, command: str, seconds: float) -> list[Path]:
    """Write `table.csv`, `figure.png` and, last, `result.json`.

    Args:
        folder: Where; it is made, and files of these names are replaced.
        study: With the settings, seeds among them.
        outcome: What it found.
        command: The command line.
        seconds: How long it took.

    Returns:
        The files.
    """
    from matplotlib.figure import Figure

    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(outcome.rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(outcome.rows)
    paths = [folder / name for name in ("table.csv", "figure.png", "result.json")]
    write_text(paths[0], table.getvalue())
    figure = Figure(figsize=outcome.size, layout="constrained")
    outcome.draw(figure)
    save_figure(figure, paths[1])
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
    write_text(paths[2], json.dumps(result, indent=1) + "\n")
    return paths
