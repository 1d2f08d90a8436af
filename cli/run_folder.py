"""One folder per run, one run per folder: its name, its lock, and its checkpoints."""

from __future__ import annotations

import itertools
import os
import re
import socket
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..tasks.atomic_files import read_json, recover, write_json
from ..tasks.errors import has_no_locks

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = [
    "LOCK_NAME",
    "RUN_DIR",
    "choose_run_dir",
    "forget_run_dir",
    "holds_run",
    "last_checkpoint",
    "lock_for_run",
    "lock_run",
    "new_run_dirs",
    "resolve_checkpoint",
]

LOCK_NAME = ".running.lock"
"""File that the training process locks; the system releases the lock however that process ends."""

_HOLDER_NAME = ".running.json"
RUN_DIR = "ADAM_MINI_RUN_DIR"
"""Variable with the folder of the run, for the processes that Lightning starts for other ranks."""
_RANKS = (
    "RANK",
    "SLURM_PROCID",
    "NODE_RANK",
    "GROUP_RANK",
    "LOCAL_RANK",
    "OMPI_COMM_WORLD_RANK",
    "PMI_RANK",
    "JSM_NAMESPACE_RANK",
)
"""Variables in which launchers set the rank of a process, or that of its machine."""

_ORPHANS_SECONDS = 10.0
"""Worker processes of data loaders check every few seconds whether their parent still exists."""

_locks: dict[Path, BaseFileLock] = {}  # a lock that is garbage-collected is released
_of_this_run: list[BaseFileLock] = []


def lock_run(folder: Path, *, wait: float = 0.0) -> BaseFileLock:
    """Lock a folder against other training processes, until this one ends or releases the lock.

    A process may take the lock several times.

    Args:
        folder: The run folder; it is created.
        wait: Seconds to wait for a process that is about to end.

    Raises:
        ValueError: Another process trains there; the message says which one.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    lock = _locks.setdefault(folder, FileLock(folder / LOCK_NAME))
    try:
        try:
            lock.acquire(timeout=wait)
        except Timeout:
            if not _has_ended(_holder(folder)):
                raise
            lock.acquire(timeout=_ORPHANS_SECONDS)
    except Timeout:
        holder = _holder(folder)
        which = " (process {pid} on {host}, since {since})".format(**holder) if holder else ""
        raise ValueError(
            f"{folder}: another process still trains there{which}; wait for it, end it, or choose another --run_dir"
        ) from None
    except (NotImplementedError, OSError) as error:
        if not has_no_locks(error):
            raise
        warnings.warn(f"{folder} is on a file system without locks: a second run there is not noticed", stacklevel=2)
        return lock
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    write_json(folder / _HOLDER_NAME, holder)
    return lock


def _holder(folder: Path) -> dict[str, Any]:
    """What the process that has locked a folder wrote about itself; empty if that cannot be read."""
    holder = read_json(folder / _HOLDER_NAME)
    try:
        return {"pid": int(holder["pid"]), "host": holder["host"], "since": holder["since"]}
    except (ValueError, LookupError, TypeError):
        return {}


def _has_ended(holder: Mapping[str, Any]) -> bool:
    """Whether that process is gone: its forked loader processes may keep the lock for a moment."""
    if holder.get("host") != socket.gethostname():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:  # a process of another user
        pass
    return False


def choose_run_dir(run_dir: str | None, recipe: str | None, *, starts_anew: bool, root: str = "runs") -> Path:
    """The folder of a run.

    Args:
        run_dir: The folder that the user asked for.
        recipe: Stem of the recipe, the default name of the folder.
        starts_anew: Whether the run starts from its first step; then it gets and locks a folder without a run.
        root: Folder of all runs without a `run_dir`.

    Returns:
        `run_dir`; or `runs/RECIPE`, `runs/RECIPE-2`, ...: the first free one for a new run, the newest otherwise.

    Raises:
        ValueError: `run_dir` holds a run that the new one does not continue, or another process trains there.
    """
    if "LOCAL_RANK" in os.environ and RUN_DIR in os.environ:
        return Path(os.environ[RUN_DIR])
    if run_dir is not None:
        folder = Path(run_dir).expanduser()
        if starts_anew:
            lock_for_run(folder)
            if holds_run(folder):
                raise ValueError(
                    f"{folder} holds a run already; continue it with --ckpt_path last, or choose another --run_dir"
                )
    else:
        name = recipe or "run"
        if starts_anew:
            folder = next(folder for folder in new_run_dirs(name, root) if _is_free(folder))
        else:
            begun = {number: path for number, path in _numbered(Path(root), name).items() if holds_run(path)}
            folder = begun[max(begun)] if begun else Path(root) / name
    os.environ[RUN_DIR] = str(folder)
    return folder


def new_run_dirs(name: str, root: str = "runs") -> Iterator[Path]:
    """Folders for a new run of this name, after all that hold one: `runs/NAME`, `runs/NAME-2`, `runs/NAME-3`, ..."""
    begun = [number for number, path in _numbered(Path(root), name).items() if holds_run(path)]
    for number in itertools.count(max(begun, default=0) + 1):
        yield Path(root) / (name if number == 1 else f"{name}-{number}")


def _is_free(folder: Path) -> bool:
    """Whether a folder has no run, and no process that is about to start one; if so, it is locked.

    Ranks that a launcher started together must choose the same folder, so there a locked folder is an error.
    """
    try:
        lock_for_run(folder)
    except ValueError:
        if any(name in os.environ for name in _RANKS):
            raise
        return False
    if not holds_run(folder):
        return True
    _free()
    return False


def lock_for_run(folder: Path) -> None:
    """Lock a folder for the run of this process, on rank 0 only; `forget_run_dir` releases it.

    Raises:
        ValueError: Another process trains there.
    """
    if all(os.environ.get(name, "0") == "0" for name in _RANKS):
        _of_this_run.append(lock_run(folder))


def forget_run_dir() -> None:
    """Release the folder of a finished run, so that the next run of this process chooses its own."""
    os.environ.pop(RUN_DIR, None)
    _free()


def _free() -> None:
    while _of_this_run:
        _of_this_run.pop().release()


def resolve_checkpoint(checkpoint: str, run_dir: Path, *, may_start: bool) -> str | None:
    """The file or folder of a `--ckpt_path` value.

    Args:
        checkpoint: A path, `last`, `best`, or a keyword of Lightning.
        run_dir: The run folder that `last` and `best` refer to.
        may_start: Whether a missing `last` means the first start of a run, as in requeued jobs.

    Returns:
        The path, the keyword, or None to start anew.

    Raises:
        ValueError: There is no such checkpoint.
    """
    if checkpoint == "best":
        return str(_best_checkpoint(run_dir))
    if checkpoint != "last":
        if checkpoint in ("hpc", "registry"):
            return checkpoint
        path = Path(checkpoint).expanduser()
        if not recover(path):
            raise ValueError(
                f"--ckpt_path {checkpoint}: no such file; `last` takes the newest checkpoint of the run folder"
            )
        if path.is_dir() and not (path / ".metadata").exists():
            raise ValueError(
                f"--ckpt_path {checkpoint} is a folder, but no checkpoint: it has no .metadata; give a .ckpt in it, or "
                "--run_dir with --ckpt_path last"
            )
        return checkpoint
    newest = last_checkpoint(run_dir)
    if newest is not None:
        return str(newest)
    if may_start and not _others(run_dir):
        from lightning.pytorch.utilities import rank_zero_warn  # takes seconds to import

        rank_zero_warn(f"--ckpt_path last: {run_dir} holds no checkpoint yet, so the run starts from its first step")
        return None
    raise ValueError(f"--ckpt_path last: no checkpoint in {run_dir / 'checkpoints'}; name the run with --run_dir")


def last_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint for resuming: `last.ckpt`, or what a SLURM requeue saved after it; files or folders."""
    candidates = [run_dir / "checkpoints" / "last.ckpt", *run_dir.glob("hpc_ckpt_*.ckpt")]
    existing = [path for path in candidates if recover(path)]
    return max(existing, key=lambda path: path.stat().st_mtime, default=None)


def _best_checkpoint(run_dir: Path) -> Path:
    """The only checkpoint besides `last.ckpt`."""
    others = _others(run_dir)
    if len(others) != 1:
        names = ", ".join(path.name for path in others) or "none"
        raise ValueError(
            f"--ckpt_path best: give a path, because besides the last one {run_dir / 'checkpoints'} holds: {names}"
        )
    return others[0]


def _others(run_dir: Path) -> list[Path]:
    """Checkpoints other than `last.ckpt`."""
    return sorted(path for path in (run_dir / "checkpoints").glob("*.ckpt") if path.name != "last.ckpt")


def holds_run(folder: Path) -> bool:
    """Whether a run has started there: it has metrics or checkpoints."""
    return any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints"))


def _numbered(root: Path, name: str) -> dict[int, Path]:
    """Folders `NAME` (1) and `NAME-2`, `NAME-3`, ... by number."""
    found = {}
    for path in root.glob(f"{name}*"):
        match = re.fullmatch(rf"{re.escape(name)}(?:-(\d+))?", path.name)
        if match and path.is_dir():
            found[int(match[1] or 1)] = path
    return found
