"""Checkpoints that a kill or a full disk cannot spoil: written beside, then renamed."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from .checkpoint_folder import read_folder
from .in_place import beside, put_in_place, remove
from .run_files import error_line

__all__ = ["AtomicCheckpointIO", "cannot_save", "check_checkpoint", "read_file", "write_synced"]


# What unpickling other bytes may raise, beside what torch and zipfile say of a file that was cut off.
_UNREADABLE = (
    RuntimeError,
    EOFError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    KeyError,
    IndexError,
    TypeError,
    ValueError,
    AttributeError,
)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves to a file beside the target and renames it, so that the target is the old checkpoint or the new one.

    It reads folders of `torch.distributed.checkpoint` too, with whole tensors.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """See `CheckpointIO.save_checkpoint`.

        Raises:
            OSError: The disk is full, or the folder cannot be written; an older file at `path` is untouched.
        """
        if storage_options is not None:
            raise TypeError("AtomicCheckpointIO takes no storage_options")
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        new = beside(target)
        try:
            write_synced(checkpoint, new)
            put_in_place(new, target)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            raise cannot_save(target, error) from error
        finally:
            remove(new)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """See `CheckpointIO.load_checkpoint`.

        Raises:
            ValueError: The file is no checkpoint, or is cut off.
        """
        if Path(path).is_dir():
            return check_checkpoint(read_folder(Path(path), weights_only=kwargs.get("weights_only")), path)
        try:
            checkpoint: Any = super().load_checkpoint(path, *args, **kwargs)
        except _UNREADABLE as error:
            raise _cannot_read(path, error) from error
        return check_checkpoint(checkpoint, path)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a file, a folder, or a link without what it leads to."""
        remove(Path(path))


def read_file(path: Path, *, weights_only: bool | None) -> dict[str, Any]:
    """A checkpoint whose tensors stay on the disk until they are used.

    Raises:
        ValueError: The file is no checkpoint, or is cut off.
    """
    try:
        checkpoint: Any = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
    except _UNREADABLE as error:
        raise _cannot_read(path, error) from error
    return check_checkpoint(checkpoint, path)


def write_synced(content: Any, path: Path) -> None:
    """Save with torch, and wait for the disk."""
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def check_checkpoint(content: Any, path: str | Path) -> dict[str, Any]:
    """Refuse what no training saved.

    Raises:
        ValueError: It has no weights, or is nothing of the kind.
    """
    if not isinstance(content, dict) or not {"state_dict", "pytorch-lightning_version"} <= content.keys():
        raise ValueError(f"{path} is no checkpoint of a training: it has no weights under 'state_dict'")
    return content


def cannot_save(target: Path, error: BaseException) -> OSError:
    """The error where a checkpoint cannot be written."""
    return OSError(
        f"cannot save the checkpoint {target}: {error_line(error)}; free space or set another --run_dir. "
        "Earlier checkpoints are untouched"
    )


def _cannot_read(path: str | Path, error: BaseException) -> ValueError:
    return ValueError(
        f"cannot read the checkpoint {path}: {error_line(error)}; the file is no checkpoint or was cut off. "
        "Use another file of its folder"
    )
