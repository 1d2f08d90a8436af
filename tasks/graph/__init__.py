"""Graphs: classification of nodes with torch_geometric's layers."""

from .node_classifier import NodeClassifier

__all__ = ["NodeClassifier"]
