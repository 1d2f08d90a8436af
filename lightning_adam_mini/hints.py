"""What error messages suggest: names that come near an unknown one, and the package to install."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from importlib.util import find_spec

__all__ = ["did_you_mean", "require_package"]


def did_you_mean(
    name: str, known: Iterable[str], *, otherwise: str = "", count: int = 3, cutoff: float = 0.6, template: str = "{}"
) -> str:
    """The end of a message about an unknown name: `; did you mean a, b or c?`.

    Args:
        name: The unknown name.
        known: The names that there are.
        otherwise: The end where none comes near.
        count: How many names to suggest at most.
        cutoff: Least similarity, from 0 to 1, as for `difflib.get_close_matches`.
        template: How a name is written, such as `timm/{}`.
    """
    near = [template.format(other) for other in get_close_matches(name, list(known), n=count, cutoff=cutoff)]
    if not near:
        return otherwise
    return f"; did you mean {' or '.join([', '.join(near[:-1]), near[-1]] if len(near) > 1 else near)}?"


def require_package(name: str, what: str, *, extra: str = "app", package: str | None = None) -> None:
    """Check that a package is installed, without importing it.

    Args:
        name: The package, as it is imported.
        what: What needs it, for the message.
        extra: The extra of this project that installs it.
        package: Its name for pip, where that differs.

    Raises:
        ValueError: It is not installed; the message says what to install.
    """
    if find_spec(name) is None:
        raise ValueError(
            f"{what} needs the package {package or name}; install it with pip install 'lightning-adam-mini[{extra}]'"
        )
