"""Files that are whole whenever they are there."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from io import StringIO
from pathlib import Path

__all__ = ["write_csv", "write_text"]


def write_text(path: Path, text: str) -> Path:
    """Write beside and rename, so that a reader finds the old text or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text, "utf-8", errors="replace", newline="")
    beside.replace(path)
    return path


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    """A table as RFC 4180 has it; None is an empty field."""
    stream = StringIO()
    writer = csv.writer(stream)
    writer.writerow(columns)
    writer.writerows(rows)
    return write_text(path, stream.getvalue())
