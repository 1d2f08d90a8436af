"""What a run keeps of its data: what gives its outputs their meaning, and how the samples can be recognised.

A record is a dict of plain values, in every checkpoint under `data_record` and in the run folder as `data.json`:

- `kind`: the class of the data module.
- `meaning`: what an output means, by name: the names of the classes, the tokenizer, the normalisation of pixels.
  It must be the same wherever the weights are used.
- `samples`: facts that differ where other samples are trained on. They must be the same where a run goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..checkpoint_file import read_file
from ..checkpoint_folder import read_outline
from ..checkpoint_io import check_checkpoint
from ..run_files import write_text

__all__ = [
    "KEY",
    "TOKENIZER",
    "hash_paths",
    "hash_tensors",
    "names_differ",
    "read_record",
    "values_differ",
    "write_record",
]

KEY = "data_record"
"""Where checkpoints have the record."""

TOKENIZER = "tokenizer"
"""The part of the meaning that is files: text by name; in the run folder a folder of that name."""

_FILE = "data.json"
# Files that are asked for their size.
_STATED = 1000


def read_record(checkpoint: str | Path, *, weights_only: bool | None = True) -> dict[str, Any] | None:
    """The record in a checkpoint file or folder, whose tensors stay on the disk; None in one that has none.

    Raises:
        ValueError: It is no checkpoint, or was cut off.
    """
    path = Path(checkpoint)
    if path.is_dir():
        return read_outline(path, weights_only=weights_only).rest.get(KEY)
    return check_checkpoint(read_file(path, weights_only=weights_only, mmap=True), path).get(KEY)


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write `data.json`, and the tokenizer as a folder that `from_pretrained` takes, into a run folder."""
    meaning = dict(record["meaning"])
    if files := meaning.get(TOKENIZER):
        for name, text in files.items():
            write_text(folder / TOKENIZER / name, text)
        meaning[TOKENIZER] = f"{TOKENIZER}/"
    write_text(folder / _FILE, json.dumps({**record, "meaning": meaning}, indent=1, ensure_ascii=False) + "\n")


def names_differ(what: str, saved: Sequence[str], own: Sequence[str]) -> str:
    """How two lists of names differ, in words: what is missing or new, or the first that has another number.

    Args:
        what: What has the names, such as `classes`.
        saved: Those of the run.
        own: Those of the data, which are not the same.
    """
    told = []
    for names, others, verb in ((saved, own, "has no"), (own, saved, "has a new")):
        known = set(others)
        if left := [name for name in names if name not in known]:
            told.append(f"{verb} {left[0]!r} ({len(left)} such)" if len(left) > 1 else f"{verb} {left[0]!r}")
    if not told:
        moved = (at for at, pair in enumerate(zip(saved, own, strict=False)) if pair[0] != pair[1])
        if (number := next(moved, None)) is None:  # a name that stands twice in one
            return f"{what}: {len(saved)} in the run, {len(own)} here"
        return f"{what} number {number} is {own[number]!r}, and {saved[number]!r} in the run"
    return f"among the {what} it {' and '.join(told)}"


def values_differ(saved: Mapping[str, Any], own: Mapping[str, Any]) -> str | None:
    """The first of the values, by name, that are not the same in both; None where all are.

    What only one of them has says nothing: other versions may know other values.
    """
    for name, value in saved.items():
        if name in own and own[name] != value:
            is_hash = isinstance(value, str) and len(value) >= 16
            return f"{name} changed" if is_hash else f"{name}: {value} in the run, {own[name]} here"
    return None


def hash_tensors(*tensors: Tensor) -> str:
    """SHA-256 of the values of tensors on the CPU, with their shapes and types."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(tensor.contiguous().numpy().data)
    return total.hexdigest()


def hash_paths(paths: Sequence[str | Path], root: str | Path, labels: Sequence[int] = ()) -> str:
    """SHA-256 of the names of files below a folder, of the sizes of some of them, and of their labels.

    The bytes of a million images would take hours.
    """
    total, start = hashlib.sha256(), len(str(root))
    for path in paths:
        total.update(os.fsencode(str(path)[start:]) + b"\0")
    for path in paths[:: -(-len(paths) // _STATED) or 1]:
        with contextlib.suppress(OSError):
            total.update(str(Path(path).stat().st_size).encode() + b"\0")
    total.update(np.asarray(labels, dtype="<i8").tobytes())
    return total.hexdigest()
