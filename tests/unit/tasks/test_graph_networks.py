"""The networks: what they are made of, and that the propagation matrix is the paper's."""

import pytest
import torch

pytest.importorskip("torch_geometric")

from lightning_adam_mini.factory import AdamMini
from lightning_adam_mini.tasks.graph.networks import NodeNetwork, normalised_adjacency

DGL = {"num_layers": 3, "hidden_size": 256, "batch_norm": True}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture
def graph():
    """Features and edges of 30 nodes; node 29 has none."""
    return torch.randn(30, 8), torch.randint(0, 29, (2, 120))


@pytest.mark.parametrize(
    ("label_inputs", "residual", "parameters"),
    [(0, False, 109_608), (0, True, 218_152), (40, False, 119_848), (40, True, 238_632)],
)
def test_a_gcn_has_the_parameters_that_dgl_tells_for_ogbn_arxiv(label_inputs, residual, parameters):
    assert count(NodeNetwork("gcn", 128 + label_inputs, 40, residual=residual, **DGL)) == parameters


def test_a_gat_has_dgls_parameters_and_the_attention_of_targets():
    """DGL tells 1,441,580 for a GAT without attention of targets: 3 x 250 numbers in two layers, 40 in the last."""
    network = NodeNetwork("gat", 168, 40, num_layers=3, hidden_size=750, heads=3, residual=True)
    assert count(network) == 1_441_580 + 2 * 750 + 40


def test_the_last_layer_of_a_gat_has_one_head():
    network = NodeNetwork("gat", 8, 3, num_layers=3, hidden_size=12, heads=4)
    assert [conv.heads for conv in network.body.convs] == [4, 4, 1]
    assert [tuple(conv.att_src.shape) for conv in network.body.convs] == [(1, 4, 3), (1, 4, 3), (1, 1, 3)]


def test_the_propagation_matrix_is_kipf_and_wellings(graph):
    _, edges = graph
    edges = torch.unique(edges, dim=1)
    edges = edges[:, edges[0] != edges[1]]
    dense = torch.zeros(30, 30)
    dense[edges[1], edges[0]] = 1.0  # rows are targets
    dense += torch.eye(30)
    degree = dense.sum(1)
    expected = dense / (degree[:, None] * degree[None, :]).sqrt()
    torch.testing.assert_close(normalised_adjacency(edges, 30).to_dense(), expected)


def test_a_gcn_equals_torch_geometrics_own_on_messages(graph):
    from torch_geometric.nn import GCNConv

    x, edges = graph
    network = NodeNetwork("gcn", 8, 3, num_layers=1, hidden_size=4)
    own = GCNConv(8, 3)
    own.load_state_dict(network.body.convs[0].state_dict())
    one, other = network(x, edges), own(x, edges)
    torch.testing.assert_close(one, other)
    gradients = [
        torch.autograd.grad(out.square().sum(), conv.lin.weight)
        for out, conv in ((one, network.body.convs[0]), (other, own))
    ]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["gcn", "gat"])
def test_a_residual_layer_adds_a_linear_map_of_its_input(architecture, graph):
    x, edges = graph
    network = NodeNetwork(architecture, 8, 3, num_layers=1, hidden_size=4, residual=True)
    (conv,) = network.body.convs
    linear = conv.linear if architecture == "gcn" else conv.res
    whole = network(x, edges)
    skip = linear(x)
    torch.nn.init.zeros_(linear.weight)
    torch.testing.assert_close(whole, network(x, edges) + skip)


@pytest.mark.parametrize("architecture", ["gcn", "gat", "mlp"])
def test_known_edges_change_nothing(architecture, graph):
    x, edges = graph
    network = NodeNetwork(architecture, 8, 3, num_layers=2, hidden_size=4).eval()
    torch.testing.assert_close(network(x, edges, network.edges(edges, 30)), network(x, edges))


@pytest.mark.parametrize("architecture", ["gcn", "gat"])
def test_edges_are_dropped_in_training_alone(architecture, graph):
    x, edges = graph
    network = NodeNetwork(architecture, 8, 3, num_layers=2, hidden_size=4, batch_norm=False, edge_dropout=0.5)
    known = network.edges(edges, 30)
    assert not torch.equal(network(x, edges, known), network(x, edges, known))
    network.eval()
    assert torch.equal(network(x, edges, known), network(x, edges, known))


def test_an_mlp_sees_no_edges(graph):
    x, edges = graph
    network = NodeNetwork("mlp", 8, 3, num_layers=2, hidden_size=4).eval()
    assert torch.equal(network(x, edges), network(x, edges[:, :1]))


@pytest.mark.parametrize("architecture", ["gcn", "gat", "mlp"])
def test_a_network_trains_in_bfloat16(architecture, graph):
    x, edges = graph
    network = NodeNetwork(architecture, 8, 3, num_layers=2, hidden_size=4)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(x, edges)
    logits.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
    torch.testing.assert_close(logits.float(), network(x, edges), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("architecture", ["gcn", "gat"])
def test_each_tensor_is_one_block_by_default(architecture):
    network = NodeNetwork(architecture, 8, 3, num_layers=3, hidden_size=12, residual=True)
    optimizer = AdamMini().build(network)
    moments = [optimizer.state[parameter]["exp_avg_sq"].numel() for parameter in network.parameters()]
    assert moments == [1] * len(moments)
