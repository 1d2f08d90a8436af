"""torch_geometric and the compiled packages that it can do without."""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.util import find_spec

from lightning_adam_mini.hints import require_package

__all__ = ["require_neighbor_sampling", "require_torch_geometric"]


def require_torch_geometric(what: str) -> None:
    """Import torch_geometric.

    Args:
        what: What needs it, for the message.

    Raises:
        ValueError: It is not there; with what to install.
    """
    require_package("torch_geometric", what, extra="graph", package="torch-geometric")
    with warnings.catch_warnings():  # of torch, about what torch_geometric does while it is imported
        warnings.simplefilter("ignore", FutureWarning)
        import_module("torch_geometric.nn.models")


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
