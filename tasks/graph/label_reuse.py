"""Labels of training nodes as input features.

Each step gives the labels of a random part of the training nodes and asks for those of the others; an evaluation gives
them all (Wang et al. 2021, "Bag of Tricks for Node Classification with Graph Neural Networks", arXiv 2103.13355,
section 3; the scripts for ogbn-arxiv in DGL's examples).

Shapes: `N` nodes, `C` classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .graph import Graph

__all__ = ["all_training_nodes", "draw_training_nodes", "predict_with_labels"]


def all_training_nodes(graph: Graph) -> Tensor:
    """Which nodes' labels an evaluation gives: `(N,)`, true for every training node."""
    given = torch.zeros(graph.num_nodes, dtype=torch.bool, device=graph.y.device)
    given[graph.train] = True
    return given


def draw_training_nodes(graph: Graph, rate: float) -> Tensor:
    """Which nodes' labels a step gives: `(N,)`, true for each training node with probability `rate`.

    Args:
        graph: The graph.
        rate: Between 0 and 1.
    """
    given = torch.zeros(graph.num_nodes, dtype=torch.bool, device=graph.y.device)
    given[graph.train] = torch.rand(len(graph.train), device=graph.y.device) < rate
    return given


def predict_with_labels(
    predict: Callable[[Tensor], Tensor], graph: Graph, given: Tensor, *, num_classes: int, iterations: int = 0
) -> Tensor:
    """Logits from features and given labels.

    Args:
        predict: Features `(N, F + C)` to logits `(N, C)`.
        graph: The graph.
        given: Nodes whose labels are given `(N,)`.
        num_classes: C.
        iterations: How often the network's own probabilities take the place of the labels that are not given. Only the
            last pass has a gradient.
    """
    labels = torch.zeros(graph.num_nodes, num_classes, dtype=graph.x.dtype, device=graph.x.device)
    labels[graph.train, graph.y[graph.train]] = given[graph.train].to(labels.dtype)
    features = torch.cat([graph.x, labels], dim=1)
    for _ in range(iterations):
        with torch.no_grad():
            guesses = predict(features).float().softmax(dim=1)
        features = torch.cat([graph.x, torch.where(given[:, None], labels, guesses)], dim=1)
    return predict(features)
