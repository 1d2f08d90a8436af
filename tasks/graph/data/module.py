"""The base of every graph: loaders for the whole of it or for parts. Subclasses say where the graph lies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset

from ...data.cache import default_cache_dir
from ...data.module import SampledDataModule, hash_tensors
from ..graph import Graph
from ..packages import require_neighbor_sampling, require_torch_geometric
from .sampling import NeighborBatches, RandomParts, WholeGraph

__all__ = ["GraphDataModule"]


class GraphDataModule(SampledDataModule, ABC):
    """The graph for training, in one batch or several, and the whole of it for every evaluation.

    A batch is a `Graph`. An epoch sees each training node once.

    Args:
        sampling: `full` trains on the whole graph, one step an epoch. `parts` cuts the nodes into random parts, anew in
            each epoch, and a step sees one part and the edges within it (torch_geometric's RandomNodeLoader); it needs
            no compiled package. `neighbors` takes batches of training nodes with sampled neighbours (torch_geometric's
            NeighborLoader); it needs pyg-lib or torch-sparse.
        num_parts: Parts of an epoch, for `parts`; 10 by default.
        num_neighbors: Neighbours of each node that are sampled in each hop, -1 for all, for `neighbors`; as many hops
            as layers. 15, 10 and 5 by default.
        seed_nodes: Training nodes in a batch of one rank, for `neighbors`; 1024 by default.
        num_workers: Processes that sample ahead; 0 with `full`, where there is nothing to do.
        seed: Picks parts and neighbours, and nothing else.
        cache_dir: Folder for prepared graphs. By default `$LIGHTNING_ADAM_MINI_CACHE`, else
            `$XDG_CACHE_HOME/lightning-adam-mini`, else `~/.cache/lightning-adam-mini`.

    Raises:
        ValueError: A number is out of range or of another sampling, or the sampling needs a package that is not
            installed.
    """

    batch_kind = "graphs"

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
        _check_sampling(
            sampling,
            parts={"num_parts": num_parts},
            neighbors={"num_neighbors": num_neighbors, "seed_nodes": seed_nodes},
        )
        if sampling == "full" and num_workers:
            raise ValueError("sampling full hands out one graph that is there already: leave `num_workers` out.")
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
        """Features of a node, as far as the settings tell."""

    @property
    @abstractmethod
    def planned_classes(self) -> int:
        """Classes, as far as the settings tell."""

    @abstractmethod
    def open_graph(self) -> Graph:
        """Read the graph, and prepare it where that has not been done. Several processes may call this at once."""

    other_data = "give the run's own graph, or start a new run"

    def meaning(self) -> dict[str, Any]:
        """See `SampledDataModule.meaning`: the classes; a subclass says what the features are."""
        names = self.graph.class_names
        return {"classes": list(names)} if names else {"number of classes": self.num_classes}

    def samples(self) -> dict[str, Any]:
        """See `SampledDataModule.samples`; without features, some of which are computed and so rounded otherwise."""
        graph = self.graph
        return {
            "number of nodes": graph.num_nodes,
            "number of edges": graph.edge_index.shape[1],
            "edges and labels": hash_tensors(graph.edge_index, graph.y),
            "nodes for training, validation and test": hash_tensors(graph.train, graph.val, graph.test),
        }

    def prepare_data(self) -> None:
        """Prepare the graph, once per node of the cluster."""
        self._open()

    def setup(self, stage: str | None = None) -> None:
        """Open the graph, on every rank.

        Raises:
            ValueError: Several ranks would do the same work, or the graph is not whole.
        """
        super().setup(stage)
        ranks = self.replicas()["num_replicas"]
        if stage in (None, "fit") and ranks > 1 and self.sampling == "full":
            raise ValueError(
                f"{ranks} devices would each train on the same whole graph: use --trainer.devices 1, or share the work "
                "out with --data.sampling parts"
            )
        self._open()
        if stage in (None, "fit") and self.sampling == "parts":
            most = self.graph.num_nodes // 2
            if self.num_parts > most:
                raise ValueError(f"`num_parts` {self.num_parts} leaves less than two nodes a part: at most {most}.")
            if self.num_parts % ranks:
                raise ValueError(f"`num_parts` {self.num_parts} must be a multiple of the {ranks} devices.")

    @property
    def graph(self) -> Graph:
        """The whole graph. Known after `setup`, as everything below."""
        if self._graph is None:
            raise RuntimeError(f"{type(self).__name__} is not set up: call `setup()` first.")
        return self._graph

    @property
    def num_features(self) -> int:
        """Features of a node."""
        return self.graph.x.shape[1]

    @property
    def num_classes(self) -> int:
        """Classes that a node may have."""
        return len(self.graph.class_names) or int(self.graph.y.max()) + 1

    def train_dataloader(self) -> DataLoader[Any]:
        """The whole graph once, or parts of it, counted on over the run."""
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
        # Loaders wrap the graph anew, so it is known by its features.
        if self._placed is None or self._placed[0].x is not batch.x:
            with torch.inference_mode(False):  # training uses the tensors after the validation that moved them
                self._placed = (batch, batch.to(device))
        return self._placed[1]

    def _open(self) -> None:
        if self._graph is None:  # read once, although a trainer prepares and sets up
            require_torch_geometric(type(self).__name__)
            graph = self.open_graph()
            graph.check(self.describe(), len(graph.class_names) or int(graph.y.max()) + 1)
            self._graph = graph


def _check_sampling(sampling: str, **options: dict[str, Any]) -> None:
    """Raise where an option is given whose sampling is another; `options` are those of each sampling by name."""
    for own, values in options.items():
        for name, value in values.items():
            if value is not None and sampling != own:
                raise ValueError(
                    f"`{name}` is for sampling {own}, and sampling {sampling} has no use for it: leave it out, or set "
                    f"data.sampling {own}."
                )


def _take_only(items: list[Graph]) -> Graph:
    return items[0]
