"""The statistics of a comparison, against values worked out by hand and against scipy."""

import math

import pytest
from scipy import stats

from lightning_adam_mini.cli.compare.run_records import Point
from lightning_adam_mini.cli.compare.stats import (
    MeanStd,
    best_of,
    first_reaching,
    mean_std,
    performance_profiles,
    target_of,
    time_to_target,
    verdict_of,
    welch,
)


def test_mean_and_sample_standard_deviation():
    assert mean_std([]) is None
    assert mean_std([3.0]) == MeanStd(3.0, None, 1)
    assert mean_std([2.0, 4.0, 9.0]) == MeanStd(5.0, math.sqrt((9 + 1 + 16) / 2), 3)


def tuned(mean, n=2):
    return MeanStd(mean, None, n)


@pytest.mark.parametrize(
    ("tuning", "mode", "best"),
    [
        ({1.0: tuned(3), 2.0: tuned(2)}, "min", 2.0),
        ({1.0: tuned(3), 2.0: tuned(2)}, "max", 1.0),
        ({2.0: tuned(3), 1.0: tuned(3)}, "min", 1.0),  # equal: the smaller one
        ({1.0: tuned(3), 2.0: tuned(2, n=1)}, "min", 1.0),  # one of two seeds diverged at 2.0
        ({1.0: tuned(3, n=1), 2.0: tuned(2, n=1)}, "min", 2.0),  # at each of them
        ({1.0: None, 2.0: tuned(2)}, "max", 2.0),
        ({1.0: None, 2.0: None}, "min", None),
    ],
)
def test_best_learning_rate(tuning, mode, best):
    assert best_of(tuning, mode) == best


def test_first_point_that_reaches_a_target():
    falling = [Point(10, 1.0, 5.0), Point(20, 2.0, 4.0), Point(30, 3.0, 4.5), Point(40, 4.0, 3.0)]
    assert first_reaching(falling, 4.0, "min") == falling[1]
    assert first_reaching(falling, 3.5, "min") == falling[3]
    assert first_reaching(falling, 2.0, "min") is None
    assert first_reaching(falling[1:], 4.2, "max") == falling[2]


def test_a_seed_that_never_reaches_the_target_is_the_latest():
    assert time_to_target({0: 10, 1: 30, 2: None}).median == 30
    assert time_to_target({0: 10, 1: None, 2: None}).median is None
    assert time_to_target({0: 10, 1: 20}).median == 15
    assert time_to_target({0: 10, 1: None}).median is None
    assert time_to_target({}).median is None


@pytest.mark.parametrize(
    ("last", "mode", "target"),
    [
        ([3.0, 1.0, 2.0], "min", 2.0),
        ([4.0, 1.0, 3.0, 2.0], "min", 3.0),  # the worse of the middle two
        ([4.0, 1.0, 3.0, 2.0], "max", 2.0),
        ([1.0, 9.0, 2.0], "min", 2.0),  # one bad seed does not move it
        ([1.0, 2.0, None], "min", 2.0),  # a seed that diverged is the worst
        ([1.0, 2.0, None], "max", 1.0),
        ([1.0, 2.0, 3.0, None, None], "min", 3.0),  # half of the seeds reach no less
        ([1.0, None, None], "min", None),
        ([1.0, math.nan, 2.0], "max", 1.0),
        ([], "min", None),
    ],
)
def test_the_target_is_what_the_median_seed_of_the_reference_reaches(last, mode, target):
    assert target_of(last, mode) == target
    if target is not None:
        curves = [[] if value is None else [Point(10, 1.0, value)] for value in last]
        reached = (first_reaching(curve, target, mode) for curve in curves)
        assert time_to_target({seed: point and point.step for seed, point in enumerate(reached)}).median == 10


def test_welch_by_hand():
    # Means 3 and 5, variances 1 and 4, three values each: standard error sqrt(1/3 + 4/3), 50/17 degrees of freedom.
    ours, reference = [2.0, 3.0, 4.0], [3.0, 5.0, 7.0]
    difference, (low, high), p_value = welch(ours, reference)
    degrees = (1 / 3 + 4 / 3) ** 2 / ((1 / 3) ** 2 / 2 + (4 / 3) ** 2 / 2)
    half = stats.t.ppf(0.975, degrees) * math.sqrt(1 / 3 + 4 / 3)
    assert degrees == pytest.approx(50 / 17)
    assert difference == -2.0
    assert (low, high) == pytest.approx((-2.0 - half, -2.0 + half))
    assert p_value == pytest.approx(2 * stats.t.sf(2.0 / math.sqrt(5 / 3), degrees))


@pytest.mark.parametrize(
    ("ours", "reference", "mode", "word"),
    [
        ([1.0, 1.1, 0.9], [2.0, 2.1, 1.9], "min", "better"),
        ([1.0, 1.1, 0.9], [2.0, 2.1, 1.9], "max", "worse"),
        ([2.0, 2.1, 1.9], [1.0, 1.1, 0.9], "min", "worse"),
        ([2.0, 2.1, 1.9], [1.0, 1.1, 0.9], "max", "better"),
        ([1.0, 2.0, 3.0], [1.5, 2.5, 3.5], "min", "within the spread"),
        ([1.0, 1.0], [2.0, 2.01], "min", "better"),  # one of the two varies
    ],
)
def test_verdict(ours, reference, mode, word):
    judged = verdict_of(ours, reference, mode)
    assert judged.word == judged.text == word
    low, high = judged.interval
    assert low <= judged.difference <= high
    assert (low <= 0.0 <= high) == (word == "within the spread")


def test_no_verdict():
    assert verdict_of([1.0], [2.0, 3.0], "min").text == "one seed: no verdict"
    assert verdict_of([], [2.0, 3.0], "min").text == "no result: no verdict"
    assert verdict_of([1.0, 2.0], [], "min").text == "no result of the reference: no verdict"
    lost = verdict_of([1.0, 1.1], [2.0, 2.1], "min", missing=1)
    assert (lost.word, lost.text) == ("no verdict", "1 seed did not finish: no verdict")
    assert lost.interval is None
    unfinished = verdict_of([1.0, 1.1], [2.0, 2.1], "min", unfinished=2)
    assert unfinished.text == "2 tuning runs did not finish: no verdict"
    assert (unfinished.word, unfinished.difference) == ("no verdict", pytest.approx(-1.0))


@pytest.mark.parametrize("reference", [[1.0, 1.0], [2.0, 2.0]])
def test_seeds_that_do_not_differ_give_no_verdict(reference):
    """Without a spread nothing distinguishes chance from a difference, nor from equality."""
    judged = verdict_of([1.0, 1.0], reference, "min")
    assert (judged.word, judged.text) == ("no verdict", "the seeds do not differ: no verdict")
    assert judged.interval is None
    assert judged.difference == 1.0 - reference[0]


def test_performance_profiles():
    # Task a: AdamW 100, Lion 50; b: AdamW 30, Lion never; c: nobody.
    times = {
        "a": {"AdamW": 100.0, "Lion": 50.0},
        "b": {"AdamW": 30.0, "Lion": None},
        "c": {"AdamW": None, "Lion": None},
    }
    adamw, lion = performance_profiles(times)
    assert adamw.factors == {"a": 2.0, "b": 1.0}
    assert lion.factors == {"a": 1.0, "b": None}
    assert adamw.taus == lion.taus == (1.0, 2.0)
    assert adamw.shares == (0.5, 1.0)
    assert lion.shares == (0.5, 0.5)
