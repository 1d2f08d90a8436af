"""Files of a run folder: written beside their place and renamed, so that others see all of a file or none.

And how errors are worded and marked for the command line, which tells them in one line.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["cannot_write", "error_line", "has_no_locks", "on_all_ranks", "replacing", "save_figure", "write_text"]

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
E = TypeVar("E", bound=Exception)


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
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8."""
    with replacing(path) as beside:
        beside.write_text(text, "utf-8")


def cannot_write(
    what: str | Path, error: BaseException, remedy: str = "free space there, or choose another folder"
) -> OSError:
    """The error where something cannot be written, because the disk is full, say."""
    return OSError(f"cannot write {what}: {error_line(error)}; {remedy}")


def has_no_locks(error: Exception) -> bool:
    """Whether a lock could not be taken because the file system has none."""
    return getattr(error, "errno", None) in _NO_LOCKS or isinstance(error, NotImplementedError)


def on_all_ranks(error: E) -> E:
    """Mark an error that every rank raises: the command line tells it once."""
    cast("Any", error).is_on_all_ranks = True
    return error


def error_line(error: BaseException) -> str:
    """What an error says, on one line of at most 200 characters; its kind, where it says nothing."""
    told = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(told.split())[:200] or type(error).__name__


def save_figure(figure: Figure, path: Path) -> None:
    """Save a figure of matplotlib as PNG."""
    with replacing(path) as beside:
        figure.savefig(beside, dpi=120, format="png")
