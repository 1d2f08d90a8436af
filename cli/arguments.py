"""The parser of the commands that train nothing."""

from __future__ import annotations

import argparse
from typing import NoReturn

__all__ = ["Parser"]


class Parser(argparse.ArgumentParser):
    """A parser that leaves it to the command to tell an error."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong, where argparse would print it and exit."""
        raise argparse.ArgumentError(None, message)
