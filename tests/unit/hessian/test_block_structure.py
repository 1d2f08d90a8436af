"""Scores of block structures: on matrices whose blocks are known, and the sketch against the dense ones."""

import math

import pytest
import torch
from torch import nn

from lightning_adam_mini.blocks import Blocks, Segment
from lightning_adam_mini.hessian import HessianOperator, ParameterBlock
from lightning_adam_mini.hessian.block_structure import candidate_structures, exact_scores, sketched_scores, tau

SHAPE = (8, 3)
WEIGHT = ParameterBlock("weight", "weight")


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
    scores = exact_scores(matrix, candidate_structures(shape))
    return max(scores, key=lambda name: scores[name].information)


def test_candidates_are_runs_that_divide_either_dimension():
    names = list(candidate_structures((6, 4)))
    assert names == ["whole", "rows x 1", "rows x 2", "rows x 3", "columns x 1", "columns x 2", "element"]
    assert list(candidate_structures((3,))) == ["whole", "rows x 1", "element"]


@pytest.mark.parametrize("name", [name for name in candidate_structures(SHAPE) if name != "whole"])
@pytest.mark.parametrize("outside", [0.0, 0.05])
def test_information_is_largest_at_the_blocks_of_the_matrix(name, outside):
    assert best(masked(candidate_structures(SHAPE)[name], outside)) == name


def test_scores_of_a_small_matrix_by_hand():
    matrix = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    score = exact_scores(matrix, {"element": Blocks.element((2, 1))})["element"]
    assert (score.share, score.absolute_share, score.expected) == (0.8, pytest.approx(2 / 3), 0.5)
    assert score.contrast == pytest.approx(1.6)
    assert score.information == pytest.approx(0.8 * math.log(1.6) + 0.2 * math.log(0.4))
    assert tau(matrix) == pytest.approx(2 / 3)


def test_one_block_holds_everything_and_has_no_information():
    score = exact_scores(symmetric(), {"whole": Blocks.whole(SHAPE)})["whole"]
    assert (score.share, score.expected, score.num_blocks) == (1, 1, 1)
    assert score.information == score.noise == 0


def test_noise_is_what_a_random_matrix_has():
    structures = candidate_structures(SHAPE)
    draws = [exact_scores(symmetric(seed), structures) for seed in range(300)]
    for name in structures:
        shares = torch.tensor([scores[name].share for scores in draws])
        expected = (draws[0][name].expected * 24 + 1) / 25
        assert shares.mean().item() == pytest.approx(expected, abs=4 * shares.std().item() / 300**0.5 + 1e-9)


def test_less_inside_than_expected_is_negative():
    blocks = Blocks.rows(SHAPE)
    index = blocks.block_index().flatten()
    matrix = symmetric() * (index.unsqueeze(0) != index.unsqueeze(1))
    assert exact_scores(matrix, {"rows": blocks})["rows"].information < 0


def test_a_structure_of_another_size_and_a_zero_matrix_are_refused():
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


def operator_of(matrix, shape=SHAPE):
    return HessianOperator(Quadratic(matrix, shape), Quadratic.loss, [0])


def test_the_sketch_agrees_with_the_dense_scores_in_expectation():
    structures = candidate_structures(SHAPE)
    matrix = masked(structures["rows x 2"], outside=0.3)
    # Columns of different norms, as those of a table of tokens.
    scales = torch.logspace(-2, 0, 24, dtype=torch.float64)
    matrix = scales.unsqueeze(1) * matrix * scales
    exact = exact_scores(matrix, structures)
    operator, count = operator_of(matrix), 60
    draws = [sketched_scores(operator, WEIGHT, structures, columns=12, seed=seed) for seed in range(count)]
    for name, score in exact.items():
        shares = torch.tensor([found[name].share for found in draws], dtype=torch.float64)
        assert draws[0][name].expected == pytest.approx(score.expected, rel=1e-12)
        assert draws[0][name].num_blocks == score.num_blocks
        # Five standard errors; the ratio's own bias is of the order of a tenth of its spread.
        assert abs(shares.mean().item() - score.share) < 5 * shares.std().item() / count**0.5 + 0.02, name


def test_the_standard_error_is_that_of_repeated_sketches():
    structures = {"rows": Blocks.rows((40, 3))}
    operator = operator_of(masked(structures["rows"], outside=0.3), (40, 3))
    found = [sketched_scores(operator, WEIGHT, structures, columns=20, seed=seed)["rows"] for seed in range(40)]
    spread = torch.tensor([score.share for score in found]).std().item()
    reported = sum(score.standard_error for score in found) / len(found)
    assert 0.6 < reported / spread < 1.6


def test_all_columns_give_the_exact_scores():
    structures = candidate_structures(SHAPE) | {
        "fused": Blocks.segmented(SHAPE, (Segment(4, 2), Segment(4, 1))),
        "columns of rows": Blocks.rows(SHAPE, axis=1, batch_axes=(0,)),
    }
    matrix = symmetric()
    found = sketched_scores(operator_of(matrix), WEIGHT, structures, columns=24)
    for name, score in exact_scores(matrix, structures).items():
        assert found[name].share == pytest.approx(score.share, rel=1e-12), name
        assert found[name].expected == pytest.approx(score.expected, rel=1e-12), name
        assert found[name].standard_error == 0


def test_a_heavy_block_is_found_among_many():
    """Four rows of 200 have nearly all of the energy: columns that are drawn evenly would hardly meet them."""
    shape = (200, 2)
    index = Blocks.rows(shape, block_size=4).block_index().flatten()
    scales = torch.where(index == 17, 1.0, 1e-3).double()
    matrix = masked(Blocks.rows(shape, block_size=4), outside=1e-3) * scales * scales.unsqueeze(1)
    scores = sketched_scores(operator_of(matrix, shape), WEIGHT, candidate_structures(shape), columns=16)
    assert max(scores, key=lambda name: scores[name].information) == "rows x 4"


def test_the_sketch_does_not_depend_on_chunks_and_other_structures(monkeypatch):
    structures = candidate_structures(SHAPE)
    operator = operator_of(symmetric())
    every = sketched_scores(operator, WEIGHT, structures, columns=10)
    monkeypatch.setattr("lightning_adam_mini.hessian.exact._CHUNK_BYTES", 1)
    some = sketched_scores(operator, WEIGHT, {"rows x 2": structures["rows x 2"]}, columns=10, budget_bytes=0)
    assert 0 < every["rows x 2"].share < 1
    assert some["rows x 2"].share == pytest.approx(every["rows x 2"].share)


def test_the_sketch_refuses_one_column_and_a_zero_hessian():
    operator = operator_of(torch.zeros(24, 24, dtype=torch.float64))
    with pytest.raises(ValueError, match="two columns"):
        sketched_scores(operator, WEIGHT, candidate_structures(SHAPE), columns=1)
    for columns in (2, 24):
        with pytest.raises(ValueError, match="is zero"):
            sketched_scores(operator, WEIGHT, candidate_structures(SHAPE), columns=columns)
    with pytest.raises(ValueError, match="24 rows"):
        sketched_scores(operator, WEIGHT, {"rows": Blocks.rows((4, 3))})


def test_different_norms_alone_are_no_blocks():
    """A matrix whose entries are products of sizes has no information beyond them, however large one block's are."""
    sizes = torch.tensor([1.0, 1, 1, 1, 30, 30, 30, 30], dtype=torch.float64)
    score = exact_scores(sizes * sizes.unsqueeze(1), {"halves": Blocks.rows((8, 1), block_size=4)})["halves"]
    assert score.share > 0.99
    assert score.information > 0.5
    assert score.information_beyond_norms == pytest.approx(0, abs=1e-9)
    blocks = torch.block_diag(torch.ones(4, 4), 30 * torch.ones(4, 4)).double()
    score = exact_scores(blocks, {"halves": Blocks.rows((8, 1), block_size=4)})["halves"]
    assert score.by_norms == pytest.approx((1 + 900**2) / 901**2)
    assert score.information_beyond_norms > 0
