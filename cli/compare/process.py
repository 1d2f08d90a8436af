"""The process of a run: started, stopped with its comparison, and never left behind."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .child import GRACE_SECONDS, guarded
from .interruption import Interruption

__all__ = ["Exit", "stop_all", "train"]


@dataclass(frozen=True)
class Exit:
    """How a process ended.

    Args:
        code: Its exit code; minus the signal that killed it.
        log_start: Where this start begins in `log.txt`.
        stopped: `timeout` or `interrupted` where it was stopped.
    """

    code: int
    log_start: int
    stopped: str | None


def train(
    program: Sequence[str],
    command: Sequence[str],
    *,
    folder: Path,
    working_folder: Path,
    environment: Mapping[str, str],
    timeout: float | None,
    interruption: Interruption,
) -> Exit:
    """Run a command until it ends; what it prints is added to `log.txt`.

    Args:
        program: What is run.
        command: Its arguments.
        folder: The run folder.
        working_folder: Folder that it is started in.
        environment: All its variables but those of `child.guard`.
        timeout: Seconds after which it is stopped; None for no limit.
        interruption: Asks it to stop.
    """
    reading, writing = os.pipe()
    try:
        with (folder / "log.txt").open("ab") as log:
            log.write(f"$ {shlex.join(['adam-mini', *command])}\n".encode())
            log.flush()
            log_start = log.tell()
            process = subprocess.Popen(
                [*program, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=working_folder,
                env=guarded(environment, reading, folder),
                pass_fds=(reading,),
                # Ctrl-C in a terminal reaches all processes of a group; a second signal would stop the run at once.
                start_new_session=True,
            )
        _running.append(process)
        try:
            code, stopped = _wait(process, timeout, interruption)
        finally:
            _running.remove(process)
    finally:
        os.close(reading)
        os.close(writing)
    if code:
        _kill_group(process)  # other ranks wait for the first one, and would do so for ever
    return Exit(code, log_start, stopped)


def stop_all() -> None:
    """Let each process of this one save a checkpoint and end; kill those that do not in time."""
    for process in _running:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        _kill_group(process)


_running: list[subprocess.Popen[bytes]] = []


def _wait(
    process: subprocess.Popen[bytes], timeout: float | None, interruption: Interruption
) -> tuple[int, str | None]:
    start, stopped, deadline = time.monotonic(), None, float("inf")
    while True:
        try:
            return process.wait(0.2), stopped
        except subprocess.TimeoutExpired:
            now = time.monotonic()
        if stopped is None:
            if interruption.stop.is_set():
                stopped = "interrupted"
            elif timeout is not None and now - start > timeout:
                stopped = "timeout"
            if stopped:
                process.terminate()
                deadline = now + GRACE_SECONDS
        if now > deadline or interruption.kill.is_set():
            _kill_group(process)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process with those of its other ranks and loaders."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
