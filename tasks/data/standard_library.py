"""Where the sources of Python's standard library lie: data that every machine has."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

__all__ = ["library_files"]

# Tests and tools that not every installation carries, and other people's packages.
_LEFT_OUT = frozenset(
    {"__pycache__", "_pyrepl", "config", "dist-packages", "ensurepip", "idle_test"}
    | {"idlelib", "lib2to3", "site-packages", "test", "tests", "turtledemo"}
)


def library_files() -> tuple[Path, list[Path]]:
    """Folder of the standard library, and its sources in the order of their paths.

    Raises:
        FileNotFoundError: They are not installed.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(root.rglob("*.py")) if _is_wanted(path.relative_to(root))]
    if not files:
        raise FileNotFoundError(f"there are no sources of the standard library in {root}: give data of your own")
    return root, files


def _is_wanted(path: Path) -> bool:
    """Whether a file, given relative to the library's folder, comes with every installation."""
    if any(part in _LEFT_OUT or part.startswith("config-") for part in path.parts):
        return False
    # Also leaves out `_sysconfigdata*`, which the build generates.
    return path.parts[0].removesuffix(".py") in sys.stdlib_module_names
