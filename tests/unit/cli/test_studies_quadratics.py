"""Quadratics of studies: spectra, descent in closed form, and what the three studies on them claim."""

import pytest
import torch
from torch import Generator
from torch.testing import assert_close

pytest.importorskip("jsonargparse")
pytest.importorskip("scipy")

from lightning_adam_mini import AdamMini
from lightning_adam_mini.cli.studies.common.quadratics import (
    ScaledDescent,
    adam_mini_scale,
    adam_scale,
    blockwise_scale,
    random_quadratic,
)
from lightning_adam_mini.cli.studies.quadratic_cases import read_spectra
from study_outcomes import claims_of, outcome_of

SPECTRA = [[1.0, 2.0, 3.0, 4.0], [90.0, 100.0]]


@pytest.fixture
def problem():
    return random_quadratic(SPECTRA, Generator().manual_seed(0))


def holding(outcome, words):
    """Whether each claim whose text has these words holds."""
    return [claim.holds for claim in claims_of(outcome, words)]


def test_a_random_quadratic_has_the_eigenvalues_given_and_dense_blocks(problem):
    assert problem.sizes == (4, 2)
    assert_close(torch.linalg.eigvalsh(problem.hessian), torch.tensor([*SPECTRA[0], *SPECTRA[1]], dtype=torch.float64))
    for block, eigenvalues in zip(problem.blocks(), SPECTRA, strict=True):
        assert_close(torch.linalg.eigvalsh(block.hessian), torch.tensor(eigenvalues, dtype=torch.float64))
        assert (block.hessian.abs() > 1e-3).all()
    assert not problem.hessian[:4, 4:].any()
    assert ScaledDescent(problem).condition_number == pytest.approx(100)


def test_it_depends_on_the_generator_alone(problem):
    again = random_quadratic(SPECTRA, Generator().manual_seed(0))
    other = random_quadratic(SPECTRA, Generator().manual_seed(1))
    assert torch.equal(again.hessian, problem.hessian)
    assert torch.equal(again.start, problem.start)
    assert not torch.allclose(other.hessian, problem.hessian)


@pytest.mark.parametrize("scale_of", [lambda _: None, adam_scale, adam_mini_scale, blockwise_scale])
def test_the_closed_form_is_what_iterating_gives(problem, scale_of):
    scale = scale_of(problem)
    descent = ScaledDescent(problem, scale)
    rate = descent.worst_case_rate / 2
    losses = descent.losses(rate, 7)
    weights = problem.start.clone()
    for loss in losses:
        assert_close(loss, weights @ problem.hessian @ weights / 2)
        weights -= rate * (problem.hessian @ weights) * (1 if scale is None else scale)


def test_iterations_are_the_first_that_reach_the_tolerance(problem):
    descent = ScaledDescent(problem)
    rate = descent.worst_case_rate
    count = descent.iterations_to(1e-6, rate)
    losses = descent.losses(rate, count)
    assert losses[count] <= 1e-6 * losses[0] < losses[count - 1]


def test_a_rate_that_diverges_is_refused(problem):
    with pytest.raises(ValueError, match=r"below 2 / L = 0\.02"):
        ScaledDescent(problem).iterations_to(1e-6, 0.0201)


def test_the_best_rate_is_no_worse_than_the_worst_case_one(problem):
    descent = ScaledDescent(problem)
    best, worst_case = (descent.losses(rate, 10)[-1] for rate in (descent.best_rate(10), descent.worst_case_rate))
    assert best <= worst_case
    assert best < descent.losses(descent.worst_case_rate / 5, 10)[-1]


def test_scales_share_what_their_method_shares(problem):
    gradient = problem.hessian @ problem.start
    assert_close(adam_scale(problem), 1 / gradient.abs())
    assert_close(adam_mini_scale(problem)[:4], (1 / gradient[:4].square().mean().sqrt()).expand(4))
    assert_close(blockwise_scale(problem), torch.tensor([2 / 5] * 4 + [2 / 190] * 2, dtype=torch.float64))


def test_the_frozen_scale_of_adam_mini_is_that_of_the_first_step_of_the_optimizer(problem):
    """What stands for Adam-mini in closed form moves weights as `AdamMini` does in its first step."""
    module = torch.nn.ParameterList(problem.start.clone().split(problem.sizes))
    for parameter, gradient in zip(module, problem.gradient.split(problem.sizes), strict=True):
        parameter.grad = gradient.clone()
    AdamMini(module, lr=0.1, betas=(0.0, 0.999), eps=0.0, weight_decay=0.0, partition="default").step()
    moved = torch.cat([parameter.detach() for parameter in module])
    assert_close(moved, problem.start - 0.1 * adam_mini_scale(problem) * problem.gradient)


@pytest.mark.slow
def test_three_blocks_want_a_rate_each():
    """Figure 3 at a small size: a rate a block, then Adam, then one rate; a block alone wants one rate."""
    outcome = outcome_of("three_block_quadratic", "seeds=[0,1,2]", "block_size=10", "iterations=100", "rates=[0.3,1.0]")
    assert holding(outcome, "whole, rate 2/(L+mu): 'GD, a rate a block' ends below 'Adam, frozen v'") == [True]
    assert holding(outcome, "whole, rate 2/(L+mu): 'Adam, frozen v' ends below 'GD, one rate'") == [True]
    assert holding(outcome, "'Adam-mini, frozen v' ends below 'Adam, frozen v'") == [True]
    assert holding(outcome, "'AdamMini' ends below 'torch AdamW'") == [True]
    for block in (1, 2, 3):
        assert holding(outcome, f"block {block}, rate 2/(L+mu): 'GD, one rate' ends below 'Adam, frozen v'") == [True]


def test_adam_is_fast_on_heterogeneous_blocks_alone():
    seeds = "seeds=[0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16]"
    outcome = outcome_of("quadratic_cases", seeds, "heterogeneous_spectra=null", "homogeneous_spectra=null")
    assert [claim.holds for claim in outcome.claims] == [True] * 4
    lines = {(line["case"], line["spectrum"]): line for line in outcome.summary}
    for top in ("2000", "5000"):
        mixed, even = lines[2, f"1 to {top}"], lines[4, f"1 to {top}"]
        assert mixed["condition_number"] == pytest.approx(even["condition_number"])
        assert even["adam"] > 20 * mixed["adam"]


def test_one_seed_has_no_quartiles_but_its_own_ratio():
    outcome = outcome_of("quadratic_cases", "seeds=[4]", "top_eigenvalues=[2000]", "heterogeneous_spectra=null")
    for row, claim in zip(outcome.rows, outcome.claims, strict=True):
        ratio = f"{row['gd'] / row['adam']:.2g}"
        assert claim.measured.endswith(f"quartiles of GD / Adam {ratio} and {ratio}")


def test_the_correlation_of_two_angles_is_measured():
    """Two draws, of which the denser matrix has the smaller r: the correlation is 1."""
    changes = ("dimensions=[6]", "condition_numbers=[2]", "angles=[0, 0.05]")
    found = {}
    for seed in range(30):
        outcome = outcome_of("diagonal_preconditioner", f"seeds=[{seed}]", *changes)
        (claim,) = claims_of(outcome, "r falls as H gets more diagonal")
        first, second = outcome.rows
        rises = (second["r"] > first["r"]) == (second["tau"] < first["tau"])
        assert claim.measured.endswith(f"rank correlation of tau and r {-1 if rises else 1:.2f}")
        found[rises] = seed
    assert len(found) == 2


def test_eigenvalues_are_drawn_in_float64():
    outcome = outcome_of(
        "three_block_quadratic", "seeds=[0]", "block_size=1", "iterations=1", "rates=[0.1]", "eigenvalues=[[0.1],[7]]"
    )
    rates = {row["problem"]: row["rate"] for row in outcome.rows if row["method"] == "GD, one rate"}
    assert rates["block 1"] == pytest.approx(10, rel=1e-12)


def test_packaged_spectra_of_networks():
    """The direction of the claim: Adam is the faster one on the unlike blocks of a GPT-2, and not on a ResNet's."""
    lines = {line["case"]: line for line in outcome_of("quadratic_cases", "seeds=[0,1,2,3,4,5,6,7,8]").summary}
    assert lines[1]["adam"] < lines[1]["gd"]
    assert lines[3]["adam"] > lines[3]["gd"]


def test_spectra_of_networks_are_cases_1_and_3(tmp_path):
    mixed, even = tmp_path / "mixed.csv", tmp_path / "even.csv"
    mixed.write_text("block,eigenvalue\na,1\na,2\nb,1000\nb,1001\n", "utf-8")
    even.write_text("block,eigenvalue\na,1\na,1000\nb,2\nb,1001\n", "utf-8")
    assert read_spectra(str(mixed)) == [[1.0, 2.0], [1000.0, 1001.0]]
    changes = (
        f"heterogeneous_spectra={mixed}",
        f"homogeneous_spectra={even}",
        "seeds=[0,1,2]",
        "top_eigenvalues=[2000]",
    )
    outcome = outcome_of("quadratic_cases", *changes)
    assert [(line["case"], line["spectrum"]) for line in outcome.summary] == [
        (1, "mixed.csv"), (3, "even.csv"), (2, "1 to 2000"), (4, "1 to 2000"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("block,eigenvalue\na,-1\n", "line 2: eigenvalue -1.0; .*positive"),
        ("block,eigenvalue\na,1\na,nan\n", "line 3: eigenvalue nan"),
        ("name,value\na,1\n", "line 2: give columns block and eigenvalue"),
        ("block,eigenvalue\n", "no line with an eigenvalue"),
        ("block,eigenvalue\na,1\na,1e11\n", "condition number of 1e.11 is too large"),
        ("block,eigenvalue\n" + "a" * 200_000 + ",1\n", "is no CSV: field larger"),
    ],
)
def test_spectra_that_are_none_are_refused(tmp_path, text, message):
    (tmp_path / "spectra.csv").write_text(text, "utf-8")
    with pytest.raises(ValueError, match=message):
        read_spectra(str(tmp_path / "spectra.csv"))


def test_a_diagonal_preconditioner_helps_a_diagonal_matrix_alone():
    seeds = f"seeds={list(range(15))}"
    outcome = outcome_of("diagonal_preconditioner", seeds, "dimensions=[20]", "condition_numbers=[500]")
    assert [claim.holds for claim in outcome.claims] == [True] * 3


def test_a_small_condition_number_is_worsened_anyway():
    """With kappa 10 the spread of the weights costs more than the eigenvalues' own."""
    changes = ("seeds=[0,1,2,3,4,5,6,7,8]", "dimensions=[20]", "condition_numbers=[10]")
    assert holding(outcome_of("diagonal_preconditioner", *changes), "D improves a diagonal H") == [False]


def test_on_a_diagonal_matrix_the_weights_alone_are_left():
    """r = (max |w| / min |w|) / kappa at tau = 1."""
    outcome = outcome_of(
        "diagonal_preconditioner", "seeds=[3]", "dimensions=[6]", "condition_numbers=[50]", "angles=[0, 1]"
    )
    generator = Generator().manual_seed(3)
    torch.randperm(6, generator=generator)
    torch.randn(6, 6, generator=generator, dtype=torch.float64)
    weights = torch.randn(6, generator=generator, dtype=torch.float64).abs()
    row, _ = outcome.rows
    assert row["tau"] == pytest.approx(1)
    assert row["r"] == pytest.approx(float(weights.max() / weights.min()) / 50)
