"""Citation graphs on disk: ogbn-arxiv from OGB's files without the package ogb, and Planetoid's Cora and the like."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from lightning_adam_mini.hints import require_package

from ...checkpoints.files import ExactUnpickler
from ..graph import Graph
from .module import GraphDataModule, cached_graph

__all__ = ["OgbArxiv", "Planetoid", "read_table"]

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

    Features are mean word vectors of title and abstract. Papers up to 2017 are for training, papers of 2018 for
    validation, later ones for test. Nothing is downloaded: unzip OGB's `arxiv.zip` and give its folder.

    Args:
        path: Folder that contains `ogbn_arxiv` or `arxiv`, as OGB and the zip file call it, or that folder itself.
        to_undirected: Send messages along citations in both directions, as the reference scripts do.
        kwargs: See `GraphDataModule`.
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
        """Number of subjects."""
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
        from torch_geometric.utils import to_undirected

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
            edge_index = to_undirected(edge_index, num_nodes=num_nodes)
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
        raise ValueError(f"{path} has {len(table)} lines, expected one with the count of one graph: get the file again")
    return int(table[0, 0])


def _check_range(path: Path, numbers: npt.NDArray[np.generic], bound: int) -> None:
    """Raise if a file refers to something that does not exist."""
    lines, columns = np.nonzero((numbers < 0) | (numbers >= bound))  # type: ignore[operator]
    if len(lines):
        raise ValueError(
            f"{path}, line {lines[0] + 1}: {numbers[lines[0], columns[0]]} is not between 0 and {bound - 1}: get the "
            "file again, of the same release as the others"
        )


def read_table(path: Path, dtype: type[np.generic], columns: int) -> npt.NDArray[np.generic]:
    """Read a `.csv.gz` file of numbers without a header, `(rows, columns)`.

    The file is unpacked first: numpy reads line by line, and through gzip that takes longer than parsing.

    Args:
        path: The file.
        dtype: Type of its numbers.
        columns: Numbers per line.

    Raises:
        ValueError: The file is missing, cut off, or contains something else; with its name and line.
    """
    try:
        text = gzip.decompress(path.read_bytes()).removeprefix(codecs.BOM_UTF8)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: unzip the whole data set there") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be unpacked ({error}): get the file again") from error
    if not text.strip():
        return np.empty((0, columns), dtype)
    try:
        table = np.loadtxt(io.BytesIO(text), dtype=dtype, delimiter=",", ndmin=2)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0].rstrip('.')}: get the file again") from error
    if table.shape[1] != columns:
        raise ValueError(f"{path} has {table.shape[1]} numbers a line, expected {columns}: get the file again")
    return table


# Number of features and of classes.
_SHAPES = {"Cora": (1433, 7), "CiteSeer": (3703, 6), "PubMed": (500, 3)}
_PICKLED = ("x", "tx", "allx", "y", "ty", "ally", "graph")
_PARTS = (*_PICKLED, "test.index")
# Sparse matrices, arrays, and a dict of lists, by their names in Python 2 and 3 and in all versions of numpy and scipy.
_PICKLED_CLASSES = {
    *((module, "csr_matrix") for module in ("scipy.sparse.csr", "scipy.sparse._csr")),
    *(
        (module, name)
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
        for name in ("_reconstruct", "scalar")
    ),
    *((module, name) for module in ("__builtin__", "builtins") for name in ("list", "object")),
    *((module, "_reconstructor") for module in ("copy_reg", "copyreg")),
    ("_codecs", "encode"),
    ("collections", "defaultdict"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
}


class Planetoid(GraphDataModule):
    """Cora, CiteSeer or PubMed (Yang et al. 2016, arXiv 1603.08861): papers, citations and bags of words.

    The files `ind.cora.x` and so on are those of torch_geometric's `Planetoid(root=path, name=name)`, whose code parses
    them. They are pickles: one that contains anything but matrices and lists is rejected. Nothing is downloaded.

    Args:
        path: Folder that contains `NAME/raw/ind.name.x`, or the raw files themselves.
        name: Name of the graph.
        split: `public` trains on 20 nodes per class; `full` on all nodes that are neither validation nor test.
        normalize_features: Divide the features of a node by their sum.
        kwargs: See `GraphDataModule`.
    """

    def __init__(
        self,
        *,
        path: str,
        name: Literal["Cora", "CiteSeer", "PubMed"] = "Cora",
        split: Literal["public", "full"] = "public",
        normalize_features: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.path = Path(path).expanduser()
        self.graph_name = name
        self.split = split
        self.normalize_features = normalize_features

    @property
    def planned_features(self) -> int:
        """Number of words in the vocabulary."""
        return _SHAPES[self.graph_name][0]

    @property
    def planned_classes(self) -> int:
        """Number of topics."""
        return _SHAPES[self.graph_name][1]

    def meaning(self) -> dict[str, Any]:
        """See `GraphDataModule.meaning`: the graph determines the vocabulary, and the option scales its counts."""
        own = {"data.name": self.graph_name, "data.normalize_features": self.normalize_features}
        return {**super().meaning(), **own}

    def describe(self) -> str:
        """The graph and its folder."""
        return f"{self.graph_name} in {self.path}"

    def open_graph(self) -> Graph:
        """See `GraphDataModule.open_graph`.

        Raises:
            ValueError: A file is missing or cannot be read.
        """
        # The class Planetoid would write next to the raw files, and read what it wrote with a pickle that runs code.
        from torch_geometric.io import read_planetoid_data
        from torch_geometric.utils import mask_to_index

        require_package("scipy", "Planetoid (its files are scipy's matrices)", extra="graph")
        prefix = f"ind.{self.graph_name.lower()}"
        folders = (self.path / self.graph_name / "raw", self.path / "raw", self.path)
        raw = next((folder for folder in folders if (folder / f"{prefix}.graph").exists()), folders[0])
        if missing := [f"{prefix}.{part}" for part in _PARTS if not (raw / f"{prefix}.{part}").exists()]:
            raise ValueError(
                f"{raw} has no {missing[0]} ({len(missing)} of {len(_PARTS)} files are missing): put the files of "
                f"Planetoid's {self.graph_name} there, or give their folder as data.path; nothing is downloaded"
            )
        try:
            for part in _PICKLED:  # read_planetoid_data would run any code in them
                with (raw / f"{prefix}.{part}").open("rb") as file:
                    ExactUnpickler(file, _PICKLED_CLASSES, encoding="latin1").load()
            data = read_planetoid_data(str(raw), self.graph_name.lower())
        except Exception as error:  # damaged pickles, or those of other versions of Python and numpy, raise any error
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}".removesuffix(": ")
            raise ValueError(f"{self.describe()}: the files cannot be read ({reason}): get them again") from error
        x = data.x.float()
        if self.normalize_features:
            x = x / x.sum(dim=1, keepdim=True).clamp(min=1.0)
        train = ~(data.val_mask | data.test_mask) if self.split == "full" else data.train_mask
        return Graph(
            x=x,
            y=data.y.long(),
            edge_index=data.edge_index.contiguous(),
            train=mask_to_index(train),
            val=mask_to_index(data.val_mask),
            test=mask_to_index(data.test_mask),
        )
