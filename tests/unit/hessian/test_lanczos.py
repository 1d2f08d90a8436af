"""Lanczos on matrices whose spectrum is known, and its memory on a whole model."""

import pytest
import torch
from torch import nn

from apart import apart, assert_passes_apart
from hessian_models import build, classify, known_hessian, offsets
from lightning_adam_mini.hessian import (
    HessianOperator,
    ParameterBlock,
    block_tridiagonals,
    lanczos,
    model_tridiagonals,
    parameter_blocks,
)
from lightning_adam_mini.hessian.lanczos import vector_bytes
from lightning_adam_mini.measure.memory import peak_extra_bytes

CPU = torch.device("cpu")


def symmetric(eigenvalues, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator))
    return q @ torch.diag(values) @ q.T


def start_of(size, seed=1):
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# A few large eigenvalues converge early: then the plain recurrence loses orthogonality.
HARD = torch.cat([torch.linspace(-1, 1, 290, dtype=torch.float64), torch.logspace(1, 3, 10, dtype=torch.float64)])


def test_vectors_are_orthogonal_after_100_steps_and_satisfy_the_recurrence():
    matrix = symmetric(HARD)
    found = lanczos(matrix.mv, start_of(300), 100, reorthogonalize=True)
    basis = found.vectors
    measured = (basis @ basis.T - torch.eye(100)).abs().max().item()
    assert found.orthogonality == pytest.approx(measured, rel=0.5)
    assert measured < 1e-10
    rest = matrix @ basis.T - basis.T @ found.matrix()
    assert rest[:, :-1].abs().max() < 1e-10
    assert rest[:, -1].norm().item() == pytest.approx(found.residual, rel=1e-8)


def test_the_recurrence_measures_the_orthogonality_that_it_loses():
    matrix = symmetric(HARD)
    found = lanczos(matrix.mv, start_of(300), 100, reorthogonalize=False)
    assert found.vectors is None
    assert found.orthogonality > 1e-3
    few = lanczos(matrix.mv, start_of(300), 10, reorthogonalize=False)
    assert few.orthogonality < 1e-6, "before the large eigenvalues have converged"
    torch.testing.assert_close(few.alphas, lanczos(matrix.mv, start_of(300), 10).alphas, rtol=1e-9, atol=1e-9)
    # A function that gives the start is as good.
    again = lanczos(matrix.mv, lambda: start_of(300), 100, reorthogonalize=False)
    assert again.orthogonality == found.orthogonality


def test_as_many_steps_as_rows_give_all_eigenvalues():
    values = torch.tensor([-3.0, -1, 0, 0.5, 2, 7], dtype=torch.float64)
    found = lanczos(symmetric(values).mv, start_of(6), 6)
    torch.testing.assert_close(torch.linalg.eigvalsh(found.matrix()), values, rtol=1e-12, atol=1e-12)
    assert found.residual == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_an_invariant_subspace_ends_it(reorthogonalize):
    values = torch.cat([torch.zeros(46), torch.tensor([1.0, 2, 3, 9])])
    found = lanczos(symmetric(values).mv, start_of(50), 20, reorthogonalize=reorthogonalize)
    assert found.steps == 5
    assert found.residual == 0
    expected = torch.tensor([0.0, 1, 2, 3, 9], dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.eigvalsh(found.matrix()), expected, rtol=1e-9, atol=1e-9)


def test_the_zero_operator_takes_one_step():
    found = lanczos(torch.zeros_like, start_of(9), 5)
    assert (found.steps, found.alphas.item(), found.residual) == (1, 0, 0)


def test_float32_vectors_have_inner_products_in_float64():
    """A sum of 2^25 ones in float32 stops at 2^24."""
    ones = torch.ones(2**25)
    found = lanczos(lambda vector: vector * 2, ones, 1, reorthogonalize=False)
    assert found.alphas.item() == pytest.approx(2, rel=1e-6)


def test_the_start_is_left_as_it_was():
    start = start_of(6)
    before = start.clone()
    lanczos(symmetric(torch.arange(6)).mv, start, 3)
    assert torch.equal(start, before)


def test_the_budget_decides():
    assert vector_bytes(100, 10, torch.float32) == 4000
    matrix = symmetric(torch.arange(10.0))
    assert lanczos(matrix.mv, start_of(10), 4, budget_bytes=4 * 10 * 8).vectors is not None
    assert lanczos(matrix.mv, start_of(10), 4, budget_bytes=4 * 10 * 8 - 1).vectors is None


@pytest.mark.parametrize(
    ("start", "message"),
    [(torch.zeros(4), "norm 0"), (torch.full((4,), float("nan")), "norm nan")],
)
def test_a_bad_start_is_refused(start, message):
    with pytest.raises(ValueError, match=message):
        lanczos(lambda vector: vector.clone(), start, 2)


def test_a_function_as_start_needs_the_mode():
    with pytest.raises(ValueError, match="reorthogonalize=True or False"):
        lanczos(lambda vector: vector.clone(), lambda: torch.ones(4), 2)


def test_blocks_in_step_equal_each_block_alone():
    model, batches = build("tied")
    operator = HessianOperator(model, classify, batches, dtype=torch.float64)
    blocks = [block for block in parameter_blocks(model) if not block.name.startswith("unused")]
    together = block_tridiagonals(operator, blocks, steps=4, probes=2, seed=5)
    for block in blocks:
        (alone,) = block_tridiagonals(operator, [block], steps=4, probes=2, seed=5).values()
        for one, other in zip(together[block.name], alone, strict=True):
            torch.testing.assert_close(one.matrix(), other.matrix(), rtol=1e-9, atol=1e-12)
    first, second = together["hidden.weight"]
    assert not torch.equal(first.alphas, second.alphas), "probes differ"


def test_a_block_with_as_many_steps_as_rows_has_the_eigenvalues_of_its_slice():
    model, batches = build("tied")
    operator = HessianOperator(model, classify, batches, dtype=torch.float64)
    block = ParameterBlock("some", "embed.weight", torch.tensor([1, 5, 9, 20]))
    (found,) = block_tridiagonals(operator, [block], steps=4, probes=1)["some"]
    positions = offsets(model)["embed.weight"] + block.index
    expected = torch.linalg.eigvalsh(known_hessian("tied")[positions][:, positions])
    torch.testing.assert_close(torch.linalg.eigvalsh(found.matrix()), expected, rtol=1e-9, atol=1e-11)


def test_a_block_that_ends_early_leaves_the_others_as_they_are():
    """A parameter that the loss does not reach is done after one step."""
    model, batches = build("tied")
    operator = HessianOperator(model, classify, batches, dtype=torch.float64)
    by_name = {block.name: block for block in parameter_blocks(model)}
    chosen = [by_name[name] for name in ("unused.weight", "hidden.weight")]
    together = block_tridiagonals(operator, chosen, steps=4, probes=2)
    alone = block_tridiagonals(operator, chosen[1:], steps=4, probes=2)
    assert [found.steps for found in together["unused.weight"]] == [1, 1]
    for one, other in zip(together["hidden.weight"], alone["hidden.weight"], strict=True):
        assert one.steps == 4
        torch.testing.assert_close(one.matrix(), other.matrix(), rtol=1e-9, atol=1e-12)


def test_blocks_that_do_not_fit_run_by_the_recurrence(caplog):
    model, batches = build("tied")
    operator = HessianOperator(model, classify, batches, dtype=torch.float64)
    blocks = [block for block in parameter_blocks(model) if block.name in {"hidden.bias", "embed.weight"}]
    with caplog.at_level("INFO"):
        found = block_tridiagonals(operator, blocks, steps=4, probes=1, budget_bytes=4 * 4 * 8)
    assert "embed.weight" in caplog.text
    assert "hidden.bias" not in caplog.text
    kept = block_tridiagonals(operator, blocks, steps=4, probes=1)
    for block in blocks:
        torch.testing.assert_close(found[block.name][0].matrix(), kept[block.name][0].matrix(), rtol=1e-8, atol=1e-10)


def test_the_whole_model_has_the_extreme_eigenvalues_of_the_dense_hessian():
    model, batches = build("tied")
    operator = HessianOperator(model, classify, batches, dtype=torch.float64)
    counts = []
    found = model_tridiagonals(operator, steps=30, probes=2, on_step=lambda done, total: counts.append((done, total)))
    exact = torch.linalg.eigvalsh(known_hessian("tied"))
    for tridiagonal in found:
        nodes = torch.linalg.eigvalsh(tridiagonal.matrix())
        torch.testing.assert_close(nodes[[0, -1]], exact[[0, -1]], rtol=1e-8, atol=1e-10)
        assert tridiagonal.vectors is None
    assert counts[-1] == (counts[-1][0], 60)


@apart
def test_the_recurrence_takes_four_copies_of_the_parameters():
    """Two vectors, the product, and what the second backward pass gathers; then a layer for a moment."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(128, 128, bias=False), nn.Tanh()) for _ in range(40)))
    batches = [torch.randn(1, 128)]
    operator = HessianOperator(model, lambda m, x: m(x).square().sum(), batches)
    parameter_bytes = 4 * operator.size
    operator.product(torch.ones(operator.size))
    extra = peak_extra_bytes(lambda: model_tridiagonals(operator, steps=12, probes=1, budget_bytes=0), CPU)
    assert 3.5 * parameter_bytes < extra < 4.5 * parameter_bytes
    kept = peak_extra_bytes(lambda: model_tridiagonals(operator, steps=12, probes=1), CPU)
    assert kept > 12 * parameter_bytes, "else the test measures nothing"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op, blocks: model_tridiagonals(op, steps=100_000), "100000 Lanczos steps for the model"),
        (lambda op, blocks: model_tridiagonals(op, steps=1, probes=0), "one random vector"),
        (lambda op, blocks: block_tridiagonals(op, blocks, steps=5), "5 Lanczos steps for hidden.bias.*use at most 4"),
        (lambda op, blocks: block_tridiagonals(op, [blocks[0]] * 2, steps=2), "two blocks have one name"),
    ],
)
def test_bad_requests_are_refused(call, message):
    model, batches = build("tied")
    blocks = [block for block in parameter_blocks(model) if not block.name.startswith("unused")]
    with pytest.raises(ValueError, match=message):
        call(HessianOperator(model, classify, batches), blocks)


@pytest.mark.slow
@pytest.mark.skipif(not apart.args[0], reason="this is the process")
def test_in_a_process_of_its_own():
    assert_passes_apart(__file__)
