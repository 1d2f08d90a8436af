"""Metrics: exact sums over batches and ranks, and the file of a run that they are logged to."""

from __future__ import annotations

import json
import os
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torchmetrics import Metric

from .errors import cannot_write

__all__ = ["ExactMetric", "MeanLoss", "MetricsFile", "read_metrics"]


FILE_NAME = "metrics.jsonl"


class MetricsFile(Logger):
    """A logger that appends to `metrics.jsonl` in the run folder and never rewrites a line.

    Args:
        save_dir: The run folder.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self._save_dir = save_dir
        self._started = False

    @property
    def name(self) -> str:
        """Lightning's name of the logger."""
        return "metrics"

    @property
    def version(self) -> str:
        """Empty: there is one file a run."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return self._save_dir

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: hyperparameters are in the run's config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one line with the metrics, `step` (optimizer steps so far) and `time` (seconds since 1970).

        Args:
            metrics: The values.
            step: Lightning's number of the last step, from 0.

        Raises:
            OSError: The disk is full, or the folder cannot be written.
        """
        path = Path(self._save_dir) / FILE_NAME
        row = {"step": None if step is None else step + 1, "time": round(time.time(), 3), **metrics}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.write(f"{self._line_end(path)}{json.dumps(row)}\n".encode())
        except OSError as error:
            raise cannot_write(f"the metrics {path}", error, "free space or set another --run_dir") from error

    def _line_end(self, path: Path) -> str:
        """The line end that a kill or a full disk has cut off, before the first row of this process."""
        if self._started:
            return ""
        self._started = True
        with path.open("rb") as file:
            if not file.seek(0, os.SEEK_END):
                return ""
            file.seek(-1, os.SEEK_END)
            return "" if file.read() == b"\n" else "\n"


def read_metrics(run_dir: str | Path) -> dict[str, dict[int, float]]:
    """Metrics of a run: values by step, by name.

    Of a step that a resumed run took again, the later value counts. A line that a kill has cut off is skipped.
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


class ExactMetric(Metric):
    """A metric whose states keep their dtype when a trainer converts the whole task (`bf16-true`, `16-true`).

    A sum in bfloat16 stops growing after a few hundred equal batches, and one in float16 overflows.
    """

    full_state_update = False

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:
        return super()._apply(lambda tensor: fn(tensor).to(tensor.dtype), exclude_state)


class MeanLoss(ExactMetric):
    """Mean loss over all batches of all ranks; NaN if there were none.

    NaN losses make it NaN, where torchmetrics' own mean leaves them out.
    """

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: Tensor | int) -> None:
        """Add a batch.

        Args:
            total: Sum of its losses.
            count: How many there are; 0 for a batch of padding.
        """
        self.total += total.to(self.total.dtype)
        self.count += count

    def compute(self) -> Tensor:
        """The mean, float32."""
        return self.total / self.count
