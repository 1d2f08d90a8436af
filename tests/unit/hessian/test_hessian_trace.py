"""Traces and top eigenvalues against dense Hessians."""

import math

import pytest
import torch

from hessian_models import build, classify, known_hessian, offsets
from lightning_adam_mini.hessian import (
    HessianOperator,
    block_traces,
    lanczos,
    parameter_blocks,
    top_eigenvalues,
    trace,
)


def operator_of(name="tied"):
    model, batches = build(name)
    return model, HessianOperator(model, classify, batches, dtype=torch.float64)


def test_the_trace_lies_within_its_standard_errors():
    _, operator = operator_of()
    exact = known_hessian("tied").trace().item()
    found = trace(operator, probes=200)
    assert 0 < found.standard_error < 0.2 * abs(exact)
    assert abs(found.value - exact) < 4 * found.standard_error
    assert found.value == pytest.approx(found.samples.mean().item())


def test_signs_make_the_trace_of_a_diagonal_hessian_exact():
    model = torch.nn.Linear(3, 1, bias=False).double()
    scale = torch.tensor([1.0, 5, -2]).double()
    operator = HessianOperator(model, lambda m, x: (m.weight.square() * x).sum() / 2, [scale])
    found = trace(operator, probes=3)
    assert found.value == pytest.approx(4, rel=1e-12)
    assert found.standard_error == pytest.approx(0, abs=1e-12)
    assert math.isnan(trace(operator, probes=1).standard_error)


def test_blocks_have_the_traces_of_their_slices():
    model, operator = operator_of()
    blocks = [block for block in parameter_blocks(model) if not block.name.startswith("unused")]
    found = block_traces(operator, blocks, probes=100)
    diagonal, starts = known_hessian("tied").diagonal(), offsets(model)
    for block in blocks:
        start = starts[block.parameter]
        exact = diagonal[start : start + operator.block_size(block)].sum().item()
        assert abs(found[block.name].value - exact) < 4 * found[block.name].standard_error + 1e-12
        (alone,) = block_traces(operator, [block], probes=3).values()
        torch.testing.assert_close(alone.samples, found[block.name].samples[:3], rtol=1e-9, atol=1e-12)


def test_top_eigenvalues_and_their_residuals():
    dense = known_hessian("tied")
    found = lanczos(dense.mv, torch.randn(len(dense), dtype=torch.float64), 25)
    exact = torch.linalg.eigvalsh(dense)
    top = top_eigenvalues(found, 3)
    torch.testing.assert_close(top.values, exact.flip(0)[:3], rtol=1e-4, atol=0)
    ritz = torch.linalg.eigh(found.matrix())[1][:, -3:].flip(1)
    vectors = found.vectors.T @ ritz
    residuals = (dense @ vectors - vectors * top.values).norm(dim=0)
    torch.testing.assert_close(top.residuals, residuals, rtol=1e-3, atol=1e-9)
    assert top_eigenvalues(found, 1).values[0] > top_eigenvalues(found, 25).values[-1]


def test_by_magnitude_takes_negative_ones_too():
    matrix = torch.diag(torch.tensor([-9.0, 1, 2, 3]).double())
    found = lanczos(matrix.mv, torch.ones(4).double(), 4)
    torch.testing.assert_close(top_eigenvalues(found, 2).values, torch.tensor([3.0, 2]).double())
    torch.testing.assert_close(top_eigenvalues(found, 2, by_magnitude=True).values, torch.tensor([-9.0, 3]).double())


def test_bad_requests_are_refused():
    _, operator = operator_of()
    with pytest.raises(ValueError, match="one random vector"):
        trace(operator, probes=0)
    with pytest.raises(ValueError, match="one random vector"):
        block_traces(operator, [], probes=0)
    found = lanczos(torch.clone, torch.ones(3), 2)
    with pytest.raises(ValueError, match="2 eigenvalues from 1 Lanczos steps: ask for 1 to 1"):
        top_eigenvalues(found, 2)
