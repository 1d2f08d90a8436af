"""Which errors are for users, and how one that several ranks meet is told once."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["PATIENCE", "is_for_users", "one_teller", "tell"]

_TOLD = "ADAM_MINI_TOLD"
"""Names the file that is there once a rank has told an error; ranks that Lightning starts inherit it."""

PATIENCE = 5.0
"""Seconds for rank zero to tell what another rank has met as well, and for the other way round."""


@contextmanager
def one_teller() -> Iterator[None]:
    """Let all ranks that this process starts tell an error once."""
    if _TOLD in os.environ or _is_rank():
        yield
        return
    os.environ[_TOLD] = str(Path(tempfile.gettempdir()) / f"adam-mini-{os.getpid()}-{time.time_ns()}")
    try:
        yield
    finally:
        Path(os.environ.pop(_TOLD)).unlink(missing_ok=True)


def is_for_users(error: BaseException) -> bool:
    """Whether the message says what to do, or which package to install, so that nobody needs the traceback."""
    known = isinstance(error, ArgumentError | ValueError | OSError | ModuleNotFoundError)
    # Lightning's own errors, and torch's of processes that it has forked, are of classes that may not be imported.
    return known or type(error).__name__ == "MisconfigurationException" or _of_a_process(error) is not None


def tell(error: Exception) -> bool:
    """Tell an error in one line, unless another rank has told why this process fails.

    Returns:
        Whether it was told; where it was not, somebody needs the traceback.
    """
    rank = _rank()
    if is_for_users(error):
        if rank and getattr(error, "is_on_all_ranks", False):
            return True
        if rank and _is_told(PATIENCE):
            _await_end()
        elif _claim():
            from .messages import one_line

            where = f" on rank {rank}" if rank else ""
            sys.stderr.write(f"adam-mini: error{where}: {one_line(_of_a_process(error) or str(error))}\n")
        return True
    if _is_rank() and _is_told(PATIENCE):
        _await_end()
        return True
    return False


def _of_a_process(error: BaseException) -> str | None:
    """What a process of torch's has raised for users; it comes as the text of its traceback."""
    if type(error).__name__ != "ProcessRaisedException":
        return None
    classes = r"(?:\w+\.)*(?:ValueError|\w*Error(?=: \[Errno)|FileNotFoundError|MisconfigurationException)"
    found = re.search(rf"\n{classes}: (.*)\Z", str(error).rstrip(), re.DOTALL)
    return found[1] if found else None


def _rank() -> int:
    """Number of this process among those that train together, by what launchers tell their processes."""
    return next((int(os.environ[name]) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), 0)


def _is_rank() -> bool:
    return not os.environ.keys().isdisjoint(("RANK", "SLURM_PROCID", "LOCAL_RANK"))


def _file() -> Path:
    """The file of all ranks of this machine; those of another launcher have their parent and its start in common."""
    start = "-".join(os.environ.get(name, "") for name in ("MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"))
    return Path(os.environ.get(_TOLD) or Path(tempfile.gettempdir()) / f"adam-mini-{os.getppid()}-{start}")


def _claim() -> bool:
    """Take it on to tell; False where another rank has."""
    if not _is_rank():
        return True
    if _is_told(0.0):
        return False
    try:
        _file().unlink(missing_ok=True)  # of a start long ago
        _file().touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True  # no place for temporary files: better told twice than not
    return True


def _is_told(patience: float) -> bool:
    """Whether a rank has told an error, or does so in the next seconds."""
    end = time.monotonic() + patience
    while True:
        try:
            if time.time() - _file().stat().st_mtime < 60:
                return True
        except OSError:
            pass
        if time.monotonic() >= end:
            return False
        time.sleep(0.05)


def _await_end() -> None:
    """Wait for the process that started this rank to end it: at the first that ends by itself, Lightning kills all."""
    parent, end = os.getppid(), time.monotonic() + PATIENCE
    while _rank() and _TOLD in os.environ and os.getppid() == parent and time.monotonic() < end:
        time.sleep(0.05)
