"""The graph that every machine has: who mentions whom in Python's standard library."""

from __future__ import annotations

import platform
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...data.cache import digest, hash_files
from ...data.sources import library_files
from ..graph import Graph
from .graph_cache import cached_graph
from .module import GraphDataModule
from .python_sources import Definition, find_definitions
from .word_features import word_features

__all__ = ["CallGraph", "mention_edges"]

_FEATURES = 128
_TABLES = frozenset({"encodings", "pydoc_data"})  # generated files and plain text
_SHARES = (0.54, 0.18)  # for training and validation; ogbn-arxiv's


class CallGraph(GraphDataModule):
    """Functions and classes of Python's standard library, and the package that each belongs to (licence PSF-2.0).

    An edge runs where a definition mentions a name that has few definitions, to all of them, in whatever module they
    are. To resolve a name in its own module first, as a reader would, leaks the label: such an edge says by its being
    there that both ends are of one package, and a GCN then reads the rule and not the graph (91 %, not 82 %).

    Features are hashed words of the names that a definition mentions and of its docstring, by tf-idf, projected to
    128 numbers. The graph depends on the Python version and on the sources alone: 11,648 nodes and 83,910 edges on
    Python 3.11. It takes a few seconds to make, once.

    Args:
        num_packages: The largest packages, which are the classes.
        max_definitions: Definitions that a name may have to give edges.
        split_seed: Picks the nodes for training (54 %), validation (18 %) and test (28 %); not the run's seed, so that
            all runs are judged by the same nodes.
        kwargs: Settings of every graph, see `GraphDataModule`.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(self, *, num_packages: int = 40, max_definitions: int = 3, split_seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_packages < 2 or max_definitions < 1 or split_seed < 0:
            raise ValueError(
                "`num_packages` must be at least 2, `max_definitions` at least 1 and `split_seed` at least 0, got "
                f"{num_packages}, {max_definitions} and {split_seed}."
            )
        self.num_packages = num_packages
        self.max_definitions = max_definitions
        self.split_seed = split_seed
        self._sources = ""

    @property
    def planned_features(self) -> int:
        """Features of a node."""
        return _FEATURES

    @property
    def planned_classes(self) -> int:
        """Packages."""
        return self.num_packages

    other_data = "run with the Python of the run, whose sources these are, or start a new run"

    def meaning(self) -> dict[str, Any]:
        """See `GraphDataModule.meaning`: features are directions in all words of the sources."""
        return {**super().meaning(), "features": f"{_FEATURES} of {self._sources}"}

    def open_graph(self) -> Graph:
        """See `GraphDataModule.open_graph`."""
        root, files = library_files()
        files = [path for path in files if path.relative_to(root).parts[0] not in _TABLES]
        settings = [self.num_packages, self.max_definitions, self.split_seed]
        key = [platform.python_version(), hash_files(files, root=root), settings]
        self._sources = f"Python {key[0]} ({digest(key)})"
        return cached_graph(self.cache_dir, "call_graph", key, lambda: self.build(find_definitions(root, files)))

    def build(self, definitions: Sequence[Definition]) -> Graph:
        """The graph of some definitions.

        Args:
            definitions: All of them; those of small packages give no node, but do count as definitions of a name.

        Raises:
            ValueError: There are fewer packages than are asked for.
        """
        sizes = Counter(one.package for one in definitions)
        if len(sizes) < self.num_packages:
            raise ValueError(f"`num_packages` is {self.num_packages}, but there are {len(sizes)} packages: lower it.")
        packages = [name for name, _ in sizes.most_common(self.num_packages)]
        kept = [number for number, one in enumerate(definitions) if one.package in packages]
        nodes = [definitions[number] for number in kept]
        edges = mention_edges(definitions, kept, self.max_definitions)
        order = torch.randperm(len(nodes), generator=torch.Generator().manual_seed(self.split_seed))
        first, second = (int(share * len(nodes)) for share in (_SHARES[0], sum(_SHARES)))
        return Graph(
            x=word_features([one.words() for one in nodes], _FEATURES),
            y=torch.tensor([packages.index(one.package) for one in nodes]),
            edge_index=edges,
            train=order[:first],
            val=order[first:second],
            test=order[second:],
            class_names=tuple(packages),
            node_names=tuple(one.path for one in nodes),
        )


def mention_edges(definitions: Sequence[Definition], kept: Sequence[int], max_definitions: int) -> Tensor:
    """Edges in both directions between a definition and those of the names that it mentions: `(2, E)`, each once.

    Args:
        definitions: All of them.
        kept: Numbers of those that are nodes, in their order.
        max_definitions: A name with more definitions gives no edge: it says too little.
    """
    from torch_geometric.utils import to_undirected

    by_name: defaultdict[str, list[int]] = defaultdict(list)
    for number, definition in enumerate(definitions):
        by_name[definition.name].append(number)
    node = {number: position for position, number in enumerate(kept)}
    pairs = [
        (node[source], node[target])
        for source in kept
        for name in definitions[source].mentions
        if len(by_name.get(name, ())) <= max_definitions
        for target in by_name.get(name, ())
        if target != source and target in node
    ]
    return to_undirected(torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T.contiguous(), num_nodes=len(kept))
