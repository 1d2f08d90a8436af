"""Where runs are trained: in processes of this machine, or in jobs of a cluster through submitit."""

from __future__ import annotations

import os
import subprocess
from argparse import Namespace
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any

from lightning_adam_mini.hints import require_package

from .grid import Grid
from .job import Job
from .process import GRACE_SECONDS, Interruption

__all__ = ["ClusterHandle", "ClusterLauncher", "LocalHandle", "LocalLauncher", "launcher_of"]


def launcher_of(options: Namespace, grid: Grid, out: Path) -> ClusterLauncher | LocalLauncher:
    """The launcher that the command line asks for, with the resources of this machine as the default.

    Args:
        options: The command line.
        grid: The runs.
        out: Folder of the comparison.

    Raises:
        ValueError: The launcher refuses its options.
    """
    if options.launcher == "submitit":
        folder, given, num_jobs = out / "jobs", options.launcher_options, options.jobs
        cluster = ClusterLauncher(num_jobs, options.threads, folder, given).cluster()
        threads = options.threads or given.get(f"{cluster}_cpus_per_task", given.get("cpus_per_task"))
        if cluster in ("local", "debug"):  # jobs of this machine, where no scheduler limits them
            num_jobs, threads = _share_cores(num_jobs, threads)
        return ClusterLauncher(num_jobs, threads, folder, given)
    gpus = _gpus()
    is_one_device = all(recipe.devices in (1, "1") for recipe in grid.recipes.values())
    sets_devices = any(option.startswith("trainer.devices") for option in grid.plan.common)
    one_per_gpu = len(gpus) if is_one_device and not sets_devices else 1
    num_jobs, threads = _share_cores(options.jobs or (one_per_gpu if gpus else None), options.threads)
    return LocalLauncher(num_jobs, threads, gpus)


def _share_cores(num_jobs: int | None, threads: int | None) -> tuple[int, int]:
    """Runs at a time and threads of each, which share the cores if one or both are not given."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    default = os.environ.get("OMP_NUM_THREADS", "")
    threads = threads or (int(default) if default.isdecimal() and int(default) else None)
    num_jobs = num_jobs or max(1, cores // (threads or 1))
    return num_jobs, threads or max(1, cores // num_jobs)


def _gpus() -> tuple[str, ...]:
    """The NVIDIA GPUs that this process may use, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(device.strip() for device in visible.split(",") if device.strip() not in ("", "-1"))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(str(number) for number, line in enumerate(listed.splitlines()) if line.startswith("GPU"))


@dataclass(frozen=True)
class LocalLauncher:
    """Processes of this machine, each watched by a thread.

    Args:
        num_jobs: Runs at a time.
        threads: Threads of each.
        gpus: Devices, one per run, if more than one run trains at a time.
        poll_seconds: Time between two looks at the jobs.
    """

    num_jobs: int
    threads: int
    gpus: tuple[str, ...] = ()
    poll_seconds: float = 0.05

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.num_jobs)

    @cached_property
    def _slots(self) -> SimpleQueue[dict[str, str]]:
        """The environment variables of each run that trains at a time."""
        slots: SimpleQueue[dict[str, str]] = SimpleQueue()
        for slot in range(self.num_jobs):
            shares = self.num_jobs > 1 and self.gpus
            slots.put({"CUDA_VISIBLE_DEVICES": self.gpus[slot % len(self.gpus)]} if shares else {})
        return slots

    def start(self, job: Job, interruption: Interruption) -> LocalHandle:
        """Start a job; the caller keeps to `num_jobs`."""
        slots = self._slots

        def train() -> Mapping[str, Any]:
            slot = slots.get()
            try:
                return job(interruption, **slot)
            finally:
                slots.put(slot)

        return LocalHandle(job, self._pool.submit(train))


@dataclass(frozen=True)
class LocalHandle:
    """A job that was started on this machine."""

    job: Job
    future: Future[Mapping[str, Any]]

    def done(self) -> bool:
        """Whether it has ended."""
        return self.future.done()

    def status(self) -> Mapping[str, Any]:
        """Its status, once it has ended."""
        return self.future.result()

    def stop(self) -> Mapping[str, Any]:
        """Wait for its end after `Interruption.stop` was set, which its thread sees, and return its status."""
        return self.future.result()


@dataclass(frozen=True)
class ClusterLauncher:
    """Jobs of a cluster, one per run, on a file system that all machines share.

    Args:
        num_jobs: Runs at a time; None for no limit.
        threads: Cores of a job; None for the cluster's default.
        folder: Folder for submitit's files.
        options: Options of submitit's executor: `cluster` (slurm by default if there is one), `timeout_min`,
            `slurm_partition`, `gpus_per_node`, ...
        poll_seconds: Time between two looks at the jobs.
    """

    num_jobs: int | None
    threads: int | None
    folder: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    poll_seconds: float = 5.0

    def start(self, job: Job, interruption: Interruption) -> ClusterHandle:
        """Submit a job; the caller keeps to `num_jobs`.

        Raises:
            ValueError: The job could not be submitted.
        """
        try:
            return ClusterHandle(job, self._executor.submit(job))
        except Exception as error:  # submitit, and the program that it starts, raise what they like
            reason = " ".join(str(error).split())[-300:]
            raise ValueError(f"a job could not be submitted, so those that were are cancelled: {reason}") from error

    def cluster(self) -> str:
        """The cluster that submitit chooses, or was given: `slurm`, `local`, `debug`, ...

        Raises:
            ValueError: As `executor`.
        """
        with TemporaryDirectory() as folder:  # an executor makes its folder
            return str(self.executor(Path(folder)).cluster)

    @cached_property
    def _executor(self) -> Any:
        return self.executor(self.folder)

    def executor(self, folder: Path) -> Any:
        """Submitit's executor.

        Args:
            folder: Folder for submitit's files.

        Raises:
            ValueError: submitit is missing, or refuses an option.
        """
        require_package("submitit", "--launcher submitit", extra="cluster")
        import submitit

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


@dataclass(frozen=True)
class ClusterHandle:
    """A job that was submitted to a cluster."""

    job: Job
    submitted: Any

    def done(self) -> bool:
        """Whether it has ended."""
        return bool(self.submitted.done())

    def status(self) -> Mapping[str, Any]:
        """Its status, once it has ended; a job that its cluster ended without a result has failed."""
        try:
            status: Mapping[str, Any] = self.submitted.result()
        except Exception as error:  # noqa: BLE001 - whatever submitit or the cluster raises is the reason
            reason = " ".join(str(error).split())[-300:]
            return self.job.note("failed", f"its cluster job {self.submitted.job_id} failed: {reason}")
        return status

    def stop(self) -> Mapping[str, Any]:
        """Cancel it, and return its status."""
        with suppress(OSError, subprocess.SubprocessError):
            self.submitted.cancel(check=False)
        return self.job.note("interrupted", "its job was cancelled; the next start resumes from its checkpoint")
