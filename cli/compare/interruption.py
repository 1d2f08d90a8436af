"""Ctrl-C and SIGTERM: all runs save a checkpoint and stop; a second one kills them."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

__all__ = ["Interruption", "on_signals"]


@dataclass(frozen=True)
class Interruption:
    """What is asked of runs: to save a checkpoint and stop, or to stop at once.

    Args:
        stop: Set once they are to stop.
        kill: Set once they are to stop at once.
        received: The signals that asked for it.
    """

    stop: threading.Event = field(default_factory=threading.Event)
    kill: threading.Event = field(default_factory=threading.Event)
    received: list[signal.Signals] = field(default_factory=list)


@contextmanager
def on_signals() -> Iterator[Interruption]:
    """An interruption that Ctrl-C and SIGTERM set."""
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
