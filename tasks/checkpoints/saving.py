"""Checkpoints that a kill or a full disk cannot spoil: written beside, then renamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io import TorchCheckpointIO

from ..atomic_files import put_in_place, remove, temporary_path
from ..errors import error_line
from .files import read_file, write_file
from .folders import read_folder

__all__ = ["AtomicCheckpointIO", "cannot_save", "check_checkpoint", "read_checkpoint"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves to a file beside the target and renames it, so that the target is the old checkpoint or the new one.

    Files have a checksum, without which none is read. It reads folders of `torch.distributed.checkpoint` too, with
    whole tensors.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """See `CheckpointIO.save_checkpoint`.

        Raises:
            OSError: The disk is full, or the folder cannot be written; an older file at `path` is untouched.
        """
        if storage_options is not None:
            raise TypeError("AtomicCheckpointIO takes no storage_options")
        target = Path(path)
        new = temporary_path(target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_file(checkpoint, new)
            put_in_place(new, target)
        except OSError as error:
            raise cannot_save(target, error) from error
        finally:
            remove(new)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """See `CheckpointIO.load_checkpoint`; tensors come on the CPU, and no code runs without `weights_only=False`.

        Raises:
            ValueError: The file or folder is no checkpoint, is damaged or cut off, or would run code.
        """
        weights_only = kwargs.pop("weights_only", None)
        if "://" in str(path):
            kwargs["weights_only"] = weights_only is not False
            return super().load_checkpoint(path, *args, **kwargs)
        if args or kwargs:
            raise TypeError("AtomicCheckpointIO loads to the CPU: it takes no map_location")
        return read_checkpoint(Path(path), weights_only=weights_only)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a file, a folder, or a link without what it leads to."""
        remove(Path(path))


def check_checkpoint(content: Any, path: str | Path) -> dict[str, Any]:
    """Refuse what no training saved.

    Raises:
        ValueError: It has no weights, or is nothing of the kind.
    """
    if not isinstance(content, dict) or not {"state_dict", "pytorch-lightning_version"} <= content.keys():
        raise ValueError(f"{path} is no checkpoint of a training: it has no weights under 'state_dict'")
    return content


def read_checkpoint(path: Path, *, weights_only: bool | None = None, mmap: bool = False) -> dict[str, Any]:
    """A file or folder with whole tensors on the CPU.

    Args:
        path: The file or folder.
        weights_only: As for `read_file`.
        mmap: Leave the tensors of a file on the disk until they are used.

    Raises:
        ValueError: It is no checkpoint, is damaged or cut off, or would run code.
    """
    if path.is_dir():
        return check_checkpoint(read_folder(path, weights_only=weights_only), path)
    return check_checkpoint(read_file(path, weights_only=weights_only, mmap=mmap), path)


def cannot_save(target: Path, error: BaseException) -> OSError:
    """The error where a checkpoint cannot be written."""
    return OSError(
        f"cannot save the checkpoint {target}: {error_line(error)}; free space or set another --run_dir. "
        "Earlier checkpoints are untouched"
    )
