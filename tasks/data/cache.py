"""The cache folder of prepared data: its place, locks between processes, and keys by content."""

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..atomic_files import read_json, write_json
from ..errors import error_line, has_no_locks

logger = logging.getLogger(__name__)

# A file that changed this recently, in seconds, may change again within the resolution of its time stamp.
_SETTLED_AFTER = 2.0


def default_cache_dir() -> Path:
    """`$LIGHTNING_ADAM_MINI_CACHE`, else a folder in `$XDG_CACHE_HOME`, else one in `~/.cache`."""
    if folder := os.environ.get("LIGHTNING_ADAM_MINI_CACHE"):
        return Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "lightning-adam-mini"


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Let one process at a time work in a folder of the cache, and make the folder.

    Raises:
        PermissionError: The folder cannot be written.
    """
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (NotImplementedError, OSError) as error:
        if not has_no_locks(error):
            raise PermissionError(
                f"Cannot write prepared data to {folder} ({error_line(error)}): set `cache_dir` or"
                " $LIGHTNING_ADAM_MINI_CACHE to a folder that you may write."
            ) from error
        # As on some network file systems. Work is then done twice; each result replaces the other whole.
        logger.warning("%s is on a file system without locks: processes may prepare the same data twice.", folder)
    try:
        if lock.is_locked:
            # No other process writes here now, so these are left over from a process that was killed.
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def digest(value: object) -> str:
    """Hash of a JSON value, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def remember(cache_dir: Path, name: str, files: Sequence[Path], compute: Callable[[], Any]) -> Any:
    """Compute a value that depends on the bytes of files, once for their paths, sizes and times.

    Args:
        cache_dir: The cache.
        name: Name of the value.
        files: The files.
        compute: Computes a JSON value.
    """
    stats = [file.stat() for file in files]
    marks = [[str(file.resolve()), stat.st_size, stat.st_mtime_ns] for file, stat in zip(files, stats, strict=True)]
    path = cache_dir / "facts" / f"{name}-{digest(marks)}.json"
    known = read_json(path)
    if "value" in known:
        return known["value"]
    value = compute()
    if time.time() - max((stat.st_mtime for stat in stats), default=0.0) > _SETTLED_AFTER:
        # The cache only saves time: one that cannot be written is no reason to stop.
        with contextlib.suppress(OSError):
            write_json(path, {"value": value})
    return value


def hash_files(files: Sequence[Path], *, root: Path) -> str:
    """SHA-256 of the bytes of files, and of their paths below `root`."""
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            total.update(f"{file.relative_to(root).as_posix()}\0".encode())
            total.update(hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest()
