"""Batches of a graph, and what is checked before any step."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("torch_geometric")

from lightning_adam_mini.tasks.graph.data import OgbArxiv
from lightning_adam_mini.tasks.graph.data.module import NeighborBatches, RandomParts, WholeGraph, cached_graph
from lightning_adam_mini.tasks.graph.graph import Graph
from tiny_graphs import write_ogb


@pytest.fixture
def graph():
    """23 nodes, whose only feature is their number."""
    order = torch.randperm(23)
    return Graph(
        x=torch.arange(23.0)[:, None],
        y=torch.arange(23) % 3,
        edge_index=torch.randint(0, 23, (2, 90)),
        train=order[:11],
        val=order[11:17],
        test=order[17:],
    )


@pytest.fixture
def module(tmp_path):
    """A data module on a small graph in OGB's layout."""
    write_ogb(tmp_path / "data")

    def make(**options):
        return OgbArxiv(path=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"), **options)

    return make


def numbers(part):
    return part.x.flatten().long()


def test_the_parts_of_an_epoch_hold_each_node_once(graph):
    parts = RandomParts(graph, num_parts=4, seed=0)
    for epoch in range(3):
        nodes = torch.cat([numbers(parts[4 * epoch + part]) for part in range(4)])
        assert nodes.sort().values.tolist() == list(range(23))


def test_a_part_has_all_edges_between_its_nodes_and_its_share_of_the_splits(graph):
    part = RandomParts(graph, num_parts=3, seed=0)[1]
    nodes = numbers(part)
    inside = torch.isin(graph.edge_index, nodes).all(0)
    assert nodes[part.edge_index].tolist() == graph.edge_index[:, inside].tolist()
    assert torch.equal(part.y, graph.y[nodes])
    for split in ("train", "val", "test"):
        expected = [node for node in getattr(graph, split).tolist() if node in nodes]
        assert nodes[getattr(part, split)].tolist() == expected
    assert not part.whole


def test_parts_depend_on_seed_and_number_alone(graph):
    def drawn(seed, order):
        parts = RandomParts(graph, num_parts=4, seed=seed)
        return {number: numbers(parts[number]).tolist() for number in order}

    forwards, backwards = drawn(0, range(12)), drawn(0, reversed(range(12)))
    assert forwards == backwards
    assert forwards != drawn(1, range(12))
    assert [forwards[number] for number in range(4)] != [forwards[number] for number in range(4, 8)]


def test_the_whole_graph_is_moved_once(module):
    data = module()
    data.setup("fit")
    (first,), (second,) = list(data.val_dataloader()), list(data.val_dataloader())
    moved = [data.transfer_batch_to_device(batch, torch.device("meta"), 0) for batch in (first, second)]
    assert moved[0] is moved[1]
    assert moved[0].x.is_meta
    assert len(list(data.train_dataloader())) == 1


def test_a_part_is_moved_each_time(module):
    data = module(sampling="parts", num_parts=3)
    data.setup("fit")
    parts = [data.transfer_batch_to_device(part, torch.device("cpu"), 0) for part in data.train_dataloader()]
    assert [part.num_nodes for part in parts] == [20, 20, 20]
    assert len({part.x.sum().item() for part in parts}) == 3


def test_neighbours_without_a_compiled_sampler_name_the_package(module, monkeypatch):
    monkeypatch.setattr("lightning_adam_mini.tasks.graph.graph.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pyg-lib .*or use data\.sampling parts"):
        module(sampling="neighbors")


def test_neighbours_are_sampled_where_the_package_is_there(graph):
    typing = pytest.importorskip("torch_geometric.typing")
    if not (typing.WITH_PYG_LIB or typing.WITH_TORCH_SPARSE):
        pytest.skip("needs pyg-lib or torch-sparse")
    batches = NeighborBatches(graph, num_neighbors=[3, 2], batch_size=4, seed=0)
    seeds = torch.cat([numbers(batch)[batch.seeds] for batch in (batches[number] for number in range(3))])
    assert seeds.sort().values.tolist() == graph.train.sort().values.tolist()
    again = NeighborBatches(graph, num_neighbors=[3, 2], batch_size=4, seed=0)[2]
    assert torch.equal(numbers(again), numbers(batches[2]))
    edges = set(map(tuple, graph.edge_index.T.tolist()))
    assert {tuple(edge) for edge in numbers(again)[again.edge_index].T.tolist()} <= edges
    assert set(numbers(again)[again.train].tolist()) <= set(graph.train.tolist())


def test_batches_of_neighbours_follow_the_seed(graph, monkeypatch):
    """With a sampler in the place of the compiled one: seeds first, then nodes drawn from torch's generator."""

    class Sampled:
        def __init__(self, nodes):
            self.x, self.y = graph.x[nodes], graph.y[nodes]
            self.edge_index = torch.zeros(2, 0, dtype=torch.int64)
            self.is_train = torch.isin(nodes, graph.train)

    sampler = staticmethod(lambda positions: Sampled(torch.cat([graph.train[positions], torch.randint(0, 23, (5,))])))
    monkeypatch.setattr(NeighborBatches, "_loader", sampler)
    batches = NeighborBatches(graph, num_neighbors=[2], batch_size=4, seed=0)
    drawn = [batches[number] for number in range(6)]
    for epoch in (drawn[:3], drawn[3:]):
        seeds = torch.cat([numbers(batch)[batch.seeds] for batch in epoch])
        assert seeds.sort().values.tolist() == graph.train.sort().values.tolist()
    assert [numbers(batches[number]).tolist() for number in (4, 1)] == [numbers(drawn[n]).tolist() for n in (4, 1)]
    assert numbers(drawn[0]).tolist() != numbers(drawn[3]).tolist()


@pytest.mark.filterwarnings("ignore:Using 'NeighborSampler' without a 'pyg-lib'")
def test_the_sampler_is_asked_for_every_training_node_once_an_epoch(graph, monkeypatch):
    """Through torch_geometric's own loader, whose sampler alone is compiled: it gets the nodes without neighbours."""
    from torch_geometric.sampler import SamplerOutput

    def without_neighbours(inputs):
        none = inputs.node.new_empty(0)
        return SamplerOutput(node=inputs.node, row=none, col=none, edge=none, metadata=(inputs.input_id, inputs.time))

    batches = NeighborBatches(graph, num_neighbors=[2], batch_size=4, seed=0)
    monkeypatch.setattr(batches._loader.node_sampler, "sample_from_nodes", without_neighbours)
    for epoch in range(2):
        drawn = [batches[3 * epoch + number] for number in range(3)]
        assert [batch.num_nodes for batch in drawn] == [4, 4, 3]
        seeds = torch.cat([numbers(batch)[batch.seeds] for batch in drawn])
        assert seeds.sort().values.tolist() == graph.train.sort().values.tolist()
        for batch in drawn:
            assert torch.equal(batch.y, graph.y[numbers(batch)])
            assert len(batch.train) == batch.num_nodes


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"edge_index": torch.tensor([[0], [23]])}, "an edge names 23, but there are 23 nodes"),
        ({"y": torch.full((23,), 3)}, "a label names 3, but there are 3 classes"),
        ({"train": torch.tensor([-1, 2])}, "the training split names -1"),
        ({"val": torch.tensor([], dtype=torch.int64)}, "the validation split is empty"),
        ({"x": torch.full((23, 1), float("nan"))}, "not finite"),
    ],
)
def test_a_graph_that_does_not_fit_together_is_refused(graph, changed, told):
    with pytest.raises(ValueError, match=told):
        replace(graph, **changed).check("mine", 3)
    graph.check("mine", 3)


def test_splits_that_share_a_node_are_refused(graph):
    node = int(graph.train[0])
    with pytest.raises(ValueError, match=f"node {node} is twice in the splits"):
        replace(graph, test=torch.cat([graph.test, graph.train[:1]])).check("mine", 3)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_workers": 2}, "leave `num_workers` out"),
        ({"num_parts": 0}, "at least 1"),
        ({"seed": -1}, "`seed` must be at least 0"),
        ({"num_parts": 3}, "`num_parts` is for sampling parts, but sampling is full: leave it out"),
        ({"num_neighbors": [3]}, r"or set data\.sampling neighbors"),
        ({"sampling": "parts", "seed_nodes": 3}, "`seed_nodes` is for sampling neighbors"),
        ({"num_neighbors": []}, "`num_neighbors` is a number for each hop"),
        ({"num_neighbors": [3, 0]}, "`num_neighbors` is a number for each hop"),
    ],
)
def test_settings_out_of_range_are_refused(module, options, told):
    with pytest.raises(ValueError, match=told):
        module(**options)


def test_more_parts_than_there_are_pairs_of_nodes_are_refused(module):
    data = module(sampling="parts", num_parts=31)
    with pytest.raises(ValueError, match=r"at most 30"):
        data.setup("fit")


def test_a_prepared_graph_is_read_and_a_damaged_one_made_again(graph, tmp_path):
    calls = []

    def prepare():
        calls.append(1)
        return graph

    def get(key):
        return cached_graph(tmp_path, "mine", key, prepare)

    for key in ("one", "one", "two"):
        assert torch.equal(get(key).edge_index, graph.edge_index)
    assert len(calls) == 2
    for file in (tmp_path / "graph").glob("*.pt"):
        file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(get("one").train, graph.train)
    assert len(calls) == 3


def test_the_whole_graph_is_the_same_object_under_every_number(graph):
    whole = WholeGraph(graph)
    assert whole[0] is whole[7]
    assert whole[0].whole
