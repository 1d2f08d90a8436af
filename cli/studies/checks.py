"""Checks of settings that several studies share: each tells the setting, what it may be, and what it is."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["check_above", "check_least"]


def check_least(settings: object, least: float, *names: str) -> None:
    """Refuse settings, numbers or lists of them, that are below a bound.

    Args:
        settings: Has the names as attributes.
        least: The smallest number that is allowed.
        names: Of settings.

    Raises:
        ValueError: One is smaller.
    """
    _check(settings, names, lambda number: number >= least, f"at least {least:g}")


def check_above(settings: object, bound: float, *names: str) -> None:
    """The same of a bound that is not allowed itself."""
    _check(settings, names, lambda number: number > bound, f"above {bound:g}")


def _check(settings: object, names: tuple[str, ...], allows: Callable[[float], bool], words: str) -> None:
    for name in names:
        value = getattr(settings, name)
        for number in value if isinstance(value, list | tuple) else (value,):
            if not allows(number):
                raise ValueError(f"{name} must be {words}, not {number:g}")
