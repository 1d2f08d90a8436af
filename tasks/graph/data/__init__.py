"""Graphs with labelled nodes: the call graph of Python's standard library, ogbn-arxiv, and Planetoid's citations."""

from .call_graph import CallGraph
from .module import GraphDataModule
from .ogb_arxiv import OgbArxiv
from .planetoid import Planetoid

__all__ = ["CallGraph", "GraphDataModule", "OgbArxiv", "Planetoid"]
