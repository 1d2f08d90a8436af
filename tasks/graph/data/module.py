"""The base of data modules of graphs: loaders for the whole graph or for parts, and the cache of prepared graphs.

Which nodes a training batch has depends on the seed and on its running number alone, so that a resumed run sees the
same batches.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...atomic_files import atomic_file
from ...checkpoints.files import read_file, write_to
from ...data.cache import default_cache_dir, digest, only_one
from ...data.module import SampledDataModule, hash_tensors
from ...data.sampling import seed_of
from ..graph import Graph, require_neighbor_sampling, require_torch_geometric

__all__ = ["GraphDataModule", "NeighborBatches", "RandomParts", "WholeGraph", "cached_graph"]

log = logging.getLogger(__name__)

# Raised by one whenever the meaning of a prepared file changes.
_FORMAT = 1


class GraphDataModule(SampledDataModule, ABC):
    """The graph for training, in one or several batches, and the whole graph for every evaluation.

    A batch is a `Graph`. An epoch sees each training node once.

    Args:
        sampling: `full` trains on the whole graph, one step per epoch. `parts` splits the nodes into random parts,
            again in each epoch, and a step sees one part and the edges within it (torch_geometric's RandomNodeLoader);
            it needs no compiled package. `neighbors` uses batches of training nodes with sampled neighbours
            (torch_geometric's NeighborLoader); it needs pyg-lib or torch-sparse.
        num_parts: For `parts`, parts of an epoch; 10 by default.
        num_neighbors: For `neighbors`, how many neighbours of each node each hop samples, -1 for all; one number per
            layer. 15, 10 and 5 by default.
        seed_nodes: For `neighbors`, training nodes in a batch of one rank; 1024 by default.
        num_workers: Processes that sample ahead; 0 with `full`.
        seed: Determines parts and neighbours, and nothing else.
        cache_dir: Folder for prepared graphs. By default `$LIGHTNING_ADAM_MINI_CACHE`, else
            `$XDG_CACHE_HOME/lightning-adam-mini`, else `~/.cache/lightning-adam-mini`.

    Raises:
        ValueError: A number is out of range or belongs to another sampling, or the sampling needs a package that is not
            installed.
    """

    batch_kind = "graphs"
    other_data = "give the run's own graph, or start a new run"

    def __init__(
        self,
        *,
        sampling: Literal["full", "parts", "neighbors"] = "full",
        num_parts: int | None = None,
        num_neighbors: list[int] | None = None,
        seed_nodes: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(batch_size=1, num_workers=num_workers, seed=seed)
        for name, number in {"num_parts": num_parts, "seed_nodes": seed_nodes}.items():
            if number is not None and number < 1:
                raise ValueError(f"`{name}` must be at least 1, got {number}.")
        if num_neighbors is not None and (not num_neighbors or any(n < 1 and n != -1 for n in num_neighbors)):
            raise ValueError(
                f"`num_neighbors` is a number for each hop, at least 1, or -1 for all neighbours; got {num_neighbors}."
            )
        for name, value, own in (
            ("num_parts", num_parts, "parts"),
            ("num_neighbors", num_neighbors, "neighbors"),
            ("seed_nodes", seed_nodes, "neighbors"),
        ):
            if value is not None and sampling != own:
                raise ValueError(
                    f"`{name}` is for sampling {own}, but sampling is {sampling}: leave it out, or set data.sampling "
                    f"{own}."
                )
        if sampling == "full" and num_workers:
            raise ValueError("sampling full reads one graph that is in memory already: leave `num_workers` out.")
        if sampling == "neighbors":
            require_neighbor_sampling()
        self.sampling = sampling
        self.num_parts = num_parts or 10
        self.num_neighbors = list(num_neighbors or (15, 10, 5)) if sampling == "neighbors" else None
        self.seed_nodes = seed_nodes or 1024
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        self._graph: Graph | None = None
        self._placed: tuple[Graph, Graph] | None = None

    @property
    @abstractmethod
    def planned_features(self) -> int:
        """Features of a node that the settings imply before any data are read."""

    @property
    @abstractmethod
    def planned_classes(self) -> int:
        """Number of classes that the settings imply before any data are read."""

    @abstractmethod
    def open_graph(self) -> Graph:
        """Read the graph, after preparing it if necessary. Several processes may call this at once."""

    def meaning(self) -> dict[str, Any]:
        """See `SampledDataModule.meaning`: the classes; a subclass adds the features."""
        names = self.graph.class_names
        return {"classes": list(names)} if names else {"number of classes": self.num_classes}

    def samples(self) -> dict[str, Any]:
        """See `SampledDataModule.samples`; without features, which may be computed and differ in the last bits."""
        graph = self.graph
        return {
            "number of nodes": graph.num_nodes,
            "number of edges": graph.edge_index.shape[1],
            "edges and labels": hash_tensors(graph.edge_index, graph.y),
            "nodes for training, validation and test": hash_tensors(graph.train, graph.val, graph.test),
        }

    def prepare_data(self) -> None:
        """Prepare the graph, once per machine."""
        self._open()

    def setup(self, stage: str | None = None) -> None:
        """Open the graph, on every rank.

        Raises:
            ValueError: Several ranks would do the same work, or the graph is inconsistent.
        """
        super().setup(stage)
        ranks = self.replicas()["num_replicas"]
        if stage in (None, "fit") and ranks > 1 and self.sampling == "full":
            raise ValueError(
                f"{ranks} devices would each train on the same whole graph: use --trainer.devices 1, or divide the "
                "work by --data.sampling parts"
            )
        self._open()
        if stage in (None, "fit") and self.sampling == "parts":
            most = self.graph.num_nodes // 2
            if self.num_parts > most:
                raise ValueError(f"`num_parts` {self.num_parts} leaves fewer than two nodes a part: at most {most}.")
            if self.num_parts % ranks:
                raise ValueError(f"`num_parts` {self.num_parts} must be a multiple of the {ranks} devices.")

    @property
    def graph(self) -> Graph:
        """The whole graph; available after `setup`, as everything below."""
        if self._graph is None:
            raise RuntimeError(f"{type(self).__name__} is not set up: call `setup()` first.")
        return self._graph

    @property
    def num_features(self) -> int:
        """Features of a node."""
        return self.graph.x.shape[1]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.graph.class_names) or int(self.graph.y.max()) + 1

    def train_dataloader(self) -> DataLoader[Any]:
        """The whole graph once, or parts of it, counted over the whole run."""
        dataset: Dataset[Graph]
        if self.sampling == "full":
            dataset = WholeGraph(self.graph)
        elif self.sampling == "parts":
            dataset = RandomParts(self.graph, num_parts=self.num_parts, seed=self.seed)
        else:
            assert self.num_neighbors is not None
            dataset = NeighborBatches(
                self.graph, num_neighbors=self.num_neighbors, batch_size=self.seed_nodes, seed=self.seed
            )
        return self.train_loader(dataset, collate=_take_only)

    def val_dataloader(self) -> DataLoader[Any]:
        """The whole graph, on every rank."""
        return DataLoader(WholeGraph(self.graph), batch_size=1, collate_fn=_take_only)

    def test_dataloader(self) -> DataLoader[Any]:
        """See `val_dataloader`."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        """See `val_dataloader`."""
        return self.val_dataloader()

    def transfer_batch_to_device(self, batch: Graph, device: torch.device, dataloader_idx: int) -> Graph:
        """Move a part of the graph; the whole graph is moved once and stays."""
        if not batch.whole:
            return batch.to(device)
        # Each loader wraps the graph in a new object, so it is recognised by its features.
        if self._placed is None or self._placed[0].x is not batch.x:
            with torch.inference_mode(False):  # training uses the tensors after the validation that moved them
                self._placed = (batch, batch.to(device))
        return self._placed[1]

    def _open(self) -> None:
        if self._graph is None:  # read once, although a trainer calls both prepare_data and setup
            require_torch_geometric(type(self).__name__)
            graph = self.open_graph()
            graph.check(self.describe(), len(graph.class_names) or int(graph.y.max()) + 1)
            self._graph = graph


def _take_only(items: list[Graph]) -> Graph:
    return items[0]


class WholeGraph(Dataset[Graph]):
    """The same graph for every number: always the same object, so that it stays on its device.

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
    """Random parts of the nodes, each with the edges within it; every epoch splits the nodes again.

    Among the samplings that need no compiled package, this one has a bounded cost: the neighbourhoods of a few nodes
    over three layers (`k_hop_subgraph`) are nearly a whole citation graph. A part keeps one edge in `num_parts`.

    Args:
        graph: The graph.
        num_parts: Parts of an epoch.
        seed: Determines the parts.
    """

    def __init__(self, graph: Graph, *, num_parts: int, seed: int) -> None:
        self.graph = graph
        self.num_parts = num_parts
        self.seed = seed
        self._parts: tuple[int, tuple[Tensor, ...]] = (-1, ())

    def __len__(self) -> int:
        return self.num_parts

    def __getitem__(self, number: int) -> Graph:
        epoch, part = divmod(number, self.num_parts)
        if self._parts[0] != epoch:
            order = torch.randperm(self.graph.num_nodes, generator=_generator(self.seed, epoch))
            self._parts = (epoch, order.tensor_split(self.num_parts))
        return _induced_subgraph(self.graph, self._parts[1][part].sort().values)


class NeighborBatches(Dataset[Graph]):
    """Batches of training nodes with sampled neighbours, from torch_geometric's NeighborLoader.

    Args:
        graph: The graph.
        num_neighbors: Number of sampled neighbours in each hop.
        batch_size: Training nodes in a batch.
        seed: Determines the order of the training nodes and their neighbours.
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
            sampled = self._loader(positions)  # positions in its `input_nodes`
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


def _induced_subgraph(graph: Graph, nodes: Tensor) -> Graph:
    """Some nodes, in ascending order, and the edges between them, with new indices."""
    from torch_geometric.utils import subgraph

    edges, _ = subgraph(nodes, graph.edge_index, relabel_nodes=True, num_nodes=graph.num_nodes)
    number = torch.full((graph.num_nodes,), -1)
    number[nodes] = torch.arange(len(nodes))
    splits = {name: number[getattr(graph, name)] for name in ("train", "val", "test")}
    kept: dict[str, Any] = {name: numbers[numbers >= 0] for name, numbers in splits.items()}
    return replace(graph, x=graph.x[nodes], y=graph.y[nodes], edge_index=edges, node_names=(), **kept)


def _generator(*position: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*position))


def cached_graph(cache_dir: Path, name: str, key: object, prepare: Callable[[], Graph]) -> Graph:
    """A graph from the cache, after preparing and storing it if necessary.

    Args:
        cache_dir: The cache.
        name: Prefix of the file's name.
        key: Everything that the graph depends on, as a JSON value.
        prepare: Makes the graph.
    """
    folder = cache_dir / "graph"
    path = folder / f"{name}-{digest([_FORMAT, key])}.pt"
    with only_one(folder):
        if (graph := _read(path)) is not None:
            return graph
        graph = prepare()
        values = {field.name: getattr(graph, field.name) for field in fields(Graph)}
        with atomic_file(path) as file:
            write_to(values, file)
    return graph


def _read(path: Path) -> Graph | None:
    """The graph in a file; None if the file is missing or damaged."""
    if not path.exists():
        return None
    try:
        return Graph(**read_file(path))
    except (OSError, TypeError, ValueError) as error:
        log.warning("the prepared graph %s cannot be read and is made again: %s", path, error.__cause__ or error)
        return None
