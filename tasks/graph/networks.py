"""Networks for node classification, from torch_geometric's models; imported only when a network is built.

Shapes: `N` nodes, `F` features, `E` edges, `C` classes.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch_geometric.nn.conv.gcn_conv import GCNConv, gcn_norm
from torch_geometric.nn.models import GAT, GCN, MLP
from torch_geometric.utils import add_remaining_self_loops, dropout_edge, to_torch_csr_tensor

__all__ = ["Architecture", "NodeNetwork", "normalised_adjacency"]

Architecture = Literal["gcn", "gat", "mlp"]


class NodeNetwork(nn.Module):
    """torch_geometric's GCN, GAT or MLP, with dropout of input features and edges: logits of every node.

    Layers that are followed by a batch norm have no bias.

    Args:
        architecture: The model.
        num_features: F.
        num_classes: C.
        num_layers: Number of layers, the last one included.
        hidden_size: Width of all layers but the last, over all heads together.
        heads: Attention heads of all layers but the last, which has one.
        batch_norm: Use batch norm between layers.
        residual: Add a linear map of the layer's input to its output.
        input_dropout: Dropout of input features.
        dropout: Dropout after each layer but the last.
        attention_dropout: Dropout of attention weights.
        edge_dropout: Fraction of the edges that a training step drops.
    """

    def __init__(
        self,
        architecture: Architecture,
        num_features: int,
        num_classes: int,
        *,
        num_layers: int,
        hidden_size: int,
        heads: int = 1,
        batch_norm: bool = True,
        residual: bool = False,
        input_dropout: float = 0.0,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        edge_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.edge_dropout = edge_dropout
        self.input_dropout = nn.Dropout(input_dropout)
        shape = (num_features, hidden_size, num_layers, num_classes)
        options: dict[str, Any] = {"dropout": dropout, "norm": "batch_norm" if batch_norm else None}
        if architecture == "gcn":
            self.body = _GCN(*shape, **options, residual=residual)
        elif architecture == "gat":
            self.body = _GAT(*shape, **options, residual=residual, heads=heads, attention_dropout=attention_dropout)
        else:
            widths = [num_features, *[hidden_size] * (num_layers - 1), num_classes]
            bias = [not batch_norm] * (num_layers - 1) + [True]
            self.body = MLP(widths, **options, bias=bias)

    def edges(self, edge_index: Tensor, num_nodes: int) -> Tensor | None:
        """The edges in the form that the layers take, which can be reused as long as no edges are dropped.

        Args:
            edge_index: `(2, E)`.
            num_nodes: N.
        """
        if self.architecture == "mlp":
            return None
        if self.architecture == "gcn":
            return normalised_adjacency(edge_index, num_nodes)
        return add_remaining_self_loops(edge_index, num_nodes=num_nodes)[0]

    def forward(self, x: Tensor, edge_index: Tensor, edges: Tensor | None = None) -> Tensor:
        """Logits `(N, C)`.

        Args:
            x: Features `(N, F)`.
            edge_index: `(2, E)`.
            edges: The result of `edges`, if it is known.
        """
        x = self.input_dropout(x)
        if self.architecture == "mlp":
            return self.body(x)
        if self.training and self.edge_dropout:
            edges = self.edges(dropout_edge(edge_index, p=self.edge_dropout)[0], len(x))
        elif edges is None:
            edges = self.edges(edge_index, len(x))
        return self.body(x, edges)


def normalised_adjacency(edge_index: Tensor, num_nodes: int) -> Tensor:
    """GCN's normalised adjacency with self-loops: `(N, N)` in CSR format, with targets as rows.

    torch_geometric multiplies by it without a message per edge: five times faster on a CPU, and without `E x F` numbers
    in memory.

    Args:
        edge_index: `(2, E)`.
        num_nodes: N.
    """
    index, weight = gcn_norm(edge_index, None, num_nodes, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns that CSR is in beta and that nothing is checked
        return to_torch_csr_tensor(index.flip(0), weight, size=(num_nodes, num_nodes))


class _GCN(GCN):
    """torch_geometric's GCN on a normalised adjacency, with optional linear skip connections around its layers."""

    def init_conv(self, in_channels: int, out_channels: int, *, residual: bool) -> nn.Module:
        conv = _Conv(in_channels, out_channels, normalize=False, bias=_has_bias(self))
        return _Residual(conv, in_channels, out_channels) if residual else conv


class _Conv(GCNConv):
    """torch_geometric's GCNConv with a sparse product in float32: torch has none in half precision on the CPU."""

    def message_and_aggregate(self, adj_t: Tensor, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().message_and_aggregate(adj_t, x.float()).to(x.dtype)


class _GAT(GAT):
    """torch_geometric's GAT with one head in the last layer, and a separate dropout for attention."""

    def init_conv(
        self, in_channels: int, out_channels: int, *, heads: int, residual: bool, attention_dropout: float
    ) -> nn.Module:
        conv = super().init_conv(
            in_channels,
            out_channels,
            heads=1 if _is_last(self) else heads,
            residual=residual,
            bias=_has_bias(self),
            add_self_loops=False,
        )
        conv.dropout = attention_dropout  # GAT itself uses the dropout rate of the features
        return conv


class _Residual(nn.Module):
    def __init__(self, conv: nn.Module, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = conv
        self.linear = nn.Linear(in_channels, out_channels, bias=False)

    def forward(self, x: Tensor, edges: Tensor, **kwargs: Any) -> Tensor:
        return self.conv(x, edges, **kwargs) + self.linear(x)


def _is_last(network: Any) -> bool:
    return getattr(network, "_is_conv_to_out", False)  # torch_geometric sets it while it makes the last layer


def _has_bias(network: Any) -> bool:
    return _is_last(network) or network.norm is None  # a batch norm cancels a bias before it
