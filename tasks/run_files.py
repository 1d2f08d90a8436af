"""Files of a run folder: written beside their place and renamed, so that others see all of a file or none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["error_line", "replacing", "save_figure", "write_text"]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` where nothing was raised.

    Args:
        path: The file; its folder is made.

    Raises:
        OSError: The disk is full, say; an older file at `path` is untouched.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        beside.replace(path)
    except OSError as error:
        if error.strerror is None:  # it says more than the system
            raise
        raise OSError(f"cannot write {path}: {error.strerror}; free space there, or choose another folder") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8."""
    with replacing(path) as beside:
        beside.write_text(text, "utf-8")


def error_line(error: BaseException) -> str:
    """What an error says, on one line of at most 200 characters; its kind, where it says nothing."""
    told = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(told.split())[:200] or type(error).__name__


def save_figure(figure: Figure, path: Path) -> None:
    """Save a figure of matplotlib as PNG."""
    with replacing(path) as beside:
        figure.savefig(beside, dpi=120, format="png")
