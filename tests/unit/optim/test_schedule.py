"""Schedules: warm-up, shapes, floor, horizon, and what a resumed run takes over."""

import math

import pytest
import torch

from lightning_adam_mini.schedule import Schedule


def scales(total, **options):
    schedule = Schedule(**options)
    return [schedule.scale(step, total) for step in range(total + 3)]


def optimizer(lr=2.0):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for _ in range(2)]
    return torch.optim.SGD(groups)


@pytest.mark.parametrize("warmup", [4, 0.4])
def test_warm_up_in_steps_and_as_a_fraction(warmup):
    assert scales(10, shape="constant", warmup=warmup)[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", [1.0, 0.775, 0.55, 0.325, 0.1, 0.1, 0.1]),
        ("cosine", [0.1 + 0.45 * (1 + math.cos(math.pi * step / 4)) for step in range(5)] + [0.1, 0.1]),
        ("wsd", [1.0, 1.0, 1.0, 0.55, 0.1, 0.1, 0.1]),
        ("constant", [1.0] * 7),
    ],
)
def test_shapes(shape, expected):
    assert scales(4, shape=shape, warmup=0, decay=0.5) == pytest.approx(expected)


def test_decay_in_steps():
    assert scales(4, shape="wsd", warmup=0, decay=2) == scales(4, shape="wsd", warmup=0, decay=0.5)


def test_the_last_step_of_training_is_above_the_floor_and_the_next_would_be_on_it():
    values = scales(100, floor=0.1)
    assert 0.1 < values[99] < 0.101
    assert values[100] == pytest.approx(0.1)


@pytest.mark.parametrize("floor", [0.0, 0.5, 1.0])
def test_floor(floor):
    values = scales(10, warmup=2, floor=floor)
    assert values[-1] == pytest.approx(floor)
    assert min(values[2:]) >= floor - 1e-12


def test_the_peak_is_reached_right_after_the_warm_up_whatever_the_shape():
    for shape in ("cosine", "linear", "wsd", "constant"):
        values = scales(20, shape=shape, warmup=5)
        assert values[5] == max(values) == 1.0
        assert values[4] == pytest.approx(5 / 6)


def test_horizon_replaces_the_length_of_training():
    short, long = Schedule(horizon=10, warmup=0.2), Schedule(warmup=0.2)
    assert [short.scale(step, 1000) for step in range(20)] == [long.scale(step, 10) for step in range(20)]
    assert short.scale(500, 1000) == pytest.approx(0.1)


@pytest.mark.parametrize("warmup", [1, 1.0, 3.9])
def test_one_and_above_are_steps(warmup):
    assert Schedule(shape="constant", warmup=warmup).scale(0, 10) == pytest.approx(1 / (int(warmup) + 1))


def test_warm_up_longer_than_training():
    values = scales(4, warmup=10)
    assert values[:4] == pytest.approx([1 / 11, 2 / 11, 3 / 11, 4 / 11])


def test_one_step():
    assert scales(1, warmup=0)[0] == 1.0
    assert scales(1, shape="wsd", warmup=0, decay=1)[0] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup": -1}, "not be negative"),
        ({"decay": -0.1}, "not be negative"),
        ({"floor": 1.1}, r"floor is a fraction of the peak learning rate in \[0, 1\], not 1.1"),
        ({"floor": -0.1}, "floor"),
        ({"horizon": 0}, "horizon must be at least one step"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**options)


def test_scheduler_scales_every_group_from_the_first_step():
    own = optimizer()
    schedule = Schedule(warmup=3)
    scheduler = schedule.build(own, 10)
    for step in range(10):
        assert [group["lr"] for group in own.param_groups] == pytest.approx([2 * schedule.scale(step, 10)] * 2)
        own.step()
        scheduler.step()


def resumed(after, old, new, lr=2.0):
    """Optimizer and scheduler of a second run, in the order in which Lightning loads."""
    first, second = optimizer(lr), optimizer(lr)
    old = Schedule(warmup=0).build(first, old)
    for _ in range(after):
        first.step()
        old.step()
    new = Schedule(warmup=0).build(second, new)
    second.load_state_dict(first.state_dict())
    new.load_state_dict(old.state_dict())
    return second, new


@pytest.mark.parametrize("total", [10, 20], ids=["the same length", "longer"])
def test_a_loaded_scheduler_follows_its_own_length_at_once(total):
    own, scheduler = resumed(5, 10, total)
    for step in range(5, 12):
        expected = 2 * Schedule(warmup=0).scale(step, total)
        assert [group["lr"] for group in own.param_groups] == pytest.approx([expected] * 2)
        assert scheduler.get_last_lr() == pytest.approx([expected] * 2)
        own.step()
        scheduler.step()


def test_the_same_length_is_continued_to_the_last_bit():
    whole = optimizer()
    scheduler = Schedule(warmup=0).build(whole, 10)
    for _ in range(5):
        whole.step()
        scheduler.step()
    own, loaded = resumed(5, 10, 10)
    assert [group["lr"] for group in own.param_groups] == [group["lr"] for group in whole.param_groups]
    assert loaded.state_dict() == scheduler.state_dict()


def test_a_learning_rate_in_a_tensor_stays_one():
    own, _ = resumed(5, 10, 20, lr=torch.tensor(2.0))
    rate = own.param_groups[0]["lr"]
    assert isinstance(rate, torch.Tensor)
    assert rate.item() == pytest.approx(2 * Schedule(warmup=0).scale(5, 20))
