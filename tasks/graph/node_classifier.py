"""Classification of the nodes of one graph: the task, its losses, label reuse, baselines and pictures.

Shapes: `N` nodes, `F` features, `C` classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_adam_mini.factory import OptimizerFactory
from lightning_adam_mini.schedule import Schedule

from ..base import PrimaryMetric, Task
from ..metrics import read_metrics
from ..plots import draw_curves, save_figure
from .graph import Graph, require_torch_geometric

__all__ = ["NodeClassifier", "node_losses", "predict_with_labels"]

Loss = Literal["cross_entropy", "log_cross_entropy"]

# Lightning's other precisions convert the batch, and it does not treat a graph as a collection of tensors.
_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
_EPSILON = 1 - math.log(2)
# Label propagation then takes a second or two on a CPU; more iterations change little.
_PROPAGATIONS, _ALPHA = 20, 0.9


class NodeClassifier(Task):
    """A network of torch_geometric's layers that predicts the class of each node.

    Validation runs on the whole graph, and stores the test accuracy at the best validation accuracy so far.

    Args:
        optimizer: Factory of the optimizer.
        schedule: Learning-rate schedule.
        architecture: `gcn` (Kipf and Welling 2017, arXiv 1609.02907), `gat` (Velickovic et al. 2018, arXiv 1710.10903),
            or `mlp`, which ignores the edges and so shows what they are worth.
        num_layers: Number of layers, the last one included.
        hidden_size: Width of all layers but the last, over all heads together.
        heads: Attention heads of a GAT in all layers but the last, which has one.
        batch_norm: Use batch norm between layers.
        residual: Add a linear map of each layer's input to its output.
        input_dropout: Dropout of input features.
        dropout: Dropout after each layer but the last.
        attention_dropout: Dropout of a GAT's attention weights.
        edge_dropout: Fraction of the edges that a training step drops, in all layers.
        loss: Plain cross-entropy, or `log_cross_entropy`, log(eps + CE) - log eps with eps = 1 - ln 2.
        mask_rate: Fraction of the training nodes that the loss leaves out, drawn again in each step.
        label_reuse: Use the labels of the nodes that the loss leaves out as input features.
        label_iterations: With `label_reuse`, how often predictions replace the labels that are not given.
        predict_split: Nodes that `predict` writes.
    """

    unit: ClassVar[str] = "nodes"
    batch_kind = "graphs"
    logged_metrics = (
        "train_loss",
        "val_loss",
        "val_accuracy",
        "train_accuracy",
        "best_val_accuracy",
        "test_accuracy_at_best",
    )
    primary_metric = PrimaryMetric(
        metric="test_accuracy_at_best",
        mode="max",
        label="test accuracy at the best validation",
        validated="val_accuracy",
        validated_label="validation accuracy",
        selected_by="best_val_accuracy",
    )
    best_val_accuracy: Tensor
    test_accuracy_at_best: Tensor

    def __init__(
        self,
        optimizer: OptimizerFactory | None = None,
        schedule: Schedule | None = None,
        architecture: Literal["gcn", "gat", "mlp"] = "gcn",
        num_layers: int = 3,
        hidden_size: int = 128,
        heads: int = 1,
        batch_norm: bool = True,
        residual: bool = False,
        input_dropout: float = 0.0,
        dropout: float = 0.5,
        attention_dropout: float = 0.0,
        edge_dropout: float = 0.0,
        loss: Loss = "cross_entropy",
        mask_rate: float = 0.0,
        label_reuse: bool = False,
        label_iterations: int = 0,
        predict_split: Literal["train", "val", "test", "all"] = "test",
    ) -> None:
        super().__init__(optimizer, schedule)
        self.save_hyperparameters()
        self.architecture = architecture
        self.network_options: dict[str, Any] = {
            "num_layers": num_layers,
            "hidden_size": hidden_size,
            "heads": heads,
            "batch_norm": batch_norm,
            "residual": residual,
            "input_dropout": input_dropout,
            "dropout": dropout,
            "attention_dropout": attention_dropout,
            "edge_dropout": edge_dropout,
        }
        self.loss = loss
        self.mask_rate = mask_rate
        self.label_reuse = label_reuse
        self.label_iterations = label_iterations
        self.predict_split = predict_split
        _check_options(architecture, self.network_options)
        _check_labels(mask_rate, label_reuse, label_iterations)
        self._num_classes = 0
        self._edges: tuple[Graph, Tensor | None] | None = None
        self._predicted: tuple[Graph, Tensor] | None = None
        # Buffers are saved in the checkpoint, so that a resumed run continues from the same best.
        self.register_buffer("best_val_accuracy", torch.tensor(-1.0))
        self.register_buffer("test_accuracy_at_best", torch.tensor(float("nan")))

    def setup(self, stage: str) -> None:
        """Reject settings that would fail at the first batch.

        Raises:
            ValueError: The precision converts batches, or the number of sampled hops is not the number of layers.
        """
        super().setup(stage)
        if self.trainer.precision not in _PRECISIONS:
            raise ValueError(
                f"trainer.precision {self.trainer.precision} would convert the graph, which stays in float32: use "
                "32-true or bf16-mixed"
            )
        hops, layers = getattr(self.data_module(), "num_neighbors", None), self.network_options["num_layers"]
        if hops is not None and len(hops) != layers:
            raise ValueError(
                f"data.num_neighbors {hops} samples {len(hops)} hops, and the network has {layers} layers: give one "
                "number for each layer"
            )

    def configure_model(self) -> None:
        """Build the network for the data's features and classes.

        Raises:
            ValueError: torch_geometric is not installed, or there are no data.
        """
        if self.model is None:
            data = self.data_module()
            if data is None:
                raise ValueError("the network takes its input and output size from the data: give a data module")
            self.build(lambda: self._build(data.num_features, data.num_classes))

    def configure_meta_model(self, data: LightningDataModule, device: str = "meta") -> list[str]:
        """See `Task.configure_meta_model`: the sizes follow from the settings of the data."""
        graphs = cast("Any", data)
        with torch.device(device):
            self.model = self._build(graphs.planned_features, graphs.planned_classes)
        return []

    def _build(self, num_features: int, num_classes: int) -> nn.Module:
        require_torch_geometric("NodeClassifier")
        from .networks import NodeNetwork

        self._num_classes = num_classes
        inputs = num_features + (num_classes if self.label_reuse else 0)
        return NodeNetwork(self.architecture, inputs, num_classes, **self.network_options)

    @property
    def network(self) -> Any:
        """The `NodeNetwork`, once `configure_model` has made it."""
        # Annotated as Any, because jsonargparse would import torch_geometric to parse a command line.
        assert self.model is not None
        return self.model

    def forward(self, graph: Graph, given: Tensor | None = None) -> Tensor:
        """Logits `(N, C)` of every node.

        Args:
            graph: The graph, or a part of it.
            given: With `label_reuse`, a mask `(N,)` of the nodes whose labels are input; all training nodes by default.
        """
        edges = self._edges_of(graph)

        def predict(features: Tensor) -> Tensor:
            return self.network(features, graph.edge_index, edges)

        if not self.label_reuse:
            return predict(graph.x)
        given = draw_training_nodes(graph, 1.0) if given is None else given
        return predict_with_labels(
            predict, graph, given, num_classes=self._num_classes, iterations=self.label_iterations
        )

    def training_step(self, batch: Graph, batch_idx: int) -> Tensor:
        """Mean loss over the training nodes of a batch that are not masked."""
        targets = batch.train if batch.seeds is None else batch.seeds
        given = draw_training_nodes(batch, self.mask_rate) if self.mask_rate else None
        losses = node_losses(self(batch, given)[targets], batch.y[targets], self.loss)
        counted = torch.ones_like(losses) if given is None else (~given[targets]).to(losses.dtype)
        # A small part of the graph may have no training nodes.
        loss = (losses * counted).sum() / counted.sum().clamp(min=1)
        self.log("train_loss", loss, prog_bar=True, batch_size=batch.num_nodes)
        return loss

    def validation_step(self, batch: Graph, batch_idx: int) -> None:
        """Loss and accuracy on the whole graph, and the test accuracy if the validation accuracy is the best so far."""
        loss, accuracy = self._evaluate(batch, batch.val)
        metrics = {"val_loss": loss, "val_accuracy": accuracy}
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            if accuracy > self.best_val_accuracy:
                self.best_val_accuracy.copy_(accuracy)
                self.test_accuracy_at_best.copy_(self._accuracy(batch, batch.test))
            # Copies, because Lightning reads logged tensors later.
            metrics["train_accuracy"] = self._accuracy(batch, batch.train)
            metrics["best_val_accuracy"] = self.best_val_accuracy.clone()
            metrics["test_accuracy_at_best"] = self.test_accuracy_at_best.clone()
        shown = {"val_loss", "val_accuracy"}
        for name, value in metrics.items():
            # The values are equal on all ranks, which evaluate the whole graph; without sync_dist Lightning would warn.
            self.log(name, value, prog_bar=name in shown, batch_size=1, sync_dist=True)

    def test_step(self, batch: Graph, batch_idx: int) -> None:
        """Loss and accuracy of the test nodes."""
        loss, accuracy = self._evaluate(batch, batch.test)
        self.log_dict({"test_loss": loss, "test_accuracy": accuracy}, batch_size=1, sync_dist=True)

    def predict_step(self, batch: Graph, batch_idx: int) -> list[dict[str, Any]]:
        """`{"node": ..., "class": ..., "probability": ...}` of each node; node and class by name if they have names."""
        probabilities, classes = (each.tolist() for each in self(batch).float().softmax(dim=1).max(dim=1))
        every = self.predict_split == "all"
        nodes = range(batch.num_nodes) if every else getattr(batch, self.predict_split).tolist()
        return [
            {
                "node": batch.node_names[node] if batch.node_names else node,
                "class": batch.class_names[classes[node]] if batch.class_names else classes[node],
                "probability": round(probabilities[node], 6),
            }
            for node in nodes
        ]

    def batch_units(self, batch: Graph) -> int:
        """Number of nodes in a batch."""
        return batch.num_nodes

    def summary(self) -> dict[str, str]:
        """Accuracies, and two baselines without a network: the most frequent class, and label propagation."""
        lines: dict[str, str] = {}
        if self.best_val_accuracy >= 0:
            lines["best validation accuracy"] = f"{self.best_val_accuracy:.2%}"
            lines["test accuracy there"] = f"{self.test_accuracy_at_best:.2%}"
        if self._predicted is not None:
            graph = self._predicted[0]
            lines["graph"] = (
                f"{graph.num_nodes:,} nodes, {graph.edge_index.shape[1]:,} edges, {self._num_classes} classes"
            )
            lines["test accuracy of the most frequent class"] = f"{_majority_accuracy(graph):.2%}"
            lines["test accuracy of label propagation"] = f"{_propagation_accuracy(graph, self._num_classes):.2%}"
        return lines

    def pictures(self, folder: Path) -> dict[str, Path]:
        """Accuracies by step, and the test accuracy of each class after the last validation."""
        drawn, style = {"accuracy curve": folder / "accuracy_curve.png"}, {"marker": "o", "markersize": 3}
        curves = [
            ("train_accuracy", "training", style),
            ("val_accuracy", "validation", style),
            ("test_accuracy_at_best", "test at the best validation", style),
        ]
        draw_curves(drawn["accuracy curve"], read_metrics(folder), curves, ylabel="accuracy, %", scale=100)
        if self._predicted is not None:
            drawn["accuracy by class"] = folder / "accuracy_by_class.png"
            _draw_class_accuracies(drawn["accuracy by class"], *self._predicted)
        return drawn

    def _evaluate(self, graph: Graph, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss and accuracy of some nodes, from one forward pass over the graph."""
        logits = self(graph)
        self._predicted = (graph, logits.argmax(dim=1))
        return node_losses(logits[nodes], graph.y[nodes], self.loss).mean(), self._accuracy(graph, nodes)

    def _accuracy(self, graph: Graph, nodes: Tensor) -> Tensor:
        """Accuracy of the last forward pass on some nodes."""
        assert self._predicted is not None
        return (self._predicted[1][nodes] == graph.y[nodes]).float().mean()

    def _edges_of(self, graph: Graph) -> Tensor | None:
        if self.network.training and self.network.edge_dropout:
            return None  # the network drops edges first
        if not graph.whole:
            return self.network.edges(graph.edge_index, graph.num_nodes)
        if self._edges is None or self._edges[0] is not graph:
            with torch.inference_mode(False):  # a validation may come first, and training uses the same tensors
                self._edges = (graph, self.network.edges(graph.edge_index, graph.num_nodes))
        return self._edges[1]


def _check_options(architecture: str, options: dict[str, Any]) -> None:
    """Raise if an option is out of range, or if the architecture does not have it."""
    for name in ("num_layers", "hidden_size", "heads"):
        if options[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {options[name]}")
    for name in ("input_dropout", "dropout", "attention_dropout", "edge_dropout"):
        if not 0 <= options[name] < 1:
            raise ValueError(f"{name} is a probability in [0, 1), got {options[name]}")
    if options["hidden_size"] % options["heads"]:
        raise ValueError(
            f"hidden_size {options['hidden_size']} is the width of all heads together: make it a multiple of heads "
            f"{options['heads']}"
        )
    others = {"heads": 1, "attention_dropout": 0.0} if architecture != "gat" else {}
    others |= {"residual": False, "edge_dropout": 0.0} if architecture == "mlp" else {}
    for name, unset in others.items():
        if options[name] != unset:
            raise ValueError(f"{name} has no meaning in architecture {architecture}: leave it out")


def _check_labels(mask_rate: float, label_reuse: bool, label_iterations: int) -> None:
    """Raise if the options of label reuse do not fit together."""
    if not 0 <= mask_rate < 1:
        raise ValueError(f"mask_rate is a fraction in [0, 1), got {mask_rate}")
    if label_iterations < 0:
        raise ValueError(f"label_iterations must be at least 0, got {label_iterations}")
    if label_reuse and not mask_rate:
        raise ValueError(
            "label_reuse uses the labels of the nodes that the loss leaves out, and mask_rate 0 leaves none out: set "
            "mask_rate, to 0.5 as in DGL's scripts"
        )
    if label_iterations and not label_reuse:
        raise ValueError("label_iterations continues label_reuse: set label_reuse true, or leave label_iterations out")


def node_losses(logits: Tensor, labels: Tensor, loss: Loss) -> Tensor:
    r"""Loss of each node, `(n,)`.

    `log_cross_entropy` is :math:`\log(\epsilon + CE) - \log \epsilon` with :math:`\epsilon = 1 - \ln 2`: like the
    cross-entropy near 0, but it grows slowly for large errors, so that wrong labels have less influence (Wang et al.
    2021, "Bag of Tricks for Node Classification with Graph Neural Networks", arXiv 2103.13355, section 4).

    Args:
        logits: `(n, C)`.
        labels: `(n,)`.
        loss: Name of the loss.
    """
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    return losses if loss == "cross_entropy" else torch.log(_EPSILON + losses) - math.log(_EPSILON)


def draw_training_nodes(graph: Graph, rate: float) -> Tensor:
    """A mask `(N,)` of nodes whose labels are input: true for each training node with probability `rate`."""
    given = torch.zeros(graph.num_nodes, dtype=torch.bool, device=graph.y.device)
    given[graph.train] = True if rate == 1 else torch.rand(len(graph.train), device=graph.y.device) < rate
    return given


def predict_with_labels(
    predict: Callable[[Tensor], Tensor], graph: Graph, given: Tensor, *, num_classes: int, iterations: int = 0
) -> Tensor:
    """Logits from features and labels of training nodes as input features.

    Each step gives the labels of a random part of the training nodes and predicts those of the others; an evaluation
    gives all of them (Wang et al. 2021, "Bag of Tricks for Node Classification with Graph Neural Networks", arXiv
    2103.13355, section 3; the scripts for ogbn-arxiv in DGL's examples).

    Args:
        predict: Maps features `(N, F + C)` to logits `(N, C)`.
        graph: The graph.
        given: Mask `(N,)` of the nodes whose labels are given.
        num_classes: C.
        iterations: How often the network's own probabilities replace the labels that are not given. Only the last pass
            has a gradient.
    """
    labels = torch.zeros(graph.num_nodes, num_classes, dtype=graph.x.dtype, device=graph.x.device)
    labels[graph.train, graph.y[graph.train]] = given[graph.train].to(labels.dtype)
    features = torch.cat([graph.x, labels], dim=1)
    for _ in range(iterations):
        with torch.no_grad():
            guesses = predict(features).float().softmax(dim=1)
        features = torch.cat([graph.x, torch.where(given[:, None], labels, guesses)], dim=1)
    return predict(features)


def _majority_accuracy(graph: Graph) -> float:
    """Test accuracy of always predicting the most frequent class of the training nodes."""
    most = graph.y[graph.train].bincount().argmax()
    return (graph.y[graph.test] == most).float().mean().item()


def _propagation_accuracy(graph: Graph, num_classes: int) -> float:
    """Test accuracy of label propagation (Huang et al. 2020, arXiv 2010.13993), without features and training."""
    from torch_geometric.nn.models import LabelPropagation

    labels = F.one_hot(graph.y, num_classes).float()
    predicted = LabelPropagation(_PROPAGATIONS, _ALPHA)(labels, graph.edge_index, mask=graph.train).argmax(dim=1)
    return (predicted[graph.test] == graph.y[graph.test]).float().mean().item()


def _draw_class_accuracies(path: Path, graph: Graph, predicted: Tensor) -> None:
    """Draw the test accuracy of each class in percent as bars, the worst first, with the number of test nodes."""
    from matplotlib.figure import Figure

    labels = graph.y[graph.test].cpu()
    hits = (predicted[graph.test].cpu() == labels).double()
    counts = labels.bincount()
    shares = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, labels, hits) / counts
    rows = [
        (graph.class_names[label] if graph.class_names else str(label), shares[label].item(), count)
        for label, count in enumerate(counts.tolist())
        if count
    ]
    rows.sort(key=lambda row: row[1])
    figure = Figure(figsize=(7, 1 + 0.2 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.barh([f"{name} ({count})" for name, _, count in rows], [100 * share for _, share, _ in rows])
    axes.set_xlabel("test accuracy (and test nodes) of each class, %")
    axes.set_xlim(0, 100)
    axes.tick_params(labelsize=7)
    axes.grid(axis="x", alpha=0.3)
    save_figure(figure, path)
