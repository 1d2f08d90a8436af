"""Planetoid's citation graphs on disk, in torch_geometric's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_adam_mini.hints import require_package

from ...checkpoint_file import ExactUnpickler
from ..graph import Graph
from .graph_cache import cached_graph
from .module import GraphDataModule

__all__ = ["Planetoid"]

# Features and classes of each.
_SHAPES = {"Cora": (1433, 7), "CiteSeer": (3703, 6), "PubMed": (500, 3)}
_PICKLED = ("x", "tx", "allx", "y", "ty", "ally", "graph")
_PARTS = (*_PICKLED, "test.index")
# Sparse matrices, arrays, and a dict of lists, by the names that Python 2 and 3 and each numpy and scipy give them.
_CLASSES = {
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

    The files `ind.cora.x` and so on are those of torch_geometric's `Planetoid(root=path, name=name)`. They are pickles,
    and one that holds anything but matrices and lists is refused. Nothing is downloaded.

    Args:
        path: Folder that holds `NAME/raw/ind.name.x`, or the raw files themselves.
        name: Which graph.
        split: `public` trains on 20 nodes a class; `full` on all nodes that are neither validation nor test.
        normalize_features: Divide the features of a node by their sum.
        kwargs: Settings of every graph, see `GraphDataModule`.
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
        """Words of the vocabulary."""
        return _SHAPES[self.graph_name][0]

    @property
    def planned_classes(self) -> int:
        """Topics."""
        return _SHAPES[self.graph_name][1]

    def meaning(self) -> dict[str, Any]:
        """See `GraphDataModule.meaning`: the vocabulary is the graph's, and the option scales its counts."""
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
        prefix = f"ind.{self.graph_name.lower()}"
        raw = self._raw_folder(prefix)
        stats = [(raw / f"{prefix}.{part}").stat() for part in _PARTS]
        key = [str(raw.resolve()), [[stat.st_size, stat.st_mtime_ns] for stat in stats], self.split]
        return cached_graph(self.cache_dir, prefix, [*key, self.normalize_features], lambda: self._read(raw))

    def _raw_folder(self, prefix: str) -> Path:
        folders = (self.path / self.graph_name / "raw", self.path / "raw", self.path)
        raw = next((folder for folder in folders if (folder / f"{prefix}.graph").exists()), folders[0])
        if missing := [f"{prefix}.{part}" for part in _PARTS if not (raw / f"{prefix}.{part}").exists()]:
            raise ValueError(
                f"{raw} has no {missing[0]} ({len(missing)} of {len(_PARTS)} files are missing): put the files of "
                f"Planetoid's {self.graph_name} there, or give their folder as data.path; nothing is downloaded"
            )
        return raw

    def _read(self, raw: Path) -> Graph:
        from torch_geometric.io import read_planetoid_data

        require_package("scipy", "Planetoid (its files hold scipy's matrices)", extra="graph")
        try:
            for part in _PICKLED:  # which read_planetoid_data would let run code
                with (raw / f"ind.{self.graph_name.lower()}.{part}").open("rb") as file:
                    ExactUnpickler(file, _CLASSES, encoding="latin1").load()
            data = read_planetoid_data(str(raw), self.graph_name.lower())
        except Exception as error:  # files that are no pickles, or of other versions of Python and numpy, raise any
            told = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}".removesuffix(": ")
            raise ValueError(f"{self.describe()}: the files cannot be read ({told}): get them again") from error
        x = data.x.float()
        if self.normalize_features:
            x = x / x.sum(dim=1, keepdim=True).clamp(min=1.0)
        train = ~(data.val_mask | data.test_mask) if self.split == "full" else data.train_mask
        return Graph(
            x=x,
            y=data.y.long(),
            edge_index=data.edge_index.contiguous(),
            train=_numbers(train),
            val=_numbers(data.val_mask),
            test=_numbers(data.test_mask),
        )


def _numbers(mask: Tensor) -> Tensor:
    return torch.nonzero(mask).flatten()
