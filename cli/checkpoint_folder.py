"""Checkpoint folders of sharded runs, written and asked for names by one process without a process group."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..tasks.atomic_files import put_in_place, remove, temporary_path
from ..tasks.checkpoints.files import write_file
from ..tasks.checkpoints.folders import (
    CHECKSUMS,
    METADATA_NAME,
    REST_NAME,
    load_tensors,
    optimizer_part,
    read_outline,
    save_tensors,
    split_parts,
)
from ..tasks.checkpoints.saving import cannot_save

__all__ = ["is_folder", "parameter_names", "write_folder"]


def is_folder(path: Path) -> bool:
    """Whether a path is a checkpoint folder."""
    return (path / METADATA_NAME).is_file()


def parameter_names(path: Path) -> list[list[str]]:
    """Names of the parameters of each group of the first optimizer in a folder.

    Raises:
        ValueError: The folder is not whole.
    """
    outline = read_outline(path)
    groups = {
        place[2]: key
        for key, place in outline.paths.items()
        if place[:2] == (optimizer_part(0), "param_groups") and place[-1] == "params"
    }
    values: dict[str, Any] = dict.fromkeys(groups.values())
    load_tensors(values, path, alone=True)
    return [values[groups[number]] for number in sorted(groups)]


def write_folder(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint as a folder, beside and then renamed.

    Args:
        checkpoint: As a file holds it, with optimizer states keyed by parameter names.
        path: The folder; what is there is replaced.

    Raises:
        OSError: The disk is full, or the folder cannot be written; what was at `path` is untouched.
    """
    tensors, rest = split_parts(checkpoint)
    new = temporary_path(path)
    try:
        new.mkdir(parents=True)
        checksums = save_tensors(tensors, new, alone=True)
        write_file({**rest, CHECKSUMS: checksums}, new / REST_NAME)
        put_in_place(new, path)
    except OSError as error:
        raise cannot_save(path, error) from error
    finally:
        remove(new)
