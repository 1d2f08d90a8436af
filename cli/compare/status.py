"""How a run ended: `status.json` in its folder."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any, Literal

from ...tasks.atomic_files import read_json, write_json

__all__ = [
    "FINISHED",
    "LOST",
    "RunStatus",
    "last_error",
    "read_status",
    "status_after",
    "write_status",
]

RunStatus = Literal["done", "diverged", "failed", "timeout", "interrupted", "pending"]
"""How a run ended; `pending` has not started, or is still running."""

FINISHED = ("done", "diverged")
"""Runs that are not started again."""

LOST = ("failed", "timeout", "interrupted")
"""Runs that were started and have no result."""

DIVERGED_EXIT_CODE = 3
"""Exit code of `adam-mini fit` if the loss is not finite."""


def read_status(folder: Path) -> dict[str, Any]:
    """The content of `status.json` in a run folder; `{"status": "pending"}` before the first start."""
    return {"status": "pending"} | read_json(folder / "status.json")


def write_status(folder: Path, status: dict[str, Any]) -> None:
    """Write `status.json` in a run folder."""
    write_json(folder / "status.json", status)


def status_after(exit_code: int, folder: Path, *, log_start: int, stopped: str | None) -> tuple[str, str]:
    """The status of a run whose process has ended, and the reason if it did not finish.

    Args:
        exit_code: Of the process; minus the signal that killed it.
        folder: The run folder.
        log_start: Where this start begins in the log.
        stopped: `timeout` or `interrupted` if the comparison stopped it.
    """
    if exit_code == 0:
        return _status_of_result(folder)
    if exit_code == DIVERGED_EXIT_CODE:
        return "diverged", last_error(folder / "log.txt", log_start)
    if stopped == "timeout":
        return "timeout", "it did not finish within --timeout; the next start resumes from its checkpoint"
    signals = {number for name in (signal.SIGINT, signal.SIGTERM) for number in (-name, 128 + name)}
    if stopped or exit_code in signals:
        return "interrupted", "it was stopped; the next start resumes from its checkpoint"
    if exit_code < 0:
        hint = "; is memory short?" if exit_code == -signal.SIGKILL else ""
        return "failed", f"its process was killed by {signal.Signals(-exit_code).name}{hint}"
    return "failed", last_error(folder / "log.txt", log_start)


def last_error(log: Path, start: int = 0, limit: int = 400) -> str:
    """The last error line of a log, or its last line.

    Args:
        log: The file.
        start: Bytes to skip.
        limit: Maximum number of characters.
    """
    try:
        with log.open("rb") as file:
            file.seek(start)
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError as error:
        return f"it left no log: {error.strerror}"
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line.removeprefix("adam-mini: error: ") for line in lines if line.startswith("adam-mini: error: ")]
    return (errors or lines or ["its log is empty"])[-1][:limit]


def _status_of_result(folder: Path) -> tuple[str, str]:
    result = read_json(folder / "result.json")
    primary_metric = result.get("primary_metric")
    if not isinstance(primary_metric, dict):
        return "failed", "it ended without a result.json"
    value, metric = primary_metric.get("value"), primary_metric.get("metric")
    if isinstance(value, int | float) and math.isfinite(value):
        return "done", ""
    if metric in (result.get("metrics") or {}):
        return "diverged", f"its last {metric} is not finite"
    return "failed", f"it ended without a value of {metric}: was it validated?"
