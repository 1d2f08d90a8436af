"""Pictures of a run on a graph."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..metrics import read_metrics
from ..plots import draw_curves, save_figure
from .graph import Graph

__all__ = ["class_accuracies", "draw_accuracy", "draw_classes"]


def draw_accuracy(folder: Path) -> Path:
    """Training and validation accuracy in percent by step, from the metrics of the whole run: `accuracy_curve.png`.

    Args:
        folder: The run folder.
    """
    path, style = folder / "accuracy_curve.png", {"marker": "o", "markersize": 3}
    curves = [
        ("train_accuracy", "training", style),
        ("val_accuracy", "validation", style),
        ("test_accuracy_at_best", "test at the best validation", style),
    ]
    draw_curves(path, read_metrics(folder), curves, ylabel="accuracy, %", scale=100)
    return path


def class_accuracies(graph: Graph, predicted: Tensor) -> list[tuple[str, float, int]]:
    """Name, test accuracy and number of test nodes of each class that has any, the worst first.

    Args:
        graph: The graph.
        predicted: Class of each node `(N,)`.
    """
    labels = graph.y[graph.test].cpu()
    hits = (predicted[graph.test].cpu() == labels).double()
    counts = labels.bincount()
    shares = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, labels, hits) / counts
    rows = [
        (graph.class_names[label] if graph.class_names else str(label), shares[label].item(), count)
        for label, count in enumerate(counts.tolist())
        if count
    ]
    return sorted(rows, key=lambda row: row[1])


def draw_classes(folder: Path, graph: Graph, predicted: Tensor) -> Path:
    """Test accuracy of each class in percent as bars: `accuracy_by_class.png`.

    Args:
        folder: The run folder.
        graph: The graph.
        predicted: Class of each node `(N,)`.
    """
    from matplotlib.figure import Figure

    rows = class_accuracies(graph, predicted)
    figure = Figure(figsize=(7, 1 + 0.2 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.barh([f"{name} ({count})" for name, _, count in rows], [100 * share for _, share, _ in rows])
    axes.set_xlabel("test accuracy (and test nodes) of each class, %")
    axes.set_xlim(0, 100)
    axes.tick_params(labelsize=7)
    axes.grid(axis="x", alpha=0.3)
    save_figure(figure, folder / "accuracy_by_class.png")
    return folder / "accuracy_by_class.png"
