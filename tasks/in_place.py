"""Checkpoints take their place whole: a file by one rename, a folder by two that a later start can finish.

A folder cannot be renamed onto another. So it first gets the name `.NAME.new`, which says that it is complete; then
the old one steps aside as `.NAME.old`; then it takes the place. Whatever a kill interrupts, the old checkpoint or the
new one is there under one of the names, and `recover` finds it. Standard library only: light commands use it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

__all__ = ["beside", "put_in_place", "recover", "remove", "sweep"]


def beside(target: Path) -> Path:
    """Where the process writes what will take the place of `target`.

    Lightning takes every number in a name with `hpc_ckpt_` for that of a checkpoint, so the name has none.
    """
    return target.with_name(f".{target.name.replace('hpc_ckpt_', 'hpc-')}.{os.getpid()}.tmp")


def put_in_place(new: Path, target: Path) -> None:
    """Replace a file, a link or a folder by a file, a link or a folder; a link's own target is left alone.

    Args:
        new: What is complete, in the folder of `target`.
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
    recover(target)  # somebody who looks for the checkpoint at this moment may have done it
    remove(old)


def recover(target: Path) -> bool:
    """Whether `target` exists, after the rename that a kill has kept from its place; several ranks may ask at once."""
    with contextlib.suppress(FileNotFoundError):
        if not os.path.lexists(target):
            _ready(target).rename(target)
    return target.exists()


def sweep(folder: Path) -> None:
    """Remove what killed processes left half written or half replaced."""
    for ready in folder.glob(".*.ckpt.new"):
        recover(folder / ready.name.removeprefix(".").removesuffix(".new"))
    for pattern in (".*.ckpt.*.tmp", ".*.ckpt.new", ".*.ckpt.old"):
        for leftover in folder.glob(pattern):
            remove(leftover)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there; of a folder that is being removed nobody sees a part."""
    if not _is_folder(path):
        path.unlink(missing_ok=True)
        return
    if not path.name.startswith("."):
        remove(_old(path))
        path = path.rename(_old(path))
    shutil.rmtree(path, ignore_errors=True)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _ready(target: Path) -> Path:
    return target.with_name(f".{target.name}.new")


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")
