"""What a graph's labels give away without a network."""

from __future__ import annotations

import torch

from .graph import Graph

__all__ = ["majority_accuracy", "propagation_accuracy"]

# Few enough for a second or two on a CPU; more change little.
_PROPAGATIONS, _ALPHA = 20, 0.9


def majority_accuracy(graph: Graph) -> float:
    """Test accuracy of always naming the class that most training nodes have."""
    most = graph.y[graph.train].bincount().argmax()
    return (graph.y[graph.test] == most).float().mean().item()


def propagation_accuracy(graph: Graph, num_classes: int) -> float:
    """Test accuracy of training labels that spread along edges: no features, no training.

    torch_geometric's LabelPropagation (Huang et al. 2020, arXiv 2010.13993).
    """
    from torch_geometric.nn.models import LabelPropagation

    labels = torch.nn.functional.one_hot(graph.y, num_classes).float()
    found = LabelPropagation(_PROPAGATIONS, _ALPHA)(labels, graph.edge_index, mask=graph.train).argmax(dim=1)
    return (found[graph.test] == graph.y[graph.test]).float().mean().item()
