"""Atomic replacement of files and folders: after a kill or on a full disk, the old content or the new one is there.

A file is replaced by one rename. A folder cannot be renamed onto another one, so it takes renames that a later start
can finish: the new folder is first renamed to `.NAME.new`, which marks it as complete; then the old folder becomes
`.NAME.old`; then the new one takes its place. Whichever step a kill interrupts, `recover` finds a complete folder.

Standard library only: light commands import this module.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .errors import cannot_write

__all__ = [
    "atomic_file",
    "new_folder",
    "put_in_place",
    "read_json",
    "recover",
    "remove",
    "replacing",
    "sweep",
    "temporary_path",
    "write_json",
    "write_text",
]

_TOKEN = secrets.token_hex(4)  # several machines that share a folder may give their processes the same number


def temporary_path(target: Path) -> Path:
    """Where this process writes what will replace `target`; always the same path for one target.

    Lightning reads every number in a file name with `hpc_ckpt_` as that of a checkpoint, so that prefix is changed.
    """
    return target.with_name(f".{target.name.replace('hpc_ckpt_', 'hpc-')}.{os.getpid()}-{_TOKEN}.tmp")


@contextlib.contextmanager
def replacing(
    path: Path, *, what: str | None = None, remedy: str = "free space there, or choose another folder"
) -> Iterator[Path]:
    """Give a temporary path to write a file or folder to, which replaces `path` if the block raises nothing.

    Args:
        path: The file or folder; its parent is made.
        what: The content in words, for the message.
        remedy: What to do where it cannot be written, for the message.

    Raises:
        OSError: For example, the disk is full. What was at `path` is untouched.
    """
    new = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield new
        put_in_place(new, path)
    except OSError as error:
        if error.strerror is None or not _is_about(error, new, path):  # such as a file that the block reads
            raise
        raise cannot_write(f"{what} {path}" if what else path, error, remedy) from error
    finally:
        with contextlib.suppress(OSError):
            remove(new)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a temporary path to write an exported folder to, which moves to `path` if the block raises nothing.

    Unlike `replacing`, it never takes the place of something else.

    Raises:
        ValueError: There is something at `path`.
    """
    if path.exists():
        raise ValueError(f"{path} exists; choose another folder for the export, or remove it")
    new = temporary_path(path)
    try:
        yield new
        new.rename(path)
    finally:
        shutil.rmtree(new, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Give a binary file to write to, which replaces `path` once it is on the disk; see `replacing`."""
    with replacing(path) as new, new.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Replace a text file, in UTF-8 with its line ends as they are; `?` stands for what UTF-8 cannot hold."""
    with atomic_file(path) as file:
        file.write(text.encode("utf-8", "replace"))


def write_json(path: Path, value: object, *, nan_as_null: bool = False) -> None:
    """Replace a JSON file; numbers that are not finite stay Python's `NaN` and `Infinity`, or become null."""
    content = _finite(value) if nan_as_null else value
    write_text(path, json.dumps(content, indent=1, allow_nan=not nan_as_null) + "\n")


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {str(key): _finite(some) for key, some in value.items()}
        case list() | tuple():
            return [_finite(some) for some in value]
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file is missing, damaged or holds something else."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def put_in_place(new: Path, target: Path) -> None:
    """Replace a file, a link or a folder by another one; the target of a link is left alone.

    Args:
        new: The complete content, in the folder of `target`.
        target: What it replaces; it need not exist.
    """
    if not os.path.lexists(target) or not (_is_folder(new) or _is_folder(target)):
        new.replace(target)
        return
    ready, old = _ready(target), _old(target)
    remove(ready)
    new.rename(ready)
    remove(old)
    target.rename(old)
    recover(target)  # another process that looks for the target at this moment may have done it
    remove(old)


def recover(target: Path) -> bool:
    """Finish a replacement that a kill interrupted; several processes may call it at once.

    Returns:
        Whether `target` exists.
    """
    with contextlib.suppress(FileNotFoundError):
        if not os.path.lexists(target):
            _ready(target).rename(target)
    return target.exists()


def sweep(folder: Path) -> None:
    """Finish interrupted replacements of checkpoints, and remove what killed processes left of others."""
    for ready in folder.glob(".*.ckpt.new"):
        recover(folder / ready.name.removeprefix(".").removesuffix(".new"))
    for pattern in (".*.ckpt.*.tmp", ".*.ckpt.new", ".*.ckpt.old"):
        for leftover in folder.glob(pattern):
            remove(leftover)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it exists; nobody sees a folder that is removed in part."""
    if not _is_folder(path):
        path.unlink(missing_ok=True)
        return
    if not path.name.startswith("."):
        remove(_old(path))
        path = path.rename(_old(path))
    shutil.rmtree(path, ignore_errors=True)


def _is_about(error: OSError, new: Path, path: Path) -> bool:
    """Whether an error is about writing `new` or putting it at `path`; errors of a full disk name no file."""
    if error.filename is None:
        return True
    place = Path(str(error.filename))
    return place in (new, path, _ready(path), _old(path), *path.parents) or new in place.parents


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _ready(target: Path) -> Path:
    return target.with_name(f".{target.name}.new")


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")
