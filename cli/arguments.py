"""The parser of the commands that train nothing."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

__all__ = ["Parser", "check_place", "cpu_threads", "make_folder"]

_DECIMAL = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
_UNITS = {"": 1, "b": 1, **_DECIMAL, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


class Parser(argparse.ArgumentParser):
    """A parser that leaves it to the command to tell an error."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong, where argparse would print it and exit."""
        raise argparse.ArgumentError(None, message)

    def folder(self, out: Path) -> Path:
        """The folder of `--out`, which need not be there yet; a file, or a folder below one, is an error."""
        out = out.expanduser()
        if not (nearest := _nearest(out)).is_dir():
            self.error(f"--out {out}: {'this' if nearest == out else nearest} is a file; give a folder")
        return out

    def memory(self, text: str, *, least: int) -> int:
        """The bytes of `--memory`.

        Args:
            text: A number with a unit, such as 80GB (1e9) or 2GiB (2**30); without one it is bytes.
            least: Bytes that the command needs to be asked for.
        """
        found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]*)?|\.[0-9]+)\s*([a-z]*)", text.strip().lower())
        if found is None or found[2] not in _UNITS:
            self.error(f"--memory {text}: give a number with a unit, such as 80GB, 80GiB or 500MB")
        size = int(float(found[1]) * _UNITS[found[2]])
        if size < least:
            self.error(f"--memory {text}: more than nothing")
        return size


def check_place(out: Path) -> None:
    """Check that a file or a folder can be made at `--out`, before the work; nothing is left there.

    Raises:
        ValueError: Nothing can be written there, or to the folder that it would be made in.
    """
    import tempfile

    nearest = _nearest(out := out.expanduser())
    folder = nearest.parent if nearest.is_file() and nearest == out else nearest
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"--out {out}: {folder} cannot be written to ({reason}); choose another place") from error


def _nearest(path: Path) -> Path:
    """What is there of a path: itself, or the folder that it would be made in."""
    return next((place for place in (path, *path.parents) if place.exists()), Path())


def make_folder(out: Path) -> None:
    """Make the folder of `--out`, and try to write there: what cannot be written is told before the work.

    Raises:
        OSError: It cannot be made or written.
    """
    import tempfile

    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):
        pass


@contextmanager
def cpu_threads(number: int | None) -> Iterator[None]:
    """Torch with so many CPU threads for the time of a command; None leaves its own number."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(before if number is None else number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
