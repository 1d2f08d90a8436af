"""What `adam-mini bench` measures with: spreads, turns of calls, bytes of a step, allocations, the largest batch."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

import tiny_models
from lightning_adam_mini import AdamMini
from lightning_adam_mini.measure.memory import (
    RankMemory,
    available_bytes,
    largest_batch,
    peak_extra_bytes,
    resident_bytes,
    resident_peak_bytes,
)
from lightning_adam_mini.measure.timing import (
    interleave,
    ratio_of_pairs,
    spread_of,
    step_traffic_bytes,
    stored_state_bytes,
)

CPU = torch.device("cpu")


def test_quartiles_are_numpys():
    figures = np.random.default_rng(0).normal(size=14)
    spread = spread_of(figures.tolist())
    expected = np.percentile(figures, [25, 50, 75])
    assert (spread.low, spread.median, spread.high) == pytest.approx(tuple(expected))
    with pytest.raises(ValueError, match="at least two"):
        spread_of([1.0])


def test_ratios_are_taken_within_a_round():
    """Whatever slows a round down slows both, so the ratio has no spread; that of the medians would have."""
    ratio = ratio_of_pairs([2.0, 20.0, 200.0, 2.0], [1.0, 10.0, 100.0, 1.0])
    assert (ratio.median, ratio.low, ratio.high, ratio.uncertainty) == (2.0, 2.0, 2.0, 0.0)


def test_the_uncertainty_covers_the_median_of_a_normal():
    draw = random.Random(0)
    hits = 0
    for _ in range(400):
        spread = spread_of([draw.gauss(10.0, 1.0) for _ in range(15)])
        hits += abs(spread.median / 10.0 - 1.0) <= spread.uncertainty
    assert 0.88 < hits / 400 < 0.99


def test_calls_take_turns_in_a_seeded_order():
    def trace(seed):
        calls = []
        named = {name: lambda name=name: calls.append(name) for name in "abc"}
        times = interleave(named, CPU, rounds=6, seed=seed, warmup=2, shortest=0.0)
        assert {name: len(column) for name, column in times.items()} == dict.fromkeys("abc", 6)
        rounds = ["".join(calls[i : i + 3]) for i in range(6, len(calls), 3)]
        assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
        return rounds

    assert trace(0) == trace(0)
    assert trace(0) != trace(1)
    assert len(set(trace(0))) > 1


def test_short_calls_are_repeated_in_a_row():
    calls = Counter()
    times = interleave({"short": lambda: calls.update(["short"])}, CPU, rounds=3, warmup=1, shortest=0.001)
    assert calls["short"] > 1 + 3
    assert all(seconds.wall > 0 for seconds in times["short"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traffic_of_a_step(dtype):
    """Parameters and state read and written, gradients read: seven streams for AdamW, about five for Adam-mini."""
    model = nn.Linear(64, 32, bias=False).to(dtype)
    frozen = nn.Parameter(torch.ones(7), requires_grad=False)
    model.weight.grad = torch.ones_like(model.weight)
    size = model.weight.numel() * dtype.itemsize
    adamw = torch.optim.AdamW(model.parameters())
    adamw.step()
    assert step_traffic_bytes([model.weight, frozen], stored_state_bytes(adamw)) == 7 * size + 2 * 4
    ours = AdamMini(model, partition="default")
    assert step_traffic_bytes([model.weight], stored_state_bytes(ours)) == 5 * size + 2 * (4 + 4)


def test_a_quantized_state_counts_what_it_is_made_of():
    optim = pytest.importorskip("torchao.optim")
    parameter = nn.Parameter(torch.ones(8192))
    parameter.grad = torch.ones_like(parameter)
    optimizer = optim.AdamW8bit([parameter])
    optimizer.step()
    assert stored_state_bytes(optimizer) < 3 * 8192


def test_peak_of_allocations():
    tensor = torch.ones(1000, 1000)
    kept = []

    def call():
        first = tensor + 1  # 4 MB
        second = first * 2  # 8 MB
        del first
        kept.append(second + 1)  # 8 MB again

    call()
    assert 8_000_000 <= peak_extra_bytes(call, CPU) < 8_000_100  # and the numbers 1 and 2
    assert peak_extra_bytes(lambda: tensor.add_(1), CPU) < 100


@pytest.mark.parametrize("implementation", ["foreach", "reference"])
def test_a_step_of_ours_makes_no_tensor_of_the_model_size(implementation):
    model = nn.Sequential(*(nn.Linear(1500, 1500) for _ in range(4)))  # large beside a slice
    tiny_models.set_gradients(model)
    optimizer = AdamMini(model, partition="transformer", implementation=implementation)
    optimizer.step()
    whole = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert 0 < peak_extra_bytes(optimizer.step, CPU) < whole / 2


def test_memory_of_a_rank():
    one = RankMemory(parameters=100, state=201, root=30, largest_block=20)
    assert (one.gathered, one.total) == (0, 401)
    four = RankMemory(parameters=100, state=201, root=30, largest_block=20, ranks=4)
    assert four.gathered == 30 + 2 * 20 + 30
    assert four.total == 101 + four.gathered


@pytest.mark.parametrize("start", [-5, 1, 7, 90])
@pytest.mark.parametrize("largest", [0, 1, 2, 6, 7, 8, 63, 64, 100])
def test_the_largest_batch(largest, start):
    asked = []

    def fits(batch):
        asked.append(batch)
        return batch <= largest

    assert largest_batch(fits, start=start, limit=100) == largest
    assert len(set(asked)) == len(asked) <= 14
    assert all(1 <= batch <= 100 for batch in asked)


def test_resident_memory_grows_with_what_is_touched():
    before, peak = resident_bytes(), resident_peak_bytes()
    touched = torch.ones(16_000_000)
    assert resident_peak_bytes() >= max(peak, before + 32_000_000)
    assert touched[-1] == 1
    free = available_bytes(CPU)
    assert free is None or free > 0
