"""Where runs are trained: in processes of this machine, or as jobs of a cluster through submitit."""

from __future__ import annotations

import os
import queue
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .job import Interruption, Job

__all__ = ["Launcher", "Local", "Submitit", "local_gpus"]

Started = Callable[[Job], None]
Ended = Callable[[Job, Mapping[str, Any]], None]


class Launcher(Protocol):
    """Trains runs, and tells when each starts and ends."""

    def train(self, jobs: Sequence[Job], interruption: Interruption, started: Started, ended: Ended) -> None:
        """Train all; once interrupted, start no more and return when none is left.

        Args:
            jobs: The runs, in order.
            interruption: Asks to stop.
            started: Called with each job as it starts.
            ended: Called with each job that has started and its status.
        """


@dataclass(frozen=True)
class Local:
    """Processes of this machine.

    Args:
        num_jobs: How many at a time.
        gpus: Devices that are dealt out, one a run, where more than one run trains at a time.
    """

    num_jobs: int
    gpus: tuple[str, ...] = ()

    def train(self, jobs: Sequence[Job], interruption: Interruption, started: Started, ended: Ended) -> None:
        """See `Launcher.train`."""
        slots: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for slot in range(self.num_jobs):
            shared = self.num_jobs > 1 and self.gpus
            slots.put({"CUDA_VISIBLE_DEVICES": self.gpus[slot % len(self.gpus)]} if shared else {})

        def train_one(job: Job) -> Mapping[str, Any] | None:
            if interruption.stop.is_set():
                return None
            slot = slots.get()
            try:
                started(job)
                return job(interruption, **slot)
            finally:
                slots.put(slot)

        with ThreadPoolExecutor(self.num_jobs) as pool:
            futures = {pool.submit(train_one, job): job for job in jobs}
            try:
                for future in as_completed(futures):
                    if (status := future.result()) is not None:
                        ended(futures[future], status)
            except BaseException:
                interruption.stop.set()  # a full disk, say: the others save their checkpoints
                raise


@dataclass(frozen=True)
class Submitit:
    """Jobs of a cluster, one a run, on a file system that all machines share.

    Args:
        folder: Folder for what submitit keeps of its jobs.
        num_jobs: How many at a time; None for no limit.
        threads: Cores of a job.
        options: Options of submitit's executor: `cluster` (slurm by default where there is one), `timeout_min`,
            `slurm_partition`, `gpus_per_node`, ...
        poll_seconds: Time between two looks at the jobs.
    """

    folder: Path
    num_jobs: int | None
    threads: int
    options: Mapping[str, Any] = field(default_factory=dict)
    poll_seconds: float = 5.0

    def train(self, jobs: Sequence[Job], interruption: Interruption, started: Started, ended: Ended) -> None:
        """See `Launcher.train`."""
        executor = self.executor()
        waiting = list(jobs)
        running: dict[Any, Job] = {}
        while waiting or running:
            while waiting and not interruption.stop.is_set() and len(running) < (self.num_jobs or len(jobs)):
                job = waiting.pop(0)
                started(job)
                running[executor.submit(job)] = job
            for submitted in [submitted for submitted in running if submitted.done()]:
                ended(job := running.pop(submitted), _status(submitted, job))
            if interruption.stop.is_set():
                waiting.clear()
                for submitted, job in running.items():
                    submitted.cancel()
                    ended(job, {"status": "interrupted", "message": "its job was cancelled"})
                return
            if running:
                interruption.stop.wait(self.poll_seconds)

    def executor(self) -> Any:
        """Submitit's executor.

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
        options = {"timeout_min": 24 * 60, "name": "adam-mini", "cpus_per_task": self.threads, **self.options}
        try:
            executor = submitit.AutoExecutor(folder=self.folder, cluster=options.pop("cluster", None))
            executor.update_parameters(**options)
        except (ValueError, NameError, TypeError, RuntimeError) as error:
            raise ValueError(f"--launcher-options: {' '.join(str(error).split())}") from error
        return executor


def _status(submitted: Any, job: Job) -> Mapping[str, Any]:
    """The status of a job that is done; one that its cluster ended without a word has failed."""
    try:
        status: Mapping[str, Any] = submitted.result()
    except Exception as error:  # noqa: BLE001 - whatever submitit or the cluster raises is the reason
        return job.fail(f"its job {submitted.job_id} did not end well: {' '.join(str(error).split())[-300:]}")
    return status


def local_gpus() -> tuple[str, ...]:
    """The NVIDIA GPUs that this process may use, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(device.strip() for device in visible.split(",") if device.strip() not in ("", "-1"))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(str(number) for number, line in enumerate(listed.splitlines()) if line.startswith("GPU"))
