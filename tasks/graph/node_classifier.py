"""Classification of the nodes of one graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_adam_mini.factory import OptimizerFactory
from lightning_adam_mini.schedule import Schedule

from ..base import PrimaryMetric, Task
from .baselines import majority_accuracy, propagation_accuracy
from .graph import Graph
from .label_reuse import all_training_nodes, draw_training_nodes, predict_with_labels
from .losses import Loss, node_losses
from .packages import require_torch_geometric
from .pictures import draw_accuracy, draw_classes

__all__ = ["NodeClassifier"]

# The others convert a batch, and a graph is no collection of tensors to Lightning.
_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


class NodeClassifier(Task):
    """A network of torch_geometric's layers that tells the class of each node.

    Validation runs on the whole graph, and keeps the test accuracy of the best validation accuracy so far.

    Args:
        optimizer: Factory of the optimizer.
        schedule: Learning-rate schedule.
        architecture: `gcn` (Kipf and Welling 2017, arXiv 1609.02907), `gat` (Velickovic et al. 2018, arXiv 1710.10903),
            or `mlp`, which sees features alone: what the edges are worth is the difference.
        num_layers: Layers, the last one included.
        hidden_size: Width of the other layers, over all heads together.
        heads: Attention heads of a GAT in all layers but the last, which has one.
        batch_norm: Normalise between layers.
        residual: Add a linear map of each layer's input to its output.
        input_dropout: Of features.
        dropout: After each layer but the last.
        attention_dropout: Of a GAT's attention weights.
        edge_dropout: Share of the edges that a training step leaves out, in all layers.
        loss: Plain cross-entropy, or `log_cross_entropy`, log(eps + CE) - log eps with eps = 1 - ln 2.
        mask_rate: Share of the training nodes, drawn anew for each step, that the loss leaves out.
        label_reuse: Give the labels of the nodes that the loss leaves out as input features.
        label_iterations: How often predictions take the place of labels that are not given, with `label_reuse`.
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
        # In the checkpoint, so that a resumed run goes on from the same best.
        self.register_buffer("best_val_accuracy", torch.tensor(-1.0))
        self.register_buffer("test_accuracy_at_best", torch.tensor(float("nan")))

    def setup(self, stage: str) -> None:
        """Refuse what would fail at the first batch.

        Raises:
            ValueError: A precision that converts batches, or a number of sampled hops that is not that of the layers.
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
        """Make the network for the data's features and classes.

        Raises:
            ValueError: torch_geometric is not installed, or there are no data.
        """
        if self.model is None:
            data = self.data_module()
            if data is None:
                raise ValueError("the network takes its input and output size from the data: give a data module")
            self.build(lambda: self._build(data.num_features, data.num_classes))

    def configure_meta_model(self, data: LightningDataModule, device: str = "meta") -> list[str]:
        """See `Task.configure_meta_model`: the sizes are those that the settings of the data tell."""
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
        # Not annotated by its name: jsonargparse would import torch_geometric to parse a command line.
        assert self.model is not None
        return self.model

    def forward(self, graph: Graph, given: Tensor | None = None) -> Tensor:
        """Logits `(N, C)` of every node.

        Args:
            graph: The graph, or a part of it.
            given: With `label_reuse`, the nodes whose labels are given `(N,)`; all training nodes by default.
        """
        edges = self._edges_of(graph)

        def predict(features: Tensor) -> Tensor:
            return self.network(features, graph.edge_index, edges)

        if not self.label_reuse:
            return predict(graph.x)
        given = all_training_nodes(graph) if given is None else given
        return predict_with_labels(
            predict, graph, given, num_classes=self._num_classes, iterations=self.label_iterations
        )

    def training_step(self, batch: Graph, batch_idx: int) -> Tensor:
        """Mean loss over the training nodes of a batch, or over those that the mask leaves."""
        targets = batch.train if batch.seeds is None else batch.seeds
        given = draw_training_nodes(batch, self.mask_rate) if self.mask_rate else None
        losses = node_losses(self(batch, given)[targets], batch.y[targets], self.loss)
        counted = torch.ones_like(losses) if given is None else (~given[targets]).to(losses.dtype)
        # A small part may hold no training node at all.
        loss = (losses * counted).sum() / counted.sum().clamp(min=1)
        self.log("train_loss", loss, prog_bar=True, batch_size=batch.num_nodes)
        return loss

    def validation_step(self, batch: Graph, batch_idx: int) -> None:
        """Loss and accuracy on the whole graph, and the test accuracy where the validation is the best so far."""
        loss, accuracy = self._evaluate(batch, batch.val)
        metrics = {"val_loss": loss, "val_accuracy": accuracy}
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            if accuracy > self.best_val_accuracy:
                self.best_val_accuracy.copy_(accuracy)
                self.test_accuracy_at_best.copy_(self._accuracy(batch, batch.test))
            # Copies: what is logged is read later.
            metrics["train_accuracy"] = self._accuracy(batch, batch.train)
            metrics["best_val_accuracy"] = self.best_val_accuracy.clone()
            metrics["test_accuracy_at_best"] = self.test_accuracy_at_best.clone()
        shown = {"val_loss", "val_accuracy"}
        for name, value in metrics.items():
            # The same on every rank: each evaluates the whole graph.
            self.log(name, value, prog_bar=name in shown, batch_size=1, sync_dist=True)

    def test_step(self, batch: Graph, batch_idx: int) -> None:
        """Loss and accuracy of the test nodes."""
        loss, accuracy = self._evaluate(batch, batch.test)
        self.log_dict({"test_loss": loss, "test_accuracy": accuracy}, batch_size=1, sync_dist=True)

    def predict_step(self, batch: Graph, batch_idx: int) -> list[dict[str, Any]]:
        """`{"node": ..., "class": ..., "probability": ...}` of each node, by name where names are known."""
        probabilities, classes = self(batch).float().softmax(dim=1).max(dim=1)
        every = self.predict_split == "all"
        nodes = range(batch.num_nodes) if every else getattr(batch, self.predict_split).tolist()
        found, sure = classes.tolist(), probabilities.tolist()
        return [
            {
                "node": batch.node_names[node] if batch.node_names else node,
                "class": batch.class_names[found[node]] if batch.class_names else found[node],
                "probability": round(sure[node], 6),
            }
            for node in nodes
        ]

    def batch_units(self, batch: Graph) -> int:
        """Nodes of a batch."""
        return batch.num_nodes

    def summary(self) -> dict[str, str]:
        """Accuracies, beside what needs no network: the most frequent class, and labels that spread along edges."""
        lines: dict[str, str] = {}
        if self.best_val_accuracy >= 0:
            lines["best validation accuracy"] = f"{self.best_val_accuracy:.2%}"
            lines["test accuracy there"] = f"{self.test_accuracy_at_best:.2%}"
        if self._predicted is not None:
            graph = self._predicted[0]
            lines["graph"] = (
                f"{graph.num_nodes:,} nodes, {graph.edge_index.shape[1]:,} edges, {self._num_classes} classes"
            )
            lines["test accuracy of the most frequent class"] = f"{majority_accuracy(graph):.2%}"
            lines["test accuracy of label propagation"] = f"{propagation_accuracy(graph, self._num_classes):.2%}"
        return lines

    def pictures(self, folder: Path) -> dict[str, Path]:
        """Accuracies by step, and the test accuracy of each class after the last validation."""
        pictures = {"accuracy curve": draw_accuracy(folder)}
        if self._predicted is not None:
            pictures["accuracy by class"] = draw_classes(folder, *self._predicted)
        return pictures

    def _evaluate(self, graph: Graph, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss and accuracy of some nodes, from one pass over the graph."""
        logits = self(graph)
        self._predicted = (graph, logits.argmax(dim=1))
        return node_losses(logits[nodes], graph.y[nodes], self.loss).mean(), self._accuracy(graph, nodes)

    def _accuracy(self, graph: Graph, nodes: Tensor) -> Tensor:
        """Share of some nodes whose class the last pass found."""
        assert self._predicted is not None
        return (self._predicted[1][nodes] == graph.y[nodes]).float().mean()

    def _edges_of(self, graph: Graph) -> Tensor | None:
        if self.network.training and self.network.edge_dropout:
            return None  # the network makes its own of the edges that are left
        if not graph.whole:
            return self.network.edges(graph.edge_index, graph.num_nodes)
        if self._edges is None or self._edges[0] is not graph:
            with torch.inference_mode(False):  # a validation may come first, and training uses the same
                self._edges = (graph, self.network.edges(graph.edge_index, graph.num_nodes))
        return self._edges[1]


def _check_options(architecture: str, options: dict[str, Any]) -> None:
    """Raise where an option is out of range, or one that the architecture does not have."""
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
    """Raise where the options of label reuse do not fit each other."""
    if not 0 <= mask_rate < 1:
        raise ValueError(f"mask_rate is a share in [0, 1), got {mask_rate}")
    if label_iterations < 0:
        raise ValueError(f"label_iterations must be at least 0, got {label_iterations}")
    if label_reuse and not mask_rate:
        raise ValueError(
            "label_reuse gives the labels of the nodes that the loss leaves out, and mask_rate 0 leaves none out: set "
            "mask_rate, to 0.5 as in DGL's scripts"
        )
    if label_iterations and not label_reuse:
        raise ValueError("label_iterations continues label_reuse: set label_reuse true, or leave label_iterations out")
