"""What a comparison may use: runs at a time, threads of each, GPUs, or the jobs of a cluster."""

from __future__ import annotations

import os
import subprocess
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from .cluster import Submitit
from .grid import Grid
from .launchers import Launcher, Local

__all__ = ["Resources", "resources_of"]


@dataclass(frozen=True)
class Resources:
    """Where runs are trained, and with what.

    Args:
        launcher: Trains them.
        num_jobs: Runs at a time; None for no limit.
        threads: Threads of each; None where its job decides.
    """

    launcher: Launcher
    num_jobs: int | None
    threads: int | None


def resources_of(options: Namespace, grid: Grid, out: Path) -> Resources:
    """The resources that the command line asks for, and what this machine has where it does not say.

    Args:
        options: The command line.
        grid: The runs.
        out: Folder of the comparison.

    Raises:
        ValueError: The launcher refuses its options.
    """
    if options.launcher == "submitit":
        return _of_submitit(options, out)
    gpus = _gpus()
    one_device = all(recipe.devices in (1, "1") for recipe in grid.recipes.values())
    devices_are_set = any(option.startswith("trainer.devices") for option in grid.plan.common)
    per_gpu = len(gpus) if one_device and not devices_are_set else 1
    num_jobs, threads = _of_this_machine(options.jobs or (per_gpu if gpus else None), options.threads)
    return Resources(Local(num_jobs, gpus), num_jobs, threads)


def _of_submitit(options: Namespace, out: Path) -> Resources:
    folder, given = out / "jobs", options.launcher_options
    cluster = Submitit(folder, options.jobs, options.threads, given).cluster()
    threads = options.threads or given.get(f"{cluster}_cpus_per_task", given.get("cpus_per_task"))
    num_jobs = options.jobs
    if cluster in ("local", "debug"):  # jobs of this machine, which nobody else keeps from taking too much of it
        num_jobs, threads = _of_this_machine(num_jobs, threads)
    return Resources(Submitit(folder, num_jobs, threads, given), num_jobs, threads)


def _of_this_machine(num_jobs: int | None, threads: int | None) -> tuple[int, int]:
    """Runs at a time and threads of each, which share the cores where one or both are not given."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    told = os.environ.get("OMP_NUM_THREADS", "")
    threads = threads or (int(told) if told.isdecimal() and int(told) else None)
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
