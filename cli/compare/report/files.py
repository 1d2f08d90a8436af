"""The report's files, whole whenever they are there."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from io import StringIO
from pathlib import Path

from ....tasks import atomic_files

__all__ = ["write_csv", "write_text"]


def write_text(path: Path, text: str) -> Path:
    """See `atomic_files.write_text`; the path, for convenience."""
    atomic_files.write_text(path, text)
    return path


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    """A table as RFC 4180 has it; None is an empty field."""
    stream = StringIO()
    writer = csv.writer(stream)
    writer.writerow(columns)
    writer.writerows(rows)
    return write_text(path, stream.getvalue())
