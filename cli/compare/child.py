"""What a run does for the comparison that started it: it ends with it, and it never shares its folder."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from ..run_folder import LOCK_NAME, lock_run

__all__ = ["GRACE_SECONDS", "LOCK_NAME", "guard", "guarded", "wait_until_free"]

GRACE_SECONDS = 120.0
"""Time to finish a step and save a checkpoint, before a run that was asked to stop is killed."""

_PIPE, _FOLDER = "ADAM_MINI_COMPARE_PIPE", "ADAM_MINI_COMPARE_FOLDER"


def guarded(environment: Mapping[str, str], pipe: int, folder: Path) -> dict[str, str]:
    """The environment of a run that calls `guard`.

    Args:
        environment: The environment to add to.
        pipe: Reading end of a pipe, inherited by the run, whose writing end the comparison alone holds.
        folder: The run folder.
    """
    return {**environment, _PIPE: str(pipe), _FOLDER: str(folder)}


def guard() -> None:
    """Stop this process when the one that started it is gone; lock the run folder for as long as this process lives.

    A pipe closes however its writer ends, also by SIGKILL and on systems that have no parent-death signal. Then this
    process gets SIGTERM, on which a run saves a checkpoint. Without a comparison, nothing happens.

    Raises:
        ValueError: Another process still runs in the folder.
    """
    pipe, folder = os.environ.pop(_PIPE, None), os.environ.pop(_FOLDER, None)  # not for processes of other ranks
    if pipe is None or folder is None:
        return
    threading.Thread(target=_stop_with_parent, args=(int(pipe),), daemon=True).start()
    lock_run(Path(folder), wait=GRACE_SECONDS + 30)


def wait_until_free(folder: Path) -> None:
    """Wait until a run that a killed comparison left behind has saved its checkpoint.

    Raises:
        ValueError: It does not end.
    """
    lock_run(folder, wait=GRACE_SECONDS + 30).release()


def _stop_with_parent(pipe: int) -> None:
    os.read(pipe, 1)  # nobody writes: it returns when the other end is closed
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    if os.getpgid(0) == os.getpid():  # with processes of other ranks and of loaders
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
