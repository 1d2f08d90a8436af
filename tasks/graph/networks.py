"""Networks for nodes, from torch_geometric's models; this module imports it, and is imported where one is built.

Shapes: `N` nodes, `F` features, `E` edges, `C` classes.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch_geometric.nn.conv.gcn_conv import GCNConv, gcn_norm
from torch_geometric.nn.models import GAT, GCN, MLP
from torch_geometric.utils import add_remaining_self_loops, dropout_edge

__all__ = ["Architecture", "NodeNetwork", "normalised_adjacency"]

Architecture = Literal["gcn", "gat", "mlp"]


class NodeNetwork(nn.Module):
    """Features and edges to logits of every node.

    torch_geometric's GCN, GAT or MLP, with dropout of input features and edges before it. Layers that a batch norm
    follows have no bias.

    Args:
        architecture: Which one.
        num_features: F.
        num_classes: C.
        num_layers: Layers, the last one included.
        hidden_size: Width of the other layers, over all heads together.
        heads: Attention heads of all layers but the last, which has one.
        batch_norm: Normalise between layers.
        residual: Add a linear map of the layer's input to its output.
        input_dropout: Of features.
        dropout: After each layer but the last.
        attention_dropout: Of attention weights.
        edge_dropout: Share of the edges that a training step leaves out.
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
        """What the layers make of edges: the same in every step, as long as none is dropped.

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
            edges: What `edges` makes of them, where it is known.
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
    """GCN's propagation matrix, degrees normalised with self-loops: `(N, N)`, sparse by rows, which are targets.

    torch_geometric multiplies by it without a message for each edge: five times faster on a CPU, and without `E x F`
    numbers in memory.

    Args:
        edge_index: `(2, E)`.
        num_nodes: N.
    """
    index, weight = gcn_norm(edge_index, None, num_nodes, dtype=torch.float32)
    adjacency = torch.sparse_coo_tensor(index.flip(0), weight, (num_nodes, num_nodes), check_invariants=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls this layout a beta, once a process
        return adjacency.coalesce().to_sparse_csr()


class _GCN(GCN):
    """torch_geometric's GCN on a propagation matrix, with a linear skip around each layer where asked for."""

    def init_conv(self, in_channels: int, out_channels: int, *, residual: bool) -> nn.Module:
        conv = _Conv(in_channels, out_channels, normalize=False, bias=_has_bias(self))
        return _Residual(conv, in_channels, out_channels) if residual else conv


class _Conv(GCNConv):
    """torch_geometric's GCNConv, its sparse product in float32: torch has none in half precision on the CPU."""

    def message_and_aggregate(self, adj_t: Tensor, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().message_and_aggregate(adj_t, x.float()).to(x.dtype)


class _GAT(GAT):
    """torch_geometric's GAT, with one head in the last layer, and a dropout for attention of its own."""

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
        conv.dropout = attention_dropout  # GAT itself drops attention weights at the rate of features
        return conv


class _Residual(nn.Module):
    def __init__(self, conv: nn.Module, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = conv
        self.linear = nn.Linear(in_channels, out_channels, bias=False)

    def forward(self, x: Tensor, edges: Tensor, **kwargs: Any) -> Tensor:
        return self.conv(x, edges, **kwargs) + self.linear(x)


def _is_last(network: Any) -> bool:
    return getattr(network, "_is_conv_to_out", False)  # set while the last layer is made, as GAT itself reads it


def _has_bias(network: Any) -> bool:
    return _is_last(network) or network.norm is None  # a batch norm takes away what a bias adds
