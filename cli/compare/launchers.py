"""Where runs are trained: here, in processes of this machine; `cluster.py` has the jobs of a cluster."""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Protocol

from .interruption import Interruption
from .job import Job

__all__ = ["Ended", "Launcher", "Local", "Started"]

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
