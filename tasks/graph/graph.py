"""A graph with labelled nodes: the whole graph, or the part of it in one step."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from lightning_adam_mini.hints import require_package

__all__ = ["Graph", "require_neighbor_sampling", "require_torch_geometric"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Graph:
    """Nodes with features and labels, edges, and the nodes for training, validation and test.

    Shapes: `N` nodes, `F` features, `E` edges.

    Args:
        x: Features `(N, F)`, float32.
        y: Class of each node `(N,)`, int64.
        edge_index: Source and target of each edge `(2, E)`, int64. Messages go from source to target.
        train: Indices of the training nodes.
        val: Indices of the validation nodes.
        test: Indices of the test nodes.
        seeds: Training nodes of the loss, if it is not over all of `train`.
        whole: Whether this is the whole graph, which stays on the device.
        class_names: Names of the classes, if they have any.
        node_names: Names of the nodes, if they have any.
    """

    x: Tensor
    y: Tensor
    edge_index: Tensor
    train: Tensor
    val: Tensor
    test: Tensor
    seeds: Tensor | None = None
    whole: bool = False
    class_names: tuple[str, ...] = ()
    node_names: tuple[str, ...] = ()

    @property
    def num_nodes(self) -> int:
        """Number of nodes, N."""
        return self.x.shape[0]

    def to(self, device: torch.device) -> Graph:
        """The same graph on a device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def check(self, where: str, num_classes: int) -> None:
        """Check that edges, labels and splits refer to existing nodes and classes.

        Args:
            where: The data in a few words, for messages.
            num_classes: Number of classes.

        Raises:
            ValueError: A number is out of range, a split is empty, splits share a node, or a feature is not finite.
        """
        for name, numbers, bound, of in (
            ("an edge", self.edge_index, self.num_nodes, "nodes"),
            ("a label", self.y, num_classes, "classes"),
            ("the training split", self.train, self.num_nodes, "nodes"),
            ("the validation split", self.val, self.num_nodes, "nodes"),
            ("the test split", self.test, self.num_nodes, "nodes"),
        ):
            if "split" in name and not numbers.numel():
                raise ValueError(f"{where}: {name} is empty; every split needs at least one node")
            wrong = numbers[(numbers < 0) | (numbers >= bound)]
            if wrong.numel():
                raise ValueError(f"{where}: {name} names {int(wrong[0])}, but there are {bound:,} {of}, counted from 0")
        numbers, counts = torch.cat([self.train, self.val, self.test]).unique(return_counts=True)
        if (counts > 1).any():
            raise ValueError(
                f"{where}: node {int(numbers[counts > 1][0])} is twice in the splits; training, validation and test "
                "must not share nodes"
            )
        if not self.x.isfinite().all():
            raise ValueError(f"{where}: the features contain values that are not finite; fix the file")


def require_torch_geometric(what: str) -> None:
    """Import torch_geometric.

    Args:
        what: What needs it, for the message.

    Raises:
        ValueError: It is not installed; with the command that installs it.
    """
    require_package("torch_geometric", what, extra="graph", package="torch-geometric")
    with warnings.catch_warnings():  # torch deprecates torch.jit.script, which torch_geometric calls on import
        warnings.simplefilter("ignore", FutureWarning)
        import_module("torch_geometric.nn.models")


def require_neighbor_sampling() -> None:
    """Check for a compiled sampler, which torch_geometric's NeighborLoader needs.

    Raises:
        ValueError: There is none; with the sampling that works without it.
    """
    if find_spec("pyg_lib") is None and find_spec("torch_sparse") is None:
        raise ValueError(
            "data.sampling neighbors needs the package pyg-lib (or torch-sparse), which is not installed: install it "
            "as torch_geometric's installation page says, or use data.sampling parts, which needs neither"
        )
