"""Checkpoints that a kill or a full disk cannot spoil: written beside, then renamed."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

__all__ = ["AtomicCheckpointIO"]


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
    """Saves to a file beside the target and renames it, so that the target is the old checkpoint or the new one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """See `CheckpointIO.save_checkpoint`.

        Raises:
            OSError: The disk is full, or the folder cannot be written; an older file at `path` is untouched.
        """
        if storage_options is not None:
            raise TypeError("AtomicCheckpointIO takes no storage_options")
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with beside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(target)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            raise OSError(
                f"cannot save the checkpoint {target}: {_one_line(error)}; free space or set another --run_dir. "
                "Earlier checkpoints are untouched"
            ) from error
        finally:
            beside.unlink(missing_ok=True)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """See `CheckpointIO.load_checkpoint`.

        Raises:
            ValueError: The file is no checkpoint, or is cut off.
        """
        try:
            checkpoint: Any = super().load_checkpoint(path, *args, **kwargs)
        except _UNREADABLE as error:
            raise ValueError(
                f"cannot read the checkpoint {path}: {_one_line(error)}; the file is no checkpoint or was cut off. "
                "Use another file of its folder"
            ) from error
        if not isinstance(checkpoint, dict) or not {"state_dict", "pytorch-lightning_version"} <= checkpoint.keys():
            raise ValueError(f"{path} is no checkpoint of a training: it has no weights under 'state_dict'")
        return checkpoint


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
