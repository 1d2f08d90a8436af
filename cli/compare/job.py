"""A run that is ready to be started, on this machine or in a job of a cluster."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..run_folder import holds_run
from .grid import Run
from .process import Interruption, run_process, stop_all, wait_until_free
from .status import FINISHED, read_status, status_after, write_status

__all__ = ["Job", "program"]


def program() -> list[str]:
    """The start of each run's command: this Python, this package."""
    return [sys.executable, "-m", "lightning_adam_mini.cli.main"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run that is ready to be started; calling it trains and returns its status.

    Args:
        run: Its place in the grid.
        arguments: Its command, without the program's name.
        folder: The run folder, absolute.
        working_folder: Working folder of its process.
        threads: Threads of its process; None if the cluster's job decides.
        digest: SHA-256 of its recipe.
        timeout: Seconds after which a start is stopped; None for no limit.
        facts: What else `status.json` says about a start, such as its launcher.
        environment: Variables in addition to those of this process.
        program: What is run with the arguments.
    """

    run: Run
    arguments: tuple[str, ...]
    folder: Path
    working_folder: Path
    threads: int | None
    digest: str = ""
    timeout: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    program: tuple[str, ...] = field(default_factory=lambda: tuple(program()))

    def __call__(self, interruption: Interruption | None = None, **environment: str) -> dict[str, Any]:
        """Train, from the last checkpoint if there is one.

        Args:
            interruption: Asks the run to stop.
            **environment: More variables of its environment.

        Returns:
            The content of `status.json`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            wait_until_free(self.folder)
            self._check_origin()
        except ValueError as error:
            return {"status": "failed", "message": str(error)}  # folder and status.json belong to another run
        before = self._own_status()
        if before.get("status") in FINISHED:
            return before
        command = self._command()
        status = {
            "status": "running",
            "exit_code": None,
            "message": "",
            "command": ["adam-mini", *command],
            "fingerprint": self.fingerprint,
            "recipe": self.run.recipe,
            "optimizer": self.run.optimizer,
            "lr": self.run.lr,
            "seed": self.run.seed,
            "wall_seconds": before.get("wall_seconds", 0.0),
            "starts": before.get("starts", 0) + 1,
            "host": socket.gethostname(),
            "threads": self.threads,
            **self.facts,
        }
        write_status(self.folder, status)
        start = time.monotonic()
        end = run_process(
            self.program,
            command,
            folder=self.folder,
            working_folder=self.working_folder,
            environment={**_environment(self.threads), **self.environment, **environment},
            timeout=self.timeout,
            interruption=interruption or Interruption(),
        )
        word, message = status_after(end.code, self.folder, log_start=end.log_start, stopped=end.stopped)
        if word == "failed" and end.code == 0:
            self._set_checkpoints_aside()  # the run is over, so the next start begins from the first step
        seconds = round(status["wall_seconds"] + time.monotonic() - start, 3)
        status |= {"status": word, "exit_code": end.code, "message": message, "wall_seconds": seconds}
        write_status(self.folder, status)
        return status

    @property
    def fingerprint(self) -> str:
        """What distinguishes this run from another one in its folder: its recipe and options, without their paths."""
        options = list(self.arguments)
        if "--config" in options:
            place = options.index("--config")
            del options[place : place + 2]  # a path: the digest stands for its content
        options = [option for option in options if not option.startswith(("--run_dir=", "--ckpt_path="))]
        return hashlib.sha256(json.dumps([self.digest, *options]).encode()).hexdigest()

    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        return self._own_status().get("status") in FINISHED

    def note(self, status: str, message: str) -> dict[str, Any]:
        """Write how the run ended if it could not do so itself, because its machine is gone, say."""
        before = self._own_status()
        if before.get("status") in FINISHED:
            return before
        noted = {"fingerprint": self.fingerprint, **before, "status": status, "message": message}
        write_status(self.folder, noted)
        return noted

    def checkpoint(self) -> Any:
        """Called by submitit before the cluster stops a job: save, and queue again."""
        from submitit.helpers import DelayedSubmission

        stop_all()
        return DelayedSubmission(self)

    def _own_status(self) -> dict[str, Any]:
        """The content of `status.json`, or nothing if it belongs to another run."""
        status = read_status(self.folder)
        # Finished runs of earlier versions have no fingerprint.
        is_own = status.get("fingerprint") == self.fingerprint or (
            "fingerprint" not in status and status["status"] in FINISHED
        )
        return status if is_own else {}

    def _check_origin(self) -> None:
        if not self._own_status() and (holds_run(self.folder) or read_status(self.folder)["status"] in FINISHED):
            raise ValueError(f"{self.folder} holds another run; remove it, or choose another --out")

    def _command(self) -> list[str]:
        """The arguments, with those that resume a run that has begun."""
        folder = self.folder / "checkpoints"
        if folder.exists() and not (folder / "last.ckpt").exists():
            self._set_checkpoints_aside()  # killed between its first two checkpoints: nothing to resume from
        has_begun = folder.exists() or (self.folder / "metrics.jsonl").exists()
        return [*self.arguments, *(["--ckpt_path=last"] if has_begun else [])]

    def _set_checkpoints_aside(self) -> None:
        folder = self.folder / "checkpoints"
        if folder.exists():
            number = 1 + sum(1 for _ in self.folder.glob("checkpoints.unused-*"))
            folder.rename(self.folder / f"checkpoints.unused-{number}")


def _environment(threads: int | None) -> dict[str, str]:
    environment = {**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}
    # A traceback in place of the error line would also replace the exit code that tells divergence from failure.
    for name in ("ADAM_MINI_TRACEBACK", "ADAM_MINI_RUN_DIR", "LOCAL_RANK", "RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    if "SLURM_JOB_ID" in environment:  # a run within a job: Lightning must neither count the job's tasks nor queue it
        environment["SLURM_JOB_NAME"] = "interactive"
    return environment
