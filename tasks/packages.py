"""Packages that an extra installs, and what to do where they are missing."""

from __future__ import annotations

from importlib.util import find_spec

__all__ = ["require"]


def require(name: str, what: str, *, extra: str, package: str | None = None) -> None:
    """Check that a package is there, without importing it.

    Args:
        name: The package, as it is imported.
        what: What needs it, for the message.
        extra: The extra of this project that installs it.
        package: Its name for pip, where that is another one.

    Raises:
        ValueError: It is not there; with what to install.
    """
    if find_spec(name) is None:
        raise ValueError(
            f"{what} needs the package {package or name}; install it with pip install 'lightning-adam-mini[{extra}]'"
        )
