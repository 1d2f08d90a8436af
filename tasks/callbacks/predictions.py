"""Predictions on disk, one JSON object a line."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..run_files import write_text

__all__ = ["PredictionFile"]

log = logging.getLogger(__name__)

_SHOWN = 8


class PredictionFile(Callback):
    """Writes what `predict` returns to `predictions.jsonl` in the run folder, and the first few to the log.

    A task returns a list of objects that JSON can hold from `predict_step`. The file is replaced when all are there;
    each rank but the first writes one of its own, unless the model is sharded: then all ranks predict the same.
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Keep the batch's predictions."""
        if _repeats_rank_zero(trainer, pl_module):
            return
        for row in outputs or []:
            self._rows.append(row)
            if len(self._rows) <= _SHOWN:
                log.info("%s", "\n".join(f"{key}: {value}" for key, value in row.items()))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        if _repeats_rank_zero(trainer, pl_module):
            return
        rank = f".rank{trainer.global_rank}" if trainer.global_rank else ""
        path = Path(trainer.default_root_dir) / f"predictions{rank}.jsonl"
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self._rows))
        total, self._rows = len(self._rows), []
        log.info("%s", f"{total} predictions: {path}")


def _repeats_rank_zero(trainer: Trainer, pl_module: LightningModule) -> bool:
    return trainer.global_rank > 0 and getattr(pl_module, "is_sharded", False)
