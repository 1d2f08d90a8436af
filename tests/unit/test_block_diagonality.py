"""Scores of cuts: on matrices whose blocks are known, and the sketch against the dense ones."""

import math

import pytest
import torch
from torch import nn

from lightning_adam_mini.blocks import Blocks
from lightning_adam_mini.hessian import HessianOperator
from lightning_adam_mini.hessian.block_diagonality import candidate_cuts, exact_scores, tau
from lightning_adam_mini.hessian.sketched_diagonality import sketched_scores

SHAPE = (8, 3)


def symmetric(seed=0, size=24):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return matrix + matrix.T


def masked(blocks, outside=0.0, seed=0):
    """A dense symmetric matrix whose entries outside of the blocks are `outside` times as large."""
    index = blocks.block_index().flatten()
    inside = index.unsqueeze(0) == index.unsqueeze(1)
    return symmetric(seed, index.numel()) * torch.where(inside, 1.0, outside)


def best(matrix, shape=SHAPE):
    scores = exact_scores(matrix, candidate_cuts(shape))
    return max(scores, key=lambda name: scores[name].information)


def test_candidates_are_runs_that_divide_either_dimension():
    names = list(candidate_cuts((6, 4)))
    assert names == ["whole", "rows x 1", "rows x 2", "rows x 3", "columns x 1", "columns x 2", "element"]
    assert list(candidate_cuts((3,))) == ["whole", "rows x 1", "element"]


@pytest.mark.parametrize("name", [name for name in candidate_cuts(SHAPE) if name != "whole"])
@pytest.mark.parametrize("outside", [0.0, 0.05])
def test_information_is_largest_at_the_blocks_of_the_matrix(name, outside):
    assert best(masked(candidate_cuts(SHAPE)[name], outside)) == name


def test_scores_of_a_small_matrix_by_hand():
    matrix = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    score = exact_scores(matrix, {"element": Blocks.element((2, 1))})["element"]
    assert (score.share, score.absolute_share, score.expected) == (0.8, pytest.approx(2 / 3), 0.5)
    assert score.contrast == pytest.approx(1.6)
    assert score.information == pytest.approx(0.8 * math.log(1.6) + 0.2 * math.log(0.4))
    assert tau(matrix) == pytest.approx(2 / 3)


def test_one_block_holds_everything_and_tells_nothing():
    score = exact_scores(symmetric(), {"whole": Blocks.whole(SHAPE)})["whole"]
    assert (score.share, score.expected, score.num_blocks) == (1, 1, 1)
    assert score.information == score.noise == 0


def test_noise_is_what_a_random_matrix_has():
    cuts = candidate_cuts(SHAPE)
    draws = [exact_scores(symmetric(seed), cuts) for seed in range(300)]
    for name in cuts:
        shares = torch.tensor([scores[name].share for scores in draws])
        expected = (draws[0][name].expected * 24 + 1) / 25
        assert shares.mean().item() == pytest.approx(expected, abs=4 * shares.std().item() / 300**0.5 + 1e-9)


def test_less_inside_than_expected_is_negative():
    blocks = Blocks.rows(SHAPE)
    index = blocks.block_index().flatten()
    matrix = symmetric() * (index.unsqueeze(0) != index.unsqueeze(1))
    assert exact_scores(matrix, {"rows": blocks})["rows"].information < 0


def test_a_cut_of_another_shape_and_a_zero_matrix_are_refused():
    with pytest.raises(ValueError, match="24 rows"):
        exact_scores(symmetric(), {"rows": Blocks.rows((4, 3))})
    with pytest.raises(ValueError, match="is zero"):
        exact_scores(torch.zeros(24, 24, dtype=torch.float64), {"rows": Blocks.rows(SHAPE)})


class Quadratic(nn.Module):
    """A parameter with a given Hessian."""

    def __init__(self, matrix, shape=SHAPE):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))
        self.register_buffer("matrix", matrix)

    def loss(self, _):
        flat = self.weight.flatten()
        return flat @ self.matrix @ flat / 2


def operator_of(matrix):
    return HessianOperator(Quadratic(matrix), Quadratic.loss, [0])


def test_the_sketch_agrees_with_the_dense_scores_in_expectation():
    cuts = candidate_cuts(SHAPE)
    matrix = masked(cuts["rows x 2"], outside=0.3)
    exact = exact_scores(matrix, cuts)
    sketch = sketched_scores(operator_of(matrix), "weight", cuts, probes=150, patterns=1)
    for name, score in exact.items():
        found = sketch[name]
        assert found.expected == score.expected
        assert found.standard_error < 0.06
        # Five standard errors of 150 draws; the ratio's own bias is of the order of 1 / 150.
        assert abs(found.share - score.share) < 5 * found.standard_error + 0.01


def test_the_standard_error_is_that_of_repeated_sketches():
    cuts = {"rows": Blocks.rows(SHAPE)}
    operator = operator_of(masked(cuts["rows"], outside=0.3))
    found = [sketched_scores(operator, "weight", cuts, probes=20, seed=seed)["rows"] for seed in range(30)]
    spread = torch.tensor([score.share for score in found]).std().item()
    told = sum(score.standard_error for score in found) / len(found)
    assert 0.6 < told / spread < 1.6


def test_the_sketch_does_not_depend_on_chunks_and_other_cuts():
    cuts = candidate_cuts(SHAPE)
    operator = operator_of(symmetric())
    every = sketched_scores(operator, "weight", cuts, probes=3)
    some = sketched_scores(operator, "weight", {"rows x 2": cuts["rows x 2"]}, probes=3, budget_bytes=1)
    assert 0 < every["rows x 2"].share < 1
    other = sketched_scores(operator, "weight", cuts, probes=3, budget_bytes=1)
    assert other["columns x 1"].share == pytest.approx(every["columns x 1"].share)
    # The total is estimated from all products, so that shares differ a little.
    assert some["rows x 2"].share == pytest.approx(every["rows x 2"].share, rel=0.5)


def test_the_sketch_refuses_one_probe_and_a_zero_hessian():
    operator = operator_of(torch.zeros(24, 24, dtype=torch.float64))
    with pytest.raises(ValueError, match="two probes"):
        sketched_scores(operator, "weight", candidate_cuts(SHAPE), probes=1)
    with pytest.raises(ValueError, match="is zero"):
        sketched_scores(operator, "weight", candidate_cuts(SHAPE), probes=2)
