"""Losses, and labels as input features: none may leak into what it is asked for."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("torch_geometric")

from lightning_adam_mini.tasks.graph import NodeClassifier
from lightning_adam_mini.tasks.graph.graph import Graph
from lightning_adam_mini.tasks.graph.node_classifier import (
    draw_training_nodes,
    node_losses,
    predict_with_labels,
)


@pytest.fixture
def graph():
    """Ten nodes, four of them for training; classes 0 to 2."""
    return Graph(
        x=torch.randn(10, 4),
        y=torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0]),
        edge_index=torch.randint(0, 10, (2, 30)),
        train=torch.tensor([1, 3, 5, 7]),
        val=torch.tensor([0, 2, 4]),
        test=torch.tensor([6, 8, 9]),
    )


def test_the_log_loss_is_the_scripts():
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
    plain = node_losses(logits, labels, "cross_entropy")
    epsilon = 1 - math.log(2)
    expected = torch.log(epsilon + plain) - math.log(epsilon)
    torch.testing.assert_close(node_losses(logits, labels, "log_cross_entropy"), expected)
    sure = 100 * nn.functional.one_hot(labels, 3)
    torch.testing.assert_close(node_losses(sure, labels, "log_cross_entropy"), torch.zeros(6))


def test_labels_are_given_for_training_nodes_alone(graph):
    assert draw_training_nodes(graph, 1.0).nonzero().flatten().tolist() == [1, 3, 5, 7]
    drawn = torch.stack([draw_training_nodes(graph, 0.5) for _ in range(200)])
    assert not drawn[:, [0, 2, 4, 6, 8, 9]].any()
    assert 0.4 < drawn[:, graph.train].float().mean() < 0.6


def test_inputs_hold_the_labels_that_are_given_and_no_other(graph):
    seen = []
    given = torch.zeros(10, dtype=torch.bool)
    given[[3, 7]] = True

    def predict(features):
        seen.append(features)
        return torch.arange(30.0).reshape(10, 3)

    predict_with_labels(predict, graph, given, num_classes=3)
    labels = seen[0][:, 4:]
    assert torch.equal(seen[0][:, :4], graph.x)
    assert labels.nonzero().tolist() == [[3, 0], [7, 1]]


def test_iterations_fill_in_probabilities_where_no_label_is_given(graph):
    seen = []
    given = draw_training_nodes(graph, 1.0)
    logits = torch.randn(10, 3)

    def predict(features):
        seen.append((features, torch.is_grad_enabled()))
        return logits

    predict_with_labels(predict, graph, given, num_classes=3, iterations=2)
    assert [gradients for _, gradients in seen] == [False, False, True]
    labels = seen[-1][0][:, 4:]
    torch.testing.assert_close(labels[~given], logits.softmax(1)[~given])
    assert torch.equal(labels[given], nn.functional.one_hot(graph.y, 3).float()[given])


def make_task(graph, **options):
    task = NodeClassifier(num_layers=1, batch_norm=False, dropout=0.0, **options)
    task.model = task._build(graph.x.shape[1], 3)
    task.log = lambda *args, **kwargs: None
    return task


def test_the_loss_asks_for_the_nodes_whose_labels_are_not_given(graph, monkeypatch):
    task = make_task(graph, label_reuse=True, mask_rate=0.5)
    given = torch.zeros(10, dtype=torch.bool)
    given[[3, 7]] = True
    monkeypatch.setattr("lightning_adam_mini.tasks.graph.node_classifier.draw_training_nodes", lambda *_: given)
    loss = task.training_step(graph, 0)
    expected = node_losses(task(graph, given), graph.y, "cross_entropy")[[1, 5]].mean()
    torch.testing.assert_close(loss, expected)


def test_labels_of_validation_and_test_never_matter(graph):
    """Neither in training nor in an evaluation: the logits stay, whatever they are."""
    task = make_task(graph, label_reuse=True, mask_rate=0.5, label_iterations=1)
    others = graph.y.clone()
    others[graph.val], others[graph.test] = 2 - graph.y[graph.val], 2 - graph.y[graph.test]
    changed = Graph(**{**graph.__dict__, "y": others})
    assert torch.equal(task(graph), task(changed))
    torch.manual_seed(0)
    one = task.training_step(graph, 0)
    torch.manual_seed(0)
    assert torch.equal(one, task.training_step(changed, 0))


def test_without_a_mask_the_loss_is_the_mean_over_all_training_nodes(graph):
    task = make_task(graph)
    expected = node_losses(task(graph), graph.y, "cross_entropy")[graph.train].mean()
    torch.testing.assert_close(task.training_step(graph, 0), expected)


def test_a_part_without_training_nodes_gives_no_loss_and_no_gradient_that_is_not_finite(graph):
    task = make_task(graph)
    nothing = Graph(**{**graph.__dict__, "train": graph.train[:0]})
    loss = task.training_step(nothing, 0)
    loss.backward()
    assert loss.item() == 0
    assert all(not parameter.grad.any() for parameter in task.parameters())


def test_the_loss_is_over_the_seeds_of_a_sampled_batch(graph):
    task = make_task(graph)
    sampled = Graph(**{**graph.__dict__, "seeds": torch.tensor([1, 3])})
    expected = node_losses(task(graph), graph.y, "cross_entropy")[[1, 3]].mean()
    torch.testing.assert_close(task.training_step(sampled, 0), expected)


@pytest.mark.parametrize(("whole", "rate", "made"), [(False, 0.5, 1), (False, 0.0, 1), (True, 0.5, 1), (True, 0.0, 0)])
def test_a_step_makes_one_matrix_of_the_edges_that_it_needs(graph, monkeypatch, whole, rate, made):
    """None where the whole graph's is known, and no second one where edges are dropped."""
    from lightning_adam_mini.tasks.graph import networks

    calls, own = [], networks.normalised_adjacency
    monkeypatch.setattr(networks, "normalised_adjacency", lambda *given: calls.append(1) or own(*given))
    task, given = make_task(graph, edge_dropout=rate), replace(graph, whole=whole)
    if whole:
        task.eval()(given)
        task.train()
        calls.clear()
    task.training_step(given, 0)
    assert len(calls) == made


def under_trainer(precision="32-true", num_neighbors=None, **options):
    task = NodeClassifier(**options)
    data = SimpleNamespace(num_neighbors=num_neighbors)
    task._trainer = SimpleNamespace(precision=precision, datamodule=data, strategy=None)
    return task


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "16-true"])
def test_a_precision_that_converts_batches_is_refused(precision):
    with pytest.raises(ValueError, match=rf"trainer\.precision {precision} .*: use 32-true or bf16-mixed"):
        under_trainer(precision).setup("fit")
    for other in ("32-true", "bf16-mixed", "16-mixed"):
        under_trainer(other).setup("fit")


def test_hops_are_as_many_as_layers():
    under_trainer(num_neighbors=[3, 2], num_layers=2).setup("fit")
    with pytest.raises(ValueError, match=r"data\.num_neighbors \[3, 2\] samples 2 hops, and the network has 3 layers"):
        under_trainer(num_neighbors=[3, 2], num_layers=3).setup("fit")


def test_pictures_are_in_percent(graph, tmp_path, monkeypatch):
    from lightning_adam_mini.tasks import plots
    from lightning_adam_mini.tasks.graph import node_classifier

    drawn = {}
    for module in (plots, node_classifier):
        monkeypatch.setattr(module, "save_figure", lambda figure, path: drawn.setdefault(path.name, figure.axes[0]))
    monkeypatch.setattr(node_classifier, "read_metrics", lambda folder: {"val_accuracy": {5: 0.25, 10: 0.75}})
    task = make_task(graph)
    task._predicted = (graph, graph.y)
    assert [path.name for path in task.pictures(tmp_path).values()] == list(drawn)
    assert drawn["accuracy_curve.png"].lines[0].get_ydata().tolist() == [25.0, 75.0]
    assert [bar.get_width() for bar in drawn["accuracy_by_class.png"].patches] == [
        100.0
    ] * 2  # test nodes have two classes


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"label_reuse": True}, "set mask_rate"),
        ({"label_iterations": 1}, "set label_reuse"),
        ({"mask_rate": 1.0}, "mask_rate is a fraction"),
        ({"dropout": 1.0}, "dropout is a probability"),
        ({"heads": 4}, "heads has no meaning in architecture gcn"),
        ({"architecture": "gat", "heads": 3}, "multiple of heads 3"),
        ({"architecture": "mlp", "residual": True}, "residual has no meaning"),
        ({"architecture": "mlp", "edge_dropout": 0.1}, "edge_dropout has no meaning"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused_with_the_remedy(options, remedy):
    with pytest.raises(ValueError, match=remedy):
        NodeClassifier(**options)
