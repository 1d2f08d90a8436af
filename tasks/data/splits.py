"""Which samples are held out: by the names of folders and files, or else a fraction of them, by hash."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Literal

from lightning.pytorch.utilities import rank_zero_only

__all__ = ["Split", "check_val_fraction", "choose_parts", "named_parts", "part_of_name", "split_names", "split_of"]

_log = rank_zero_only(logging.getLogger(__name__).info)

Split = Literal["train", "val"]
NamedPart = Literal["train", "validation", "test"]

# The words of `datasets` (https://huggingface.co/docs/hub/datasets-file-names-and-splits), between these separators.
# Held-out parts come first, so that a name of two parts does not train; and case does not matter here.
_WORDS: dict[NamedPart, str] = {
    "validation": "validation|valid|val|dev",
    "test": "testing|test|evaluation|eval",
    "train": "training|train",
}
_SEPARATOR = "[-._ 0-9]"
_NAMES = {
    part: re.compile(rf"(?:.*{_SEPARATOR})?(?:{words})(?:{_SEPARATOR}.*)?", re.IGNORECASE | re.DOTALL)
    for part, words in _WORDS.items()
}
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}[^/]*\.[^/]*")
_LEFT_OUT = ("README.md",)
_BUCKETS = 2**32


def part_of_name(name: str) -> NamedPart | None:
    """The part in a name such as `train`, `validation_matched` or `my test`; None if there is none.

    A name with several parts is held out.
    """
    return next((part for part, pattern in _NAMES.items() if pattern.fullmatch(name)), None)


def choose_parts(names: Sequence[str], where: Path, *, is_validation: bool = False) -> dict[NamedPart, list[str]]:
    """Choose the parts of a dataset for training, validation and test; without validation, the test part validates.

    A part whose name is exactly the word is preferred to those that contain it. Other parts are not read.

    Args:
        names: Names of all parts.
        where: The dataset, for messages.
        is_validation: Whether the dataset is for validation alone.

    Returns:
        Names of parts by their use.

    Raises:
        ValueError: There is no part for training, or for validation.
    """
    chosen: dict[NamedPart, list[str]] = {"train": [], "validation": [], "test": []}
    for part, words in _WORDS.items():
        exact = [name for word in words.split("|") for name in names if name.lower() == word]
        chosen[part] = exact[:1] or [name for name in names if part_of_name(name) == part]
    chosen["validation"] = chosen["validation"] or chosen["test"]
    if not chosen["validation" if is_validation else "train"]:
        wanted = "validation or test" if is_validation else "train"
        raise ValueError(f"{where} has the parts {', '.join(names)}, and none is called {wanted}: rename one.")
    uses = [
        f"{', '.join(own)} for {use}" for use, own in chosen.items() if own and not (is_validation and use == "train")
    ]
    _log("%s: %s", where, "; ".join(uses))
    return chosen


def named_parts(files: Sequence[Path], root: Path, what: str, *, remedy: str) -> dict[str, list[Path]]:
    """Group files by the part in their path below a folder, as `datasets` does.

    Files called `data/PART-00000-of-00002.*` decide, with any name as the part; else names of folders; else those of
    files. A `README.md` is ignored.

    Args:
        files: The files.
        root: The folder, whose own name is ignored.
        what: What the files are, for the message.
        remedy: What to do about files without a part, for the message.

    Returns:
        Files by part, in the order of `files`; empty if no path has a part.

    Raises:
        ValueError: Some files have a part and others do not.
    """
    below = {file: file.relative_to(root) for file in files if file.name not in _LEFT_OUT}
    for rule in (_part_of_shard, _part_of_folders, _part_of_file):
        found = {file: rule(path) for file, path in below.items()}
        known = list(dict.fromkeys(filter(None, found.values())))
        if not known:
            continue
        if nameless := [file for file, part in found.items() if part is None]:
            raise ValueError(
                f"Some {what} in {root} are called {', '.join(known)}, others not, such as {below[nameless[0]]}: "
                f"{remedy}."
            )
        return {part: [file for file in files if found.get(file) == part] for part in known}
    return {}


def _part_of_shard(path: PurePath) -> str | None:
    match = _SHARD.fullmatch(path.name) if path.parts[:-1] == ("data",) else None
    return None if match is None else match[1]


def _part_of_folders(path: PurePath) -> NamedPart | None:
    found = [part_of_name(folder) for folder in path.parts[:-1]]
    return next((part for part in _WORDS if part in found), None)


def _part_of_file(path: PurePath) -> NamedPart | None:
    # The word has to be followed by a separator, such as the dot of the suffix.
    return part_of_name(path.name) if part_of_name(f"{path.name}x") else None


def _position(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")


def split_of(key: str, *, val_fraction: float) -> Split:
    """The part of a document, by a hash of its text or name.

    Equal documents are in the same part, so a repeated document is never in both.

    Args:
        key: The document's text or name.
        val_fraction: Share of the documents for validation.
    """
    return "val" if _position(key) < val_fraction * _BUCKETS else "train"


def split_names(names: Sequence[str], *, val_fraction: float) -> dict[str, Split]:
    """The part of each of at least two names; neither part is empty, however few there are.

    Args:
        names: Different names.
        val_fraction: Share of the names for validation.
    """
    splits = {name: split_of(name, val_fraction=val_fraction) for name in names}
    ordered = sorted(names, key=lambda name: (_position(name), name))
    splits[ordered[0]] = "val"
    splits[ordered[-1]] = "train"
    return splits


def check_val_fraction(val_fraction: float) -> None:
    """Raises: ValueError: If it is not between 0 and 1."""
    if not 0 < val_fraction < 1:
        raise ValueError(f"`val_fraction` must lie between 0 and 1, got {val_fraction}.")
