"""A logger that appends: one JSON object a line, never rewritten, so that resuming and validating lose nothing."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

__all__ = ["MetricsFile", "read_metrics"]

FILE_NAME = "metrics.jsonl"


class MetricsFile(Logger):
    """Appends metrics to `metrics.jsonl` in the run folder.

    Args:
        save_dir: The run folder.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self._save_dir = save_dir

    @property
    def name(self) -> str:
        """Lightning's name of the logger."""
        return "metrics"

    @property
    def version(self) -> str:
        """There is one file a run."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return self._save_dir

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Hyperparameters stand in the run's config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one line: the metrics, `step` (optimizer steps) and `time` (seconds since 1970)."""
        folder = Path(self._save_dir)
        folder.mkdir(parents=True, exist_ok=True)
        row = {"step": step, "time": round(time.time(), 3), **metrics}
        with (folder / FILE_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(run_dir: str | Path) -> dict[str, dict[int, float]]:
    """Metrics of a run: name to step to value.

    Steps that a resumed run took again count once, with the later value. A last line that a kill cut off is skipped.
    """
    series: dict[str, dict[int, float]] = {}
    path = Path(run_dir) / FILE_NAME
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        step = row.pop("step")
        for name, value in row.items():
            if name not in ("time", "epoch"):
                series.setdefault(name, {})[step] = value
    return {name: dict(sorted(values.items())) for name, values in series.items()}
