"""Whether dense Hessians fit what `--memory` allows."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping

from lightning_adam_mini.hessian.exact import check_dense, dense_bytes

__all__ = ["check_all", "check_each", "dense_bytes_of"]


def check_each(sizes: Mapping[str, int], options: Namespace) -> None:
    """Refuse blocks that do not fit, where one is computed after another and none is kept.

    Args:
        sizes: Rows by the names of the blocks.
        options: Of the command line.

    Raises:
        ValueError: The largest does not fit.
    """
    try:
        check_dense(list(sizes.items()), options.memory)
    except ValueError as error:
        raise ValueError(f"--memory {options.memory_text}: {error}") from error


def check_all(sizes: Mapping[str, int], options: Namespace) -> None:
    """Refuse blocks that do not fit, one by one or together, where all matrices are kept.

    Args:
        sizes: Rows by the names of the blocks.
        options: Of the command line.

    Raises:
        ValueError: They do not fit.
    """
    check_each(sizes, options)
    if (needed := dense_bytes_of(sizes)) > options.memory:
        raise ValueError(
            f"--memory {options.memory_text}: the dense Hessians of {len(sizes)} blocks take {needed / 1e9:.2f} GB "
            "together: name fewer --blocks, or give more memory"
        )


def dense_bytes_of(sizes: Mapping[str, int]) -> int:
    """Of all matrices, and of the work on the largest."""
    largest = max(sizes.values())
    return dense_bytes(largest) - 8 * largest**2 + sum(8 * size**2 for size in sizes.values())
