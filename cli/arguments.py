"""The parser of the commands that train nothing."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

__all__ = ["Parser"]


class Parser(argparse.ArgumentParser):
    """A parser that leaves it to the command to tell an error."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong, where argparse would print it and exit."""
        raise argparse.ArgumentError(None, message)

    def folder(self, out: Path) -> Path:
        """The folder of `--out`, which need not be there yet; a file is an error."""
        out = out.expanduser()
        if out.exists() and not out.is_dir():
            self.error(f"--out {out}: this is a file; give a folder")
        return out
