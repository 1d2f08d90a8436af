"""Packages that an extra installs, and what to do where they are missing."""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.util import find_spec

__all__ = ["require", "require_neighbor_sampling"]


def require(name: str, what: str) -> None:
    """Check that a package of the extra `graph` is there.

    Args:
        name: The package, as it is imported.
        what: What needs it, for the message.

    Raises:
        ValueError: It is not there; with what to install.
    """
    try:
        with warnings.catch_warnings():  # of torch, about what torch_geometric does while it is imported
            warnings.simplefilter("ignore", FutureWarning)
            import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{what} needs the package {error.name}; install it with pip install 'lightning-adam-mini[graph]'"
        ) from error


def require_neighbor_sampling() -> None:
    """Check for a compiled sampler, without which torch_geometric's NeighborLoader cannot run.

    Raises:
        ValueError: There is none; with the sampling that works without.
    """
    if find_spec("pyg_lib") is None and find_spec("torch_sparse") is None:
        raise ValueError(
            "data.sampling neighbors needs the package pyg-lib (or torch-sparse), which is not installed: install it "
            "as torch_geometric's installation page says, or use data.sampling parts, which needs neither"
        )
