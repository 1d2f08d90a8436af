"""Prepared graphs on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from ...atomic_files import atomic_file
from ...checkpoints.files import read_file, write_to
from ...data.cache import digest, only_one
from ..graph import Graph

__all__ = ["cached_graph"]

log = logging.getLogger(__name__)

# Raised by one whenever the meaning of a prepared file changes.
_FORMAT = 1


def cached_graph(cache_dir: Path, name: str, key: object, prepare: Callable[[], Graph]) -> Graph:
    """A graph from the cache, or prepared and kept there.

    Args:
        cache_dir: The cache.
        name: Begins the file's name.
        key: All that the graph depends on, as a JSON value.
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
    """The graph of a file; None where there is none, or one that is damaged."""
    if not path.exists():
        return None
    try:
        return Graph(**read_file(path))
    except (OSError, TypeError, ValueError) as error:
        log.warning("the prepared graph %s cannot be read and is made again: %s", path, error.__cause__ or error)
        return None
