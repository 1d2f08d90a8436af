"""ogbn-arxiv from the files that OGB distributes, without the package ogb."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..graph import Graph
from .csv_files import read_table
from .graph_cache import cached_graph
from .module import GraphDataModule

__all__ = ["OgbArxiv"]

_FILES = {
    "nodes": "raw/num-node-list.csv.gz",
    "edges": "raw/num-edge-list.csv.gz",
    "edge": "raw/edge.csv.gz",
    "feat": "raw/node-feat.csv.gz",
    "label": "raw/node-label.csv.gz",
    "year": "raw/node_year.csv.gz",
    "train": "split/time/train.csv.gz",
    "val": "split/time/valid.csv.gz",
    "test": "split/time/test.csv.gz",
}
_FEATURES, _CLASSES = 128, 40


class OgbArxiv(GraphDataModule):
    """ogbn-arxiv (Hu et al. 2020, arXiv 2005.00687): 169,343 papers, 1,166,243 citations, 40 subjects (ODC-BY).

    Features are mean word vectors of title and abstract. Papers up to 2017 train, those of 2018 validate, later ones
    test. Nothing is downloaded: unzip OGB's `arxiv.zip`, and give the folder.

    Args:
        path: Folder that holds `ogbn_arxiv` or `arxiv`, as OGB and the zip file call it, or that folder itself.
        to_undirected: Let messages run along citations in both directions, as the reference scripts do.
        kwargs: Settings of every graph, see `GraphDataModule`.
    """

    def __init__(self, *, path: str, to_undirected: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.path = Path(path).expanduser()
        self.to_undirected = to_undirected

    @property
    def planned_features(self) -> int:
        """Length of a word vector."""
        return _FEATURES

    @property
    def planned_classes(self) -> int:
        """Subjects."""
        return _CLASSES

    def describe(self) -> str:
        """The folder."""
        return f"ogbn-arxiv in {self.path}"

    def open_graph(self) -> Graph:
        """See `GraphDataModule.open_graph`.

        Raises:
            ValueError: A file is missing, cannot be read, or does not fit the others.
        """
        folder = self._folder()
        if missing := [name for name in _FILES.values() if not (folder / name).exists()]:
            raise ValueError(
                f"{folder} has no {missing[0]} ({len(missing)} of {len(_FILES)} files are missing): unzip OGB's "
                "arxiv.zip there again; nothing is downloaded"
            )
        stats = [(folder / name).stat() for name in _FILES.values()]
        key = [str(folder.resolve()), [[stat.st_size, stat.st_mtime_ns] for stat in stats], self.to_undirected]
        return cached_graph(self.cache_dir, "ogbn_arxiv", key, lambda: self._read(folder))

    def _folder(self) -> Path:
        folders = (self.path / "ogbn_arxiv", self.path / "arxiv", self.path)
        folder = next((folder for folder in folders if (folder / "raw").is_dir()), None)
        if folder is None:
            raise ValueError(
                f"{self.path} has neither ogbn_arxiv/raw nor arxiv/raw: unzip OGB's arxiv.zip there, or give its "
                "folder as data.path; nothing is downloaded"
            )
        return folder

    def _read(self, folder: Path) -> Graph:
        def table(name: str, dtype: type[np.generic], columns: int = 1) -> npt.NDArray[np.generic]:
            return read_table(folder / _FILES[name], dtype, columns)

        num_nodes, num_edges = (_single(table(name, np.int64), folder / _FILES[name]) for name in ("nodes", "edges"))
        edges = table("edge", np.int64, 2)
        features = table("feat", np.float32, _FEATURES)
        labels, years = table("label", np.int64), table("year", np.int64)
        for name, rows, expected, of in (
            ("edge", edges, num_edges, "edges"),
            ("feat", features, num_nodes, "nodes"),
            ("label", labels, num_nodes, "nodes"),
            ("year", years, num_nodes, "nodes"),
        ):
            if len(rows) != expected:
                raise ValueError(
                    f"{folder / _FILES[name]} has {len(rows):,} lines, but there are {expected:,} {of}: get the file "
                    "again, of the same release as the others"
                )
        splits = {name: table(name, np.int64) for name in ("train", "val", "test")}
        for name, numbers, bound in (
            ("edge", edges, num_nodes),
            ("label", labels, _CLASSES),
            *((name, numbers, num_nodes) for name, numbers in splits.items()),
        ):
            _check_range(folder / _FILES[name], numbers, bound)
        edge_index = torch.from_numpy(edges.T.copy())
        if self.to_undirected:
            edge_index = _both_directions()(edge_index, num_nodes=num_nodes)
        parts: dict[str, Any] = {name: torch.from_numpy(numbers).flatten() for name, numbers in splits.items()}
        return Graph(
            x=torch.from_numpy(features),
            y=torch.from_numpy(labels).flatten(),
            edge_index=edge_index,
            class_names=tuple(str(number) for number in range(_CLASSES)),
            **parts,
        )


def _single(table: npt.NDArray[np.generic], path: Path) -> int:
    if len(table) != 1:
        raise ValueError(
            f"{path} has {len(table)} lines, expected one, with the count of one graph: get the file again"
        )
    return int(table[0, 0])


def _check_range(path: Path, numbers: npt.NDArray[np.generic], bound: int) -> None:
    """Raise where a file names something that does not exist."""
    lines, columns = np.nonzero((numbers < 0) | (numbers >= bound))  # type: ignore[operator]
    if len(lines):
        raise ValueError(
            f"{path}, line {lines[0] + 1}: {numbers[lines[0], columns[0]]} is not between 0 and {bound - 1}: get the "
            "file again, of the same release as the others"
        )


def _both_directions() -> Callable[..., Tensor]:
    from torch_geometric.utils import to_undirected

    return to_undirected
