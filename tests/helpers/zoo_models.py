"""Builders of the zoo's models that one class of a library does not give: `target: zoo_models.<function>` in the files.

Libraries are imported inside the builders, since not every one is always there.
"""

from typing import Any

from torch import Tensor, nn


def heterogeneous_transformer() -> nn.Module:
    """PyG's HGTConv on two kinds of nodes and three of edges; takes the features of either kind of node."""
    import torch
    from torch_geometric.nn import HGTConv

    kinds = ["paper", "author"]
    relations = [("author", "writes", "paper"), ("paper", "cites", "paper"), ("paper", "by", "author")]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = HGTConv(12, 12, (kinds, relations), heads=3)

        def forward(self, papers: Tensor, authors: Tensor) -> list[Tensor]:
            edges = torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]])
            outputs = self.conv({"paper": papers, "author": authors}, dict.fromkeys(relations, edges))
            return [outputs[kind] for kind in kinds]

    return Net()


def schnet(**arguments: Any) -> nn.Module:
    """PyG's SchNet with edges between all atoms, which needs no library for neighbours."""
    from torch_geometric.nn import SchNet

    def between_all(positions: Tensor, molecules: Tensor) -> tuple[Tensor, Tensor]:
        edges = (molecules[:, None] == molecules).fill_diagonal_(False).nonzero().T
        return edges, (positions[edges[0]] - positions[edges[1]]).norm(dim=-1)

    return SchNet(interaction_graph=between_all, **arguments)


def graph_net() -> nn.Module:
    """Two layers of PyG, one of attention: takes nodes' features and edges."""
    from torch_geometric.nn import GCNConv, TransformerConv

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = TransformerConv(6, 5, heads=3)
            self.second = GCNConv(15, 4)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return self.second(self.first(x, edge_index).relu(), edge_index)

    return Net()


def lora(base: nn.Module, **arguments: Any) -> nn.Module:
    """A model with adapters of peft: `arguments` are those of its LoraConfig."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(base, LoraConfig(**arguments))


def ia3(base: nn.Module, **arguments: Any) -> nn.Module:
    """A model whose activations peft scales: `arguments` are those of its IA3Config."""
    from peft import IA3Config, get_peft_model

    return get_peft_model(base, IA3Config(**arguments))
