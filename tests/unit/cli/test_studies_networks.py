"""Studies that train: their tasks, BAGM's rule, and what they claim, at sizes of seconds."""

import itertools
import math
import random

import pytest
import torch
from torch import Generator, nn
from torch.testing import assert_close

pytest.importorskip("jsonargparse")
pytest.importorskip("lightning")
pytest.importorskip("matplotlib")

from lightning_adam_mini.cli.studies import leave_x_out, sensitivity, trajectories
from lightning_adam_mini.cli.studies.blockwise_gd import BAGM
from lightning_adam_mini.cli.studies.common.training import DivergedError, TextSizes, TextTask, best_rate, train
from lightning_adam_mini.cli.studies.heterogeneous_mlp import ScaledPerceptron
from study_outcomes import claims_of, outcome_of

SMALL = ("width=16", "layers=1", "heads=2", "context=16", "batch_size=8", "validation_windows=64")


def naive_bagm(weights, gradients, *, lr, beta1, beta2, eps):
    """The rule as its equations have it, with weights and their look-ahead apart."""
    momentum, square = torch.zeros_like(weights), 0.0
    for step, gradient_at in enumerate(gradients, 1):
        gradient = gradient_at(weights + beta1 * momentum)
        square = beta2 * square + (1 - beta2) * float((gradient * gradient).mean())
        rate = lr * math.sqrt(1 - beta2**step)
        momentum = beta1 * momentum - rate * gradient / (math.sqrt(square) + eps)
        weights = weights + momentum
    return weights + beta1 * momentum


def test_bagm_is_nesterovs_momentum_with_one_second_moment_a_block():
    hessians = [torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)) * scale for scale in (1, 30)]
    starts = [torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), torch.tensor([3.0, 0.1, -1.0], dtype=torch.float64)]
    parameters = [nn.Parameter(start.clone()) for start in starts]
    optimizer = BAGM(parameters, lr=0.03, betas=(0.8, 0.97), eps=1e-3)
    for _ in range(4):
        for parameter, hessian in zip(parameters, hessians, strict=True):
            parameter.grad = hessian @ parameter.detach()
        optimizer.step()
    for parameter, start, hessian in zip(parameters, starts, hessians, strict=True):
        gradients = [lambda weights, hessian=hessian: hessian @ weights] * 4
        expected = naive_bagm(start, gradients, lr=0.03, beta1=0.8, beta2=0.97, eps=1e-3)
        assert_close(parameter.detach(), expected)
        assert optimizer.state[parameter]["exp_avg_sq"].shape == ()


def test_bagm_decays_weights_through_the_gradient():
    with_decay, by_hand = (nn.Parameter(torch.tensor([1.0, 2.0])) for _ in range(2))
    with_decay.grad, by_hand.grad = torch.tensor([0.5, 0.1]), torch.tensor([0.5, 0.1]) + 0.2 * by_hand.detach()
    BAGM([with_decay], lr=0.1, weight_decay=0.2).step()
    BAGM([by_hand], lr=0.1).step()
    assert_close(with_decay, by_hand)
    assert_close(with_decay.grad, torch.tensor([0.5, 0.1]))


def test_factors_of_layers_leave_the_function_and_scale_its_gradients():
    factors = [0.1, 1.0, 30.0]
    plain, scaled = (ScaledPerceptron(5, f, Generator().manual_seed(0)).double() for f in ([1.0] * 3, factors))
    images = torch.randn(4, 784, dtype=torch.float64)
    assert_close(scaled(images), plain(images), rtol=1e-5, atol=1e-5)
    for model in (plain, scaled):
        model(images).square().sum().backward()
    for one, other, factor in zip(plain.weights, scaled.weights, factors, strict=True):
        assert_close(other.grad, one.grad / factor, rtol=1e-4, atol=1e-5)


def test_a_text_batch_depends_on_seed_and_step_alone():
    sizes = TextSizes(width=8, layers=1, heads=2, context=12, batch_size=3, validation_windows=4)
    task, again = TextTask(sizes), TextTask(sizes)
    assert task.batch(0, 5).shape == (3, 13)
    assert torch.equal(task.batch(0, 5), again.batch(0, 5))
    assert not torch.equal(task.batch(0, 5), task.batch(0, 6))
    assert not torch.equal(task.batch(0, 5), task.batch(1, 5))
    models = [task.build(seed) for seed in (0, 0, 1)]
    same, equal, other = (nn.utils.parameters_to_vector(model.parameters()) for model in models)
    assert torch.equal(same, equal)
    assert not torch.equal(same, other)
    assert task.validation_loss(models[0]) == again.validation_loss(models[1])
    assert task.validation_loss(models[0]) == pytest.approx(math.log(256), abs=0.3)


def test_a_window_longer_than_the_text_is_refused():
    sizes = TextSizes(width=8, layers=1, heads=2, context=10**9, batch_size=3, validation_windows=4)
    with pytest.raises(ValueError, match="context 1000000000 is longer than the text: give up to"):
        TextTask(sizes).batch(0, 0)


def test_training_ends_where_the_loss_is_not_finite():
    model = nn.Linear(2, 1)
    seen = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = lambda step: model(torch.ones(2)).sum() * (math.nan if step == 3 else 1)  # noqa: E731
    with pytest.raises(DivergedError, match="loss after 3 steps is nan; set a smaller rate"):
        train(model, [optimizer], losses, steps=5, observe=seen.append)
    assert seen == [0, 1, 2, 3]


def test_a_weight_that_the_last_step_loses_is_no_end_of_training():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e38)
    with pytest.raises(DivergedError, match="a weight after 1 steps is not finite"):
        train(model, [optimizer], lambda _: model(torch.ones(2)).sum() * 1e20, steps=1)


def test_training_trains_with_every_optimizer_to_the_end_of_the_schedule():
    model = nn.Linear(2, 1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizers = [torch.optim.SGD([parameter], lr=0.1) for parameter in model.parameters()]
    seen = []
    train(model, optimizers, lambda _: model(torch.ones(2)).square().sum(), steps=4, clip=1.0, observe=seen.append)
    assert seen == [0, 1, 2, 3, 4]
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(optimizer.param_groups[0]["lr"] == 0 for optimizer in optimizers)


def test_the_best_rate_and_whether_it_is_at_the_end_of_the_grid():
    assert best_rate({0.1: 2.0, 0.2: 1.0, 0.3: 5.5}) == (0.2, True)
    assert best_rate({0.1: 2.0, 0.2: 1.0}) == (0.2, False)
    assert best_rate({0.1: 2.0, 0.2: 1.0}, larger_is_better=True) == (0.1, False)


@pytest.mark.slow
def test_sgd_falls_where_layers_are_heterogeneous_and_adam_does_not():
    pytest.importorskip("mlxtend")
    sizes = ("seeds=[0,1]", "heterogeneity=[1,300]", "width=32", "steps=250", "batch_size=32")
    rates = ("sgd_rates=[0.01,0.03]", "adam_rates=[0.01,0.03]")
    outcome = outcome_of("heterogeneous_mlp", *sizes, *rates)
    assert claims_of(outcome, "SGD loses more than 5 %")[0].holds
    assert claims_of(outcome, "SGD loses at least 3 times what Adam loses")[0].holds
    accuracy = {(line["optimizer"], line["heterogeneity"]): line["accuracy"] for line in outcome.summary}
    assert accuracy["Adam", 300] > accuracy["SGD", 300] + 0.05
    assert accuracy["AdamMini", 300] > accuracy["SGD", 300] + 0.05


@pytest.mark.slow
def test_one_rate_a_block_is_left_out_of_adam():
    """With a factor of nearly 0 the left-out block does not train, and the loss shows it."""
    sizes = (*SMALL, "seeds=[0,1]", "steps=12", "more_out=[2]", "draws=1", "adam_rates=[0.03]")
    frozen, trained = (outcome_of("leave_x_out", *sizes, f"factors=[{factor}]") for factor in (1e-9, 1.0))
    head = [{row["blocks"]: row["gain"] for row in outcome.rows}["lm_head.weight"] for outcome in (frozen, trained)]
    assert head[0] < head[1] - 0.05
    assert {row["left_out"] for row in trained.rows} == {1, 2}
    assert {row["seed"] for row in trained.rows} == {1}
    (adam,) = {row["adam_loss"] for row in trained.rows}
    assert all(row["gain"] == adam - row["loss"] for row in trained.rows)


def test_choices_are_drawn_once_each_and_only_if_there_are_so_many():
    names = ["a", "b", "c", "d"]
    pairs = leave_x_out._choices(names, 2, 6, random.Random(0))
    assert sorted(pairs) == list(itertools.combinations(names, 2))
    with pytest.raises(ValueError, match="more_out 2: there are fewer than 7 choices among 4 blocks"):
        leave_x_out._choices(names, 2, 7, random.Random(0))


def test_more_blocks_than_there_are_is_refused_before_the_work(monkeypatch):
    monkeypatch.setattr(leave_x_out, "final_loss", lambda *_: pytest.fail("the work began"))
    with pytest.raises(ValueError, match="more_out 50: there are fewer than 4 choices among 9 blocks"):
        outcome_of("leave_x_out", *SMALL, "more_out=[50]")


def test_a_probe_that_diverges_is_no_probe():
    with pytest.raises(DivergedError, match="set a smaller rate"):
        outcome_of("blockwise_gd", *SMALL, "steps=20", "probe_rate=1e30")


@pytest.mark.slow
def test_adam_mini_stays_nearer_to_adamw_than_most():
    pytest.importorskip("pytorch_optimizer")
    outcome = outcome_of("trajectories", *SMALL, "seeds=[0]", "steps=30", "every=10", "rate=0.003")
    end = {line["optimizer"]: line["relative"] for line in outcome.summary}
    assert end["AdamW"] == 0
    for name in ("SM3", "LAMB", "CAME"):
        assert end["Adam-mini"] < end[name]


def test_distances_are_those_of_the_weights(monkeypatch):
    """An optimizer that is AdamW itself is at distance 0 all along."""
    from lightning_adam_mini.factory import SGD, AdamMini, AdamW

    twins = {
        trajectories.MINI: AdamW(lr=0.003, weight_decay=0.0),
        "elements": AdamMini(lr=0.003, weight_decay=0.0, partition="element"),
        **dict.fromkeys((trajectories.SCALED, "CAME", "SM3", "LAMB", "Lion"), SGD(lr=0.1, weight_decay=0.0)),
    }
    monkeypatch.setattr(trajectories, "_factories", lambda rate: twins)
    outcome = outcome_of("trajectories", *SMALL, "seeds=[0]", "steps=6", "every=2", "rate=0.003")
    distance = {(row["optimizer"], row["step"]): row["distance"] for row in outcome.rows}
    assert [distance[trajectories.MINI, step] for step in (0, 2, 4, 6)] == [0, 0, 0, 0]
    assert 0 <= distance["elements", 6] < 1e-3 < distance["SM3", 6]
    assert [claim.holds for claim in outcome.claims] == [True, True]


def test_the_last_step_is_measured_whatever_the_interval():
    pytest.importorskip("pytorch_optimizer")
    outcome = outcome_of("trajectories", *SMALL, "seeds=[0]", "steps=5", "every=2")
    assert [row["step"] for row in outcome.rows if row["optimizer"] == "AdamW"] == [0, 2, 4, 5]
    distance = {row["step"]: row["distance"] for row in outcome.rows if row["optimizer"] == trajectories.MINI}
    (line,) = [line for line in outcome.summary if line["optimizer"] == trajectories.MINI]
    assert line["distance"] == distance[5] != distance[4]


@pytest.mark.slow
def test_sensitivity_is_measured_cell_by_cell():
    outcome = outcome_of(
        "sensitivity", *SMALL, "seeds=[0]", "steps=25", "rates=[0.0001,0.03]", "beta2s=[0.95]", "epss=[1e-8]"
    )
    loss = {(row["optimizer"], row["rate"]): row["loss"] for row in outcome.rows}
    assert len(loss) == 4
    for name in sensitivity.OPTIMIZERS:
        assert loss[name, 0.03] < loss[name, 0.0001] - 0.5
    assert "50 % of cells" in claims_of(outcome, "no fewer cells")[0].measured


@pytest.mark.slow
def test_adaptive_rates_a_block_beat_one_rate():
    rates = ("rates=[0.01,0.03]", "sgd_rates=[0.3,1.0]", "probe_rate=0.01")
    outcome = outcome_of("blockwise_gd", *SMALL, *rates, "seeds=[0,1,2,3]", "steps=25")
    assert claims_of(outcome, "'BAGM' ends below 'SGD, one rate'")[0].holds
    assert claims_of(outcome, "'Adam-mini' ends below 'SGD, one rate'")[0].holds
    assert {row["seed"] for row in outcome.rows} == {2, 3}
