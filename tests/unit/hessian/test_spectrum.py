"""Quadrature against closed forms and curvlinops; traces and top eigenvalues against dense Hessians."""

import math

import pytest
import torch
from torch import nn

from hessian_models import build, classify, known_hessian, offsets
from lightning_adam_mini.hessian import (
    HessianOperator,
    Quadrature,
    block_traces,
    density,
    density_of_eigenvalues,
    lanczos,
    make_grid,
    moments,
    parameter_blocks,
    quadrature,
    top_eigenvalues,
    trace,
)
from lightning_adam_mini.hessian.spectrum import DEFAULT_SIGMA


def symmetric(eigenvalues):
    q, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=torch.float64))
    return q @ torch.diag(eigenvalues) @ q.T


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_moments_of_one_start_are_exact_up_to_twice_the_steps(steps):
    matrix = symmetric(torch.linspace(-1, 2, 40, dtype=torch.float64))
    start = torch.randn(40, dtype=torch.float64)
    found = quadrature(lanczos(matrix.mv, start, steps))
    assert found.weights.sum().item() == pytest.approx(1, abs=1e-13)
    unit, image = start / start.norm(), start / start.norm()
    for order in range(2 * steps + 1):
        expected = torch.dot(unit, image).item()
        exact = moments([found], order)[0] == pytest.approx(expected, rel=1e-10, abs=1e-12)
        assert exact == (order <= 2 * steps - 1), order
        image = matrix @ image


def test_moments_over_starts_estimate_traces_of_powers():
    values = torch.linspace(-1, 2, 60, dtype=torch.float64)
    matrix = symmetric(values)
    found = [quadrature(lanczos(matrix.mv, torch.randn(60, dtype=torch.float64), 6)) for _ in range(200)]
    for order in (1, 2, 3):
        mean, error = moments(found, order)
        assert 0 < error < 0.1
        assert abs(mean - values.pow(order).mean().item()) < 4 * error
    assert math.isnan(moments(found[:1], 1)[1])


def test_moments_of_a_model_agree_with_products_of_curvlinops():
    curvlinops = pytest.importorskip("curvlinops")
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = [(torch.randn(5, 3).double(), torch.randint(2, (5,))) for _ in range(2)]
    other = curvlinops.HessianLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), data)
    operator = HessianOperator(model, classify, data)
    start = torch.randn(operator.size, dtype=torch.float64)
    found = quadrature(lanczos(operator.product, start, 4))
    image = unit = start / start.norm()
    for order in range(8):
        assert moments([found], order)[0] == pytest.approx(torch.dot(unit, image).item(), rel=1e-9)
        image = other @ image


def test_a_density_of_known_eigenvalues_is_the_mean_of_gaussians():
    values = torch.tensor([-0.5, 0.0, 0.0, 2.0], dtype=torch.float64)
    grid = torch.linspace(-1, 3, 2001, dtype=torch.float64)
    found = density_of_eigenvalues(values, grid, sigma=0.05)
    expected = (-0.5 * ((grid[:, None] - values) / 0.05) ** 2).exp().mean(1) / (0.05 * (2 * torch.pi) ** 0.5)
    torch.testing.assert_close(found.values, expected, rtol=1e-10, atol=1e-12)
    assert found.masses.sum().item() == pytest.approx(1, abs=1e-12)
    assert found.spacing == pytest.approx(0.002)


def test_lanczos_with_all_steps_has_the_density_of_the_eigenvalues_in_the_mean():
    values = torch.cat([torch.zeros(30), torch.full((10,), 4.0)]).double()
    matrix = symmetric(values)
    found = [quadrature(lanczos(matrix.mv, torch.randn(40, dtype=torch.float64), 5)) for _ in range(300)]
    grid = make_grid(found, num_points=4000)
    curve, exact = density(found, grid, sigma=0.05), density_of_eigenvalues(values, grid, sigma=0.05)
    assert 0.5 * (curve.masses - exact.masses).abs().sum() < 0.03, "total variation"


def test_the_grid_holds_all_nodes_with_a_margin():
    found = [Quadrature(torch.tensor([-2.0, 5]).double(), torch.tensor([0.5, 0.5]).double())]
    found += [Quadrature(torch.tensor([0.0, 9]).double(), torch.tensor([0.5, 0.5]).double())]
    grid = make_grid(found)
    assert (grid[0].item(), grid[-1].item(), grid.numel()) == (-3, 10, 50_000)
    assert density(found, grid).masses.sum().item() == pytest.approx(1, abs=1e-12)
    assert math.sqrt(1e-5) == DEFAULT_SIGMA


def test_a_sigma_below_the_spacing_warns():
    found = [Quadrature(torch.tensor([0.0]).double(), torch.ones(1).double())]
    grid = make_grid(found, num_points=101)  # a spacing of 0.02
    with pytest.warns(UserWarning, match="below the spacing.*201 points"):
        density(found, grid, sigma=0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda grid: density([], grid), "one start at least"),
        (lambda grid: density_of_eigenvalues(torch.zeros(2), grid, sigma=0), "sigma must be positive"),
        (lambda grid: density_of_eigenvalues(torch.zeros(2), grid.square()), "evenly spaced"),
        (lambda grid: density_of_eigenvalues(torch.full((1,), 9.0), grid, sigma=0.02), "no mass lies on the grid"),
        (lambda grid: make_grid([]), "needs a quadrature"),
        (lambda grid: make_grid([Quadrature(torch.zeros(1), torch.ones(1))], margin=0), "positive margin"),
    ],
)
def test_bad_requests_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.linspace(-1, 1, 201, dtype=torch.float64))


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


def test_bad_requests_of_traces_and_eigenvalues_are_refused():
    _, operator = operator_of()
    with pytest.raises(ValueError, match="one random vector"):
        trace(operator, probes=0)
    with pytest.raises(ValueError, match="one random vector"):
        block_traces(operator, [], probes=0)
    found = lanczos(torch.clone, torch.ones(3), 2)
    with pytest.raises(ValueError, match="2 eigenvalues from 1 Lanczos steps: ask for 1 to 1"):
        top_eigenvalues(found, 2)
