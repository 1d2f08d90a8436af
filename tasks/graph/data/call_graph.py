"""A graph that every machine has: which functions of Python's standard library mention which.

Shapes: `N` nodes, `E` edges, `F` features.
"""

from __future__ import annotations

import ast
import platform
import re
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data.cache import digest, hash_files
from ...data.sources import library_files
from ..graph import Graph
from .module import GraphDataModule, cached_graph

__all__ = ["CallGraph", "Definition", "find_definitions", "mention_edges", "word_features"]

_FEATURES = 128
_TABLES = frozenset({"encodings", "pydoc_data"})  # generated files and plain text
_SHARES = (0.54, 0.18)  # for training and validation; ogbn-arxiv's


class CallGraph(GraphDataModule):
    """Functions and classes of Python's standard library, classified by their package (licence PSF-2.0).

    An edge connects a definition with all definitions of each name that it mentions, in any module, if the name has few
    definitions. Resolving a name in its own module first, as a reader would, leaks the label: such an edge exists only
    if both ends are in one package, and a GCN then learns this rule instead of the graph (91 %, not 82 %).

    Features are words of the docstring and of the mentioned names, hashed, weighted by tf-idf and projected to 128
    numbers. The graph depends on the Python version and on the sources alone: 11,648 nodes and 83,910 edges on Python
    3.11. It takes a few seconds to make, once.

    Args:
        num_packages: Number of classes: the largest packages.
        max_definitions: A name with more definitions gives no edges.
        split_seed: Determines the nodes for training (54 %), validation (18 %) and test (28 %); it is not the run's
            seed, so that all runs are evaluated on the same nodes.
        kwargs: See `GraphDataModule`.

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
        """Number of packages."""
        return self.num_packages

    other_data = "run with the Python of the run, whose sources these are, or start a new run"

    def meaning(self) -> dict[str, Any]:
        """See `GraphDataModule.meaning`: the features are projections of all words of the sources."""
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
            definitions: All of them; definitions in small packages are not nodes, but count as definitions of a name.

        Raises:
            ValueError: There are fewer packages than `num_packages`.
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
    """Edges `(2, E)` in both directions between definitions and the definitions of names that they mention, each once.

    Args:
        definitions: All of them.
        kept: Indices of those that are nodes, in the order of the nodes.
        max_definitions: A name with more definitions gives no edges, because it says too little.
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


_WORD = re.compile(r"[A-Za-z][a-z]{2,}|[A-Z]{3,}")
_DOC_WORD = re.compile(r"[A-Za-z]{3,}")


@dataclass(kw_only=True)
class Definition:
    """A function or class.

    Args:
        name: Its own name.
        path: Its qualified name, with the module.
        package: Top-level package or module.
        mentions: How often it mentions each name or attribute, nested definitions included.
        doc: Its docstring.
    """

    name: str
    path: str
    package: str
    mentions: Counter[str] = field(default_factory=Counter)
    doc: str = ""

    def words(self) -> Counter[str]:
        """Words of the docstring and of the mentioned names, in lower case; its own name does not count."""
        words = Counter(word.lower() for word in _DOC_WORD.findall(self.doc))
        for name, count in self.mentions.items():
            for word in _WORD.findall(name):
                words[word.lower()] += count
        return words


def find_definitions(root: Path, files: Sequence[Path]) -> list[Definition]:
    """All functions and classes of some files; a file that this Python version cannot parse is skipped.

    Args:
        root: Folder that module names start from.
        files: Files below it.
    """
    found: list[Definition] = []
    for path in files:
        module = path.relative_to(root).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about old escapes in the sources
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for child in ast.iter_child_nodes(tree):
            found.extend(_definitions(child, module, []))
    return found


def _definitions(node: ast.AST, module: str, inside: list[Definition]) -> Iterator[Definition]:
    """Definitions at and below a node; names that it mentions count for every enclosing definition."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        path = f"{inside[-1].path if inside else module}.{node.name}"
        definition = Definition(name=node.name, path=path, package=module.partition(".")[0])
        definition.doc = ast.get_docstring(node) or ""
        inside = [*inside, definition]
        yield definition
    elif inside and isinstance(node, ast.Name | ast.Attribute):
        name = node.id if isinstance(node, ast.Name) else node.attr
        for definition in inside:
            definition.mentions[name] += 1
    for child in ast.iter_child_nodes(node):
        yield from _definitions(child, module, inside)


_BUCKETS = 4096


def word_features(texts: Sequence[Counter[str]], num_features: int) -> Tensor:
    """Hashed words, weighted by tf-idf and projected on the largest singular vectors: `(N, F)`.

    Each text has unit norm in tf-idf; rows of the result have the norm sqrt(F).

    Args:
        texts: N texts, each as counts of its words.
        num_features: F, at most N and the 4,096 buckets that words are hashed to.
    """
    rows: list[int] = []
    columns: list[int] = []
    counts: list[int] = []
    for number, words in enumerate(texts):
        buckets: Counter[int] = Counter()
        for word, count in words.items():
            buckets[zlib.crc32(word.encode()) % _BUCKETS] += count
        rows.extend([number] * len(buckets))
        columns.extend(buckets.keys())
        counts.extend(buckets.values())
    row, column = torch.tensor(rows, dtype=torch.int64), torch.tensor(columns, dtype=torch.int64)
    texts_with = column.bincount(minlength=_BUCKETS)
    rarity = ((1 + len(texts)) / (1 + texts_with)).log() + 1
    values = (1 + torch.tensor(counts, dtype=torch.float32).log()) * rarity[column]
    lengths = torch.zeros(len(texts)).index_add_(0, row, values.square()).sqrt()
    shape = (len(texts), _BUCKETS)
    weights = torch.sparse_coo_tensor(torch.stack([row, column]), values / lengths[row], shape, check_invariants=False)
    with torch.random.fork_rng(devices=[]):  # the projection starts from random vectors
        torch.manual_seed(0)
        left, scale, _ = torch.svd_lowrank(weights.coalesce(), q=num_features, niter=4)
    return F.normalize(left * scale, dim=1) * num_features**0.5
