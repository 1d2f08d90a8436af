"""Quartiles, ratios and rounds of timed calls."""

import random
from collections import Counter

import numpy as np
import pytest
import torch

from lightning_adam_mini.measure.timing import (
    interleave,
    ratio_of_pairs,
    spread_of,
)

CPU = torch.device("cpu")


def test_quartiles_are_numpys():
    values = np.random.default_rng(0).normal(size=14)
    spread = spread_of(values.tolist())
    expected = np.percentile(values, [25, 50, 75])
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
    times = interleave({"short": lambda: calls.update(["short"])}, CPU, rounds=3, warmup=1, shortest=0.1)
    assert calls["short"] > 1 + 3
    assert all(seconds.wall > 0 for seconds in times["short"])
