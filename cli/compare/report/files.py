"""The report's files, whole whenever they are there."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from io import StringIO
from pathlib import Path

from ....tasks.atomic_files import replacing

__all__ = ["write_csv", "write_text"]


def write_text(path: Path, text: str) -> Path:
    """Write a text as it is, with `?` for what UTF-8 cannot hold; a reader finds the old one or the new one."""
    with replacing(path) as beside:
        beside.write_text(text, "utf-8", errors="replace", newline="")
    return path


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    """A table as RFC 4180 has it; None is an empty field."""
    stream = StringIO()
    writer = csv.writer(stream)
    writer.writerow(columns)
    writer.writerows(rows)
    return write_text(path, stream.getvalue())
