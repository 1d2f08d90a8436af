"""Training batches of a graph by their running number: whole, random parts, or sampled neighbourhoods.

Which nodes a batch holds depends on the seed and its number alone, so that a resumed run sees the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...data.sampling import seed_of
from ..graph import Graph

__all__ = ["NeighborBatches", "RandomParts", "WholeGraph"]


class WholeGraph(Dataset[Graph]):
    """The same graph, whatever the number: always the same object, so that a device keeps it.

    Args:
        graph: The graph.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = replace(graph, whole=True)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, number: int) -> Graph:
        return self.graph


class RandomParts(Dataset[Graph]):
    """Random parts of the nodes, each with the edges within it; every epoch cuts anew.

    Of the samplings that need no compiled package, this is the one whose cost is bounded: the neighbourhoods of a few
    nodes over three layers (`k_hop_subgraph`) are nearly the whole of a citation graph. A part keeps one edge in
    `num_parts`.

    Args:
        graph: The graph.
        num_parts: Parts of an epoch.
        seed: Picks the parts.
    """

    def __init__(self, graph: Graph, *, num_parts: int, seed: int) -> None:
        self.graph = graph
        self.num_parts = num_parts
        self.seed = seed
        self._cut: tuple[int, tuple[Tensor, ...]] = (-1, ())

    def __len__(self) -> int:
        return self.num_parts

    def __getitem__(self, number: int) -> Graph:
        epoch, part = divmod(number, self.num_parts)
        if self._cut[0] != epoch:
            order = torch.randperm(self.graph.num_nodes, generator=_generator(self.seed, epoch))
            self._cut = (epoch, order.tensor_split(self.num_parts))
        return _induced(self.graph, self._cut[1][part].sort().values)


class NeighborBatches(Dataset[Graph]):
    """Batches of training nodes with sampled neighbours, from torch_geometric's NeighborLoader.

    Args:
        graph: The graph.
        num_neighbors: Neighbours that are sampled in each hop.
        batch_size: Training nodes in a batch.
        seed: Picks the order of the training nodes and their neighbours.
    """

    def __init__(self, graph: Graph, *, num_neighbors: Sequence[int], batch_size: int, seed: int) -> None:
        self.graph = graph
        self.num_neighbors = list(num_neighbors)
        self.batch_size = batch_size
        self.seed = seed

    def __len__(self) -> int:
        return math.ceil(len(self.graph.train) / self.batch_size)

    def __getitem__(self, number: int) -> Graph:
        epoch, batch = divmod(number, len(self))
        order = torch.randperm(len(self.graph.train), generator=_generator(self.seed, epoch))
        positions = order[batch * self.batch_size : (batch + 1) * self.batch_size]
        with torch.random.fork_rng(devices=[]):  # the samplers draw from torch's global generator
            torch.manual_seed(seed_of(self.seed, "neighbours", number))
            sampled = self._loader(positions)  # in `input_nodes`
        return replace(
            self.graph,
            x=sampled.x,
            y=sampled.y,
            edge_index=sampled.edge_index,
            train=sampled.is_train.nonzero().flatten(),
            val=positions.new_empty(0),
            test=positions.new_empty(0),
            seeds=torch.arange(len(positions)),  # the sampler puts them first
            node_names=(),
        )

    @cached_property
    def _loader(self) -> Any:
        from torch_geometric.data import Data
        from torch_geometric.loader import NeighborLoader

        graph = self.graph
        is_train = torch.zeros(graph.num_nodes, dtype=torch.bool)
        is_train[graph.train] = True
        data = Data(x=graph.x, y=graph.y, edge_index=graph.edge_index, is_train=is_train)
        return NeighborLoader(data, num_neighbors=self.num_neighbors, input_nodes=graph.train)


def _induced(graph: Graph, nodes: Tensor) -> Graph:
    """Some nodes, in ascending order, and the edges between them, numbered anew."""
    from torch_geometric.utils import subgraph

    edges, _ = subgraph(nodes, graph.edge_index, relabel_nodes=True, num_nodes=graph.num_nodes)
    number = torch.full((graph.num_nodes,), -1)
    number[nodes] = torch.arange(len(nodes))
    splits = {name: number[getattr(graph, name)] for name in ("train", "val", "test")}
    kept: dict[str, Any] = {name: numbers[numbers >= 0] for name, numbers in splits.items()}
    return replace(graph, x=graph.x[nodes], y=graph.y[nodes], edge_index=edges, node_names=(), **kept)


def _generator(*position: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*position))
