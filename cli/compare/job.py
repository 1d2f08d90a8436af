"""One run as a process of its own, on this machine or within a job of a cluster."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .child import GRACE_SECONDS, guarded, wait_until_free
from .grid import Run, program
from .plan import write_json
from .status import FINISHED, outcome, read_status

__all__ = ["Interruption", "Job"]


@dataclass(frozen=True)
class Interruption:
    """What Ctrl-C asks of runs: to save a checkpoint and stop, or to stop at once."""

    stop: threading.Event = field(default_factory=threading.Event)
    kill: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run that is ready to be started; calling it trains and returns its status.

    Args:
        run: Where it stands in the grid.
        arguments: Its command, without the program's name.
        folder: The run folder, absolute.
        working_folder: Folder that it is started in.
        threads: Threads of its process.
        timeout: Seconds after which it is stopped; None for no limit.
        environment: Variables beside those of this process.
        program: What is run with the arguments.
    """

    run: Run
    arguments: tuple[str, ...]
    folder: Path
    working_folder: Path
    threads: int
    timeout: float | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    program: tuple[str, ...] = field(default_factory=lambda: tuple(program()))

    def __call__(self, interruption: Interruption | None = None, **environment: str) -> dict[str, Any]:
        """Train, from the last checkpoint where there is one.

        Args:
            interruption: Asks the run to stop.
            **environment: Further variables of its environment.

        Returns:
            What is written to `status.json`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            wait_until_free(self.folder)
        except ValueError as error:
            return {"status": "failed", "message": str(error)}
        before = read_status(self.folder)
        if before["status"] in FINISHED:
            return before
        command = self._command()
        status = {
            "status": "running",
            "exit_code": None,
            "message": "",
            "command": ["adam-mini", *command],
            "recipe": self.run.recipe,
            "optimizer": self.run.optimizer,
            "lr": self.run.lr,
            "seed": self.run.seed,
            "wall_seconds": before.get("wall_seconds", 0.0),
            "starts": before.get("starts", 0) + 1,
            "host": socket.gethostname(),
        }
        write_json(self.folder / "status.json", status)
        start = time.monotonic()
        exit_code, log_start, stopped = self._train(command, {**self.environment, **environment}, interruption)
        word, message = outcome(exit_code, self.folder, log_start=log_start, stopped=stopped)
        if word == "failed" and exit_code == 0:
            self._put_checkpoints_aside()  # nothing is left to train from them, so the next start begins anew
        seconds = round(status["wall_seconds"] + time.monotonic() - start, 3)
        status |= {"status": word, "exit_code": exit_code, "message": message, "wall_seconds": seconds}
        write_json(self.folder / "status.json", status)
        return status

    def fail(self, message: str) -> dict[str, Any]:
        """Note that the run failed where nobody else could: its machine is gone, say."""
        status = {**read_status(self.folder), "status": "failed", "message": message}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "status.json", status)
        return status

    def checkpoint(self) -> Any:
        """Called by submitit when a job of a cluster is about to be stopped: save, and queue again."""
        from submitit.helpers import DelayedSubmission

        for process in _running:
            process.terminate()
            process.wait(GRACE_SECONDS)
        return DelayedSubmission(self)

    def _command(self) -> list[str]:
        """The arguments, with those that continue a run that has begun."""
        folder = self.folder / "checkpoints"
        if folder.exists() and not (folder / "last.ckpt").exists():
            self._put_checkpoints_aside()  # killed between its first two checkpoints: nothing to continue from
        has_begun = folder.exists() or (self.folder / "metrics.jsonl").exists()
        return [*self.arguments, *(["--ckpt_path=last"] if has_begun else [])]

    def _put_checkpoints_aside(self) -> None:
        folder = self.folder / "checkpoints"
        if folder.exists():
            number = 1 + sum(1 for _ in self.folder.glob("checkpoints.unused-*"))
            folder.rename(self.folder / f"checkpoints.unused-{number}")

    def _train(
        self, command: list[str], environment: Mapping[str, str], interruption: Interruption | None
    ) -> tuple[int, int, str | None]:
        """Exit code, where the log of this start begins, and why the process was stopped."""
        reading, writing = os.pipe()
        try:
            with (self.folder / "log.txt").open("ab") as log:
                log.write(f"$ {shlex.join(['adam-mini', *command])}\n".encode())
                log.flush()
                log_start = log.tell()
                process = subprocess.Popen(
                    [*self.program, *command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=self.working_folder,
                    env=guarded({**_environment(self.threads), **environment}, reading, self.folder),
                    pass_fds=(reading,),
                    # Ctrl-C in a terminal reaches all processes of a group; a second signal would stop the run at once.
                    start_new_session=True,
                )
            _running.append(process)
            try:
                exit_code, stopped = self._wait(process, interruption or Interruption())
                return exit_code, log_start, stopped
            finally:
                _running.remove(process)
        finally:
            os.close(reading)
            os.close(writing)

    def _wait(self, process: subprocess.Popen[bytes], interruption: Interruption) -> tuple[int, str | None]:
        start, stopped, deadline = time.monotonic(), None, float("inf")
        while True:
            try:
                return process.wait(0.2), stopped
            except subprocess.TimeoutExpired:
                now = time.monotonic()
            if stopped is None:
                if interruption.stop.is_set():
                    stopped = "interrupted"
                elif self.timeout is not None and now - start > self.timeout:
                    stopped = "timeout"
                if stopped:
                    process.terminate()
                    deadline = now + GRACE_SECONDS
            if now > deadline or interruption.kill.is_set():
                os.killpg(process.pid, signal.SIGKILL)  # with processes of other ranks and of loaders


_running: list[subprocess.Popen[bytes]] = []


def _environment(threads: int) -> dict[str, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    # A traceback in place of the error line would also replace the exit code that tells divergence from failure.
    for name in ("ADAM_MINI_TRACEBACK", "ADAM_MINI_RUN_DIR", "LOCAL_RANK", "RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    if "SLURM_JOB_ID" in environment:  # a run within a job: Lightning must neither count the job's tasks nor queue it
        environment["SLURM_JOB_NAME"] = "interactive"
    return environment
