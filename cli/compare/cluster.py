"""Runs as jobs of a cluster, through submitit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import SubprocessError
from tempfile import TemporaryDirectory
from typing import Any

from .child import GRACE_SECONDS
from .interruption import Interruption
from .job import Job
from .launchers import Ended, Started

__all__ = ["Submitit"]


@dataclass(frozen=True)
class Submitit:
    """Jobs of a cluster, one a run, on a file system that all machines share.

    Args:
        folder: Folder for what submitit keeps of its jobs.
        num_jobs: How many at a time; None for no limit.
        threads: Cores of a job; None for the cluster's default.
        options: Options of submitit's executor: `cluster` (slurm by default where there is one), `timeout_min`,
            `slurm_partition`, `gpus_per_node`, ...
        poll_seconds: Time between two looks at the jobs.
    """

    folder: Path
    num_jobs: int | None
    threads: int | None
    options: Mapping[str, Any] = field(default_factory=dict)
    poll_seconds: float = 5.0

    def train(self, jobs: Sequence[Job], interruption: Interruption, started: Started, ended: Ended) -> None:
        """See `Launcher.train`.

        Raises:
            ValueError: A job could not be submitted; those that were are cancelled.
        """
        executor = self.executor(self.folder)
        waiting = list(jobs)
        running: dict[Any, Job] = {}
        try:
            while waiting or running:
                while waiting and not interruption.stop.is_set() and len(running) < (self.num_jobs or len(jobs)):
                    job = waiting.pop(0)
                    running[_submit(executor, job)] = job
                    started(job)
                for submitted in [submitted for submitted in running if submitted.done()]:
                    ended(job := running.pop(submitted), _status(submitted, job))
                if interruption.stop.is_set():
                    return
                if running:
                    interruption.stop.wait(self.poll_seconds)
        finally:
            _cancel(running.items(), ended)

    def cluster(self) -> str:
        """The cluster that submitit chooses, or was told: `slurm`, `local`, `debug`, ...

        Raises:
            ValueError: As `executor`.
        """
        with TemporaryDirectory() as folder:  # an executor makes its folder
            return str(self.executor(Path(folder)).cluster)

    def executor(self, folder: Path) -> Any:
        """Submitit's executor.

        Args:
            folder: Folder for what submitit keeps of its jobs.

        Raises:
            ValueError: submitit is missing, or refuses an option.
        """
        try:
            import submitit
        except ImportError as error:
            raise ValueError(
                "--launcher submitit needs the package submitit; install it with "
                "pip install 'lightning-adam-mini[cluster]'"
            ) from error
        options = {
            "timeout_min": 24 * 60,
            "name": "adam-mini",
            "cpus_per_task": self.threads,
            # A run has the grace period to save its checkpoint, after which the job is queued again.
            "slurm_signal_delay_s": int(GRACE_SECONDS) + 60,
            **self.options,
        }
        try:
            executor = submitit.AutoExecutor(folder=folder, cluster=options.pop("cluster", None))
            executor.update_parameters(**options)
        except (ValueError, NameError, TypeError, RuntimeError, AssertionError) as error:
            raise ValueError(f"--launcher-options: {' '.join(str(error).split())}") from error
        return executor


def _submit(executor: Any, job: Job) -> Any:
    try:
        return executor.submit(job)
    except Exception as error:  # submitit, and the program that it starts, raise what they like
        told = " ".join(str(error).split())[-300:]
        raise ValueError(f"a job could not be submitted, and those that were are cancelled: {told}") from error


def _cancel(running: Iterable[tuple[Any, Job]], ended: Ended) -> None:
    for submitted, job in running:
        with suppress(OSError, SubprocessError):
            submitted.cancel(check=False)
        ended(job, job.note("interrupted", "its job was cancelled; the next start goes on from its checkpoint"))


def _status(submitted: Any, job: Job) -> Mapping[str, Any]:
    """The status of a job that is done; one that its cluster ended without a word has failed."""
    try:
        status: Mapping[str, Any] = submitted.result()
    except Exception as error:  # noqa: BLE001 - whatever submitit or the cluster raises is the reason
        told = " ".join(str(error).split())[-300:]
        return job.note("failed", f"its job {submitted.job_id} did not end well: {told}")
    return status
