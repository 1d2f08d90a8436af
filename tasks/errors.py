"""Errors in words for users: what happened on one line, and what to do about it. Standard library only."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any, TypeVar, cast

__all__ = ["cannot_write", "error_line", "has_no_locks", "on_all_ranks"]

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
E = TypeVar("E", bound=Exception)


def error_line(error: BaseException) -> str:
    """The message of an error on one line of at most 200 characters; its type, where it has no message."""
    message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(message.split())[:200] or type(error).__name__


def cannot_write(
    what: str | Path, error: BaseException, remedy: str = "free space there, or choose another folder"
) -> OSError:
    """The error for a file that cannot be written, for example because the disk is full."""
    return OSError(f"cannot write {what}: {error_line(error)}; {remedy}")


def has_no_locks(error: Exception) -> bool:
    """Whether locking failed because the file system has no locks."""
    return getattr(error, "errno", None) in _NO_LOCKS or isinstance(error, NotImplementedError)


def on_all_ranks(error: E) -> E:
    """Mark an error that every rank raises, so that the command line prints it once."""
    cast("Any", error).is_on_all_ranks = True
    return error
