"""Tables of numbers as `.csv.gz`, without a header."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["read_table"]


def read_table(path: Path, dtype: type[np.generic], columns: int) -> npt.NDArray[np.generic]:
    """All numbers of a file, `(rows, columns)`.

    The file is unpacked at once: numpy reads a line at a time, which through gzip takes longer than the numbers do.

    Args:
        path: The file.
        dtype: Type of its numbers.
        columns: Numbers in a line.

    Raises:
        ValueError: The file is missing, cut off, or holds something else; with its name and line.
    """
    try:
        text = gzip.decompress(path.read_bytes()).removeprefix(codecs.BOM_UTF8)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: unzip the whole data set there") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be unpacked ({error}): get the file again") from error
    if not text.strip():
        return np.empty((0, columns), dtype)
    try:
        table = np.loadtxt(io.BytesIO(text), dtype=dtype, delimiter=",", ndmin=2)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0].rstrip('.')}: get the file again") from error
    if table.shape[1] != columns:
        raise ValueError(f"{path} has {table.shape[1]} numbers a line, expected {columns}: get the file again")
    return table
