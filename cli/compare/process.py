"""The process of a run, from both sides: how a comparison starts and stops it, and how it stops with its comparison."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from ..run_folder import LOCK_NAME, lock_run

__all__ = [
    "GRACE_SECONDS",
    "LOCK_NAME",
    "Interruption",
    "ProcessEnd",
    "guard",
    "on_signals",
    "run_process",
    "stop_all",
    "wait_until_free",
]

GRACE_SECONDS = 120.0
"""Time to finish a step and save a checkpoint, before a run that was asked to stop is killed."""

_PIPE, _FOLDER = "ADAM_MINI_COMPARE_PIPE", "ADAM_MINI_COMPARE_FOLDER"


@dataclass(frozen=True)
class Interruption:
    """A request to all runs to save a checkpoint and stop, or to stop at once.

    Args:
        stop: Set once they have to stop.
        kill: Set once they have to stop at once.
        received: The signals that asked for it.
    """

    stop: threading.Event = field(default_factory=threading.Event)
    kill: threading.Event = field(default_factory=threading.Event)
    received: list[signal.Signals] = field(default_factory=list)


@contextmanager
def on_signals() -> Iterator[Interruption]:
    """An interruption that Ctrl-C and SIGTERM set: the first one stops, the second one kills."""
    interruption = Interruption()

    def stop(signum: int, frame: FrameType | None) -> None:
        if interruption.received:
            interruption.kill.set()
        else:
            sys.stderr.write("stopping: the runs save their checkpoints; once more kills them\n")
        interruption.received.append(signal.Signals(signum))
        interruption.stop.set()

    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interruption
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@dataclass(frozen=True)
class ProcessEnd:
    """How a process ended.

    Args:
        code: Its exit code; minus the signal that killed it.
        log_start: Where this start begins in `log.txt`.
        stopped: `timeout` or `interrupted` if the comparison stopped it.
    """

    code: int
    log_start: int
    stopped: str | None


def run_process(
    program: Sequence[str],
    command: Sequence[str],
    *,
    folder: Path,
    working_folder: Path,
    environment: Mapping[str, str],
    timeout: float | None,
    interruption: Interruption,
) -> ProcessEnd:
    """Run a command until it ends; its output is appended to `log.txt`.

    Args:
        program: What is run.
        command: Its arguments.
        folder: The run folder.
        working_folder: Its working folder.
        environment: All its variables but those that `guard` reads.
        timeout: Seconds after which it is stopped; None for no limit.
        interruption: Asks it to stop.
    """
    reading, writing = os.pipe()  # this process keeps the writing end open: see `guard`
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
                env={**environment, _PIPE: str(reading), _FOLDER: str(folder)},
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
        _kill_group(process)  # its other ranks would wait for the first one forever
    return ProcessEnd(code, log_start, stopped)


_running: list[subprocess.Popen[bytes]] = []


def stop_all() -> None:
    """Let each process of this one save a checkpoint and end; kill those that take too long."""
    for process in _running:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        _kill_group(process)


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
    """Kill a process with its other ranks and data loaders."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def guard() -> None:
    """In a run that a comparison started: stop when the comparison is gone, and lock the run folder until the end.

    A pipe closes however its writer ends, also by SIGKILL and on systems without a parent-death signal. Then this
    process gets SIGTERM, on which a run saves a checkpoint. Without a comparison, nothing happens.

    Raises:
        ValueError: Another process still runs in the folder.
    """
    pipe, folder = os.environ.pop(_PIPE, None), os.environ.pop(_FOLDER, None)  # not for processes of other ranks
    if pipe is None or folder is None:
        return
    threading.Thread(target=_stop_with_parent, args=(int(pipe),), daemon=True).start()
    lock_run(Path(folder), wait=GRACE_SECONDS + 30)


def _stop_with_parent(pipe: int) -> None:
    os.read(pipe, 1)  # nobody writes: it returns when the other end is closed
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    if os.getpgid(0) == os.getpid():  # including other ranks and data loaders
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def wait_until_free(folder: Path) -> None:
    """Wait until a run that a killed comparison left behind has saved its checkpoint.

    Raises:
        ValueError: It does not end.
    """
    lock_run(folder, wait=GRACE_SECONDS + 30).release()
