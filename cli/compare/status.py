"""How a run ended, in its folder: `status.json`."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

from ...tasks.atomic_files import read_json, write_json

__all__ = ["FINISHED", "LOST", "last_error", "outcome", "read_status", "write_status"]

FINISHED = ("done", "diverged")
"""Runs that are not started again."""

LOST = ("failed", "timeout", "interrupted")
"""Runs that were started and have no result."""

DIVERGED_EXIT_CODE = 3
"""Of `adam-mini fit`, where the loss is not finite."""


def read_status(folder: Path) -> dict[str, Any]:
    """What `status.json` of a run says; `{"status": "pending"}` before its first start."""
    return read_json(folder / "status.json") or {"status": "pending"}


def write_status(folder: Path, status: dict[str, Any]) -> None:
    """Note in a run folder how its run stands."""
    write_json(folder / "status.json", status)


def outcome(exit_code: int, folder: Path, *, log_start: int, stopped: str | None) -> tuple[str, str]:
    """The status of a run whose process has ended, and the reason where it did not end well.

    Args:
        exit_code: Of the process; minus the signal that killed it.
        folder: The run folder.
        log_start: Where this start begins in the log.
        stopped: `timeout` or `interrupted` where the comparison stopped it.
    """
    if exit_code == 0:
        return _of_result(folder)
    if exit_code == DIVERGED_EXIT_CODE:
        return "diverged", last_error(folder / "log.txt", log_start)
    if stopped == "timeout":
        return "timeout", "it did not end within --timeout; the next start goes on from its checkpoint"
    asked = {number for name in (signal.SIGINT, signal.SIGTERM) for number in (-name, 128 + name)}
    if stopped or exit_code in asked:
        return "interrupted", "it was stopped; the next start goes on from its checkpoint"
    if exit_code < 0:
        hint = "; is memory short?" if exit_code == -signal.SIGKILL else ""
        return "failed", f"its process was killed by {signal.Signals(-exit_code).name}{hint}"
    return "failed", last_error(folder / "log.txt", log_start)


def last_error(log: Path, start: int = 0, limit: int = 400) -> str:
    """The last error line of a log, or its last line.

    Args:
        log: The file.
        start: Bytes to skip.
        limit: Characters to return at most.
    """
    try:
        with log.open("rb") as file:
            file.seek(start)
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError as error:
        return f"it left no log: {error.strerror}"
    lines = [line.strip() for line in lines if line.strip()]
    told = [line.removeprefix("adam-mini: error: ") for line in lines if line.startswith("adam-mini: error: ")]
    return (told or lines or ["it left no word"])[-1][:limit]


def _of_result(folder: Path) -> tuple[str, str]:
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
