"""Graphs with labelled nodes: the call graph of Python's standard library, ogbn-arxiv, and Planetoid's citations."""

from .call_graph import CallGraph
from .citations import OgbArxiv, Planetoid
from .module import GraphDataModule

__all__ = ["CallGraph", "GraphDataModule", "OgbArxiv", "Planetoid"]
