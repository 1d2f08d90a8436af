"""Which documents are for validation, where nobody has said it: a share of them, by hash."""

import hashlib
from collections.abc import Sequence

from .text_cache import Split

_BUCKETS = 2**32


def _position(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")


def split_of(key: str, *, val_fraction: float) -> Split:
    """The part of a document.

    The same text lands in the same part wherever it stands, so a repeated document is never in both.

    Args:
        key: The document's text or name.
        val_fraction: Share of the documents for validation.
    """
    return "val" if _position(key) < val_fraction * _BUCKETS else "train"


def split_names(names: Sequence[str], *, val_fraction: float) -> dict[str, Split]:
    """The part of each of at least two names; neither part is empty, however few there are.

    Args:
        names: Different names.
        val_fraction: Share of the names for validation.
    """
    splits = {name: split_of(name, val_fraction=val_fraction) for name in names}
    ordered = sorted(names, key=lambda name: (_position(name), name))
    splits[ordered[0]] = "val"
    splits[ordered[-1]] = "train"
    return splits


def check_val_fraction(val_fraction: float) -> None:
    """Raises: ValueError: If it is not between 0 and 1."""
    if not 0 < val_fraction < 1:
        raise ValueError(f"`val_fraction` must lie between 0 and 1, got {val_fraction}.")
