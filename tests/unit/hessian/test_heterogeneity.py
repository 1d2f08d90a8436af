"""Divergences between spectra: bounds, known values, and what scales them."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_adam_mini.hessian.heterogeneity import (
    Scale,
    common_densities,
    compare_spectra,
    heterogeneity_of,
    js_divergence,
)
from lightning_adam_mini.hessian.lanczos import Tridiagonal, lanczos
from lightning_adam_mini.hessian.spectrum import density_of_eigenvalues
from lightning_adam_mini.hessian.vectors import ParameterBlock

GRID = torch.linspace(-30, 30, 6001, dtype=torch.float64)
eigenvalues = st.lists(st.floats(-20, 20), min_size=1, max_size=8)


def curve(values, sigma=0.5):
    return density_of_eigenvalues(torch.tensor(values), GRID, sigma=sigma)


def tridiagonals(values, starts=2, seed=0):
    """Lanczos on a diagonal matrix, to the end."""
    diagonal = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(starts, len(values), generator=generator, dtype=torch.float64)
    return [lanczos(lambda v: diagonal * v, start, len(values)) for start in draws]


@settings(max_examples=30, deadline=None)
@given(eigenvalues, eigenvalues)
def test_divergence_is_symmetric_bounded_and_zero_on_itself(first, second):
    a, b = curve(first), curve(second)
    assert js_divergence(a, a) == pytest.approx(0, abs=1e-12)
    assert 0 <= js_divergence(a, b) <= math.log(2)
    assert js_divergence(a, b) == pytest.approx(js_divergence(b, a), abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(eigenvalues, eigenvalues, eigenvalues)
def test_distance_obeys_the_triangle_inequality(first, second, third):
    a, b, c = curve(first), curve(second), curve(third)
    ab, bc, ac = (math.sqrt(js_divergence(*pair)) for pair in ((a, b), (b, c), (a, c)))
    assert ac <= ab + bc + 1e-6


def test_disjoint_spectra_are_ln_2_apart():
    assert js_divergence(curve([-10.0]), curve([10.0])) == pytest.approx(math.log(2), rel=1e-9)


def test_half_of_the_mass_in_common():
    # Masses 1/2 + 1/2 against 1: half of the first lies where the second has nothing, and all else overlaps.
    expected = 0.5 * math.log(2) * 0.5 + 0.5 * (0.5 * math.log(0.5 / 0.75) + math.log(1 / 0.75))
    assert js_divergence(curve([-10.0, 10.0]), curve([10.0])) == pytest.approx(expected, rel=1e-9)


def test_the_unnormalized_sum_depends_on_the_grid_and_has_no_bound():
    spectra = {"a": tridiagonals([-10.0, -11.0]), "b": tridiagonals([10.0, 11.0])}
    coarse, fine = (compare_spectra(spectra, sigma=0.5, num_points=points) for points in (3001, 6001))
    assert fine.js0_unnormalized == pytest.approx(2 * coarse.js0_unnormalized, rel=1e-6)
    assert coarse.js0_unnormalized == pytest.approx(math.log(2) / coarse.spacing, rel=1e-6)


def test_densities_on_two_grids_are_refused():
    with pytest.raises(ValueError, match="different grids"):
        js_divergence(curve([0.0]), density_of_eigenvalues(torch.tensor([0.0]), GRID + 1, sigma=0.5))


def test_scales_tell_size_from_shape():
    spectra = {"a": tridiagonals([1.0, 2.0, 3.0]), "b": tridiagonals([10.0, 20.0, 30.0])}
    raw = compare_spectra(spectra, sigma=0.05)
    top = compare_spectra(spectra, scale="top", sigma=0.05)
    assert raw.js0 == pytest.approx(math.log(2), rel=1e-6)
    assert top.js0 < 0.05  # the same starts: the same weights of the same nodes
    assert raw.js0_unnormalized == pytest.approx(raw.js0 / raw.spacing)
    assert raw.js0_distance == pytest.approx(math.sqrt(raw.js0))


def divided(found, unit):
    return [Tridiagonal(t.alphas / unit, t.betas / unit, t.residual / unit, t.orthogonality) for t in found]


def test_the_largest_of_all_blocks_is_the_unit_of_a_model():
    """Blocks differ by size as in the raw unit, and as much in a model that is sharper throughout."""
    spectra = {"a": tridiagonals([1.0, 2.0, 3.0]), "b": tridiagonals([-40.0, 20.0, 30.0])}
    found = compare_spectra(spectra, scale="model", sigma=0.01)
    by_hand = compare_spectra({name: divided(some, 40.0) for name, some in spectra.items()}, sigma=0.01)
    torch.testing.assert_close(found.divergences, by_hand.divergences)
    assert found.spacing == pytest.approx(by_hand.spacing)
    for factor in (1e-6, 1e3):
        scaled = {name: divided(some, 1 / factor) for name, some in spectra.items()}
        again = compare_spectra(scaled, scale=Scale.MODEL, sigma=0.01)
        torch.testing.assert_close(again.divergences, found.divergences)
    assert found.scale is Scale.MODEL


def test_tenth_largest_is_the_unit():
    values = [float(v) for v in range(1, 15)]  # the 10th largest is 5
    found = common_densities({"a": tridiagonals(values), "b": tridiagonals(values)}, scale=Scale.TENTH, sigma=0.02)
    grid, masses = found["a"].grid, found["a"].masses
    assert masses[(grid > 0.15) & (grid < 2.85)].sum() > 0.99
    assert masses[grid > 2.75].sum() > 1e-6  # 14 / 5 = 2.8


@pytest.mark.parametrize(
    ("spectra", "options", "message"),
    [
        ({"a": [1.0, 2.0]}, {}, "give two or more"),
        ({"a": [1.0, 2.0], "b": [1.0, 3.0]}, {"scale": "median"}, "unknown scale 'median'; choose from raw, model"),
        ({"a": [1.0, 2.0], "b": [1.0, 3.0]}, {"sigma": 0.0}, "sigma must be positive and finite, not 0"),
        ({"a": [1.0, 2.0], "b": [1.0, 3.0]}, {"sigma": math.nan}, "sigma must be positive and finite, not nan"),
        ({"a": [0.0, 0.0], "b": [0.0, 0.0]}, {"scale": "model"}, "largest absolute eigenvalue of all blocks is 0"),
        ({"a": [0.0, 0.0], "b": [1.0, 2.0]}, {"scale": "top"}, "largest absolute eigenvalue of a is 0"),
        ({"a": [1.0, 2.0], "b": [1.0, 3.0]}, {"scale": "tenth"}, "no 10th"),
        ({"a": [-2.0] * 1 + list(range(-20, -1)), "b": [1.0, 3.0]}, {"scale": "tenth"}, "no unit|no 10th"),
    ],
)
def test_bad_input(spectra, options, message):
    found = {name: tridiagonals([float(v) for v in values]) for name, values in spectra.items()}
    with pytest.raises(ValueError, match=message):
        compare_spectra(found, **options)


def test_a_block_without_spectrum_is_refused():
    with pytest.raises(ValueError, match="no spectrum"):
        compare_spectra({"a": [], "b": tridiagonals([1.0, 2.0])})


class Quadratic(nn.Module):
    """Two matrices with Hessians `diag(1, 2, 3, 4)` and a multiple of it, and a vector that is left out."""

    def __init__(self, factor):
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(2, 2, dtype=torch.float64)) for _ in range(2))
        self.bias = nn.Parameter(torch.randn(4, dtype=torch.float64))
        self.factor = factor

    def loss(self, _):
        weights = torch.arange(1, 5, dtype=torch.float64).view(2, 2)
        both = (weights * self.first**2).sum() + self.factor * (weights * self.second**2).sum()
        return both / 2 + self.bias.square().sum()


def of_quadratic(factor, **options):
    return heterogeneity_of(Quadratic(factor), Quadratic.loss, [0], steps=4, probes=4, sigma=0.1, **options)


def test_from_a_model_to_js0():
    found = [of_quadratic(factor).js0 for factor in (1.0, 3.0, 100.0)]
    assert of_quadratic(1.0).names == ("first", "second")
    assert all(a < b for a, b in pairwise(found))
    chosen = of_quadratic(1.0, blocks=[ParameterBlock(name, name) for name in ("first", "bias")])
    assert chosen.names == ("first", "bias")


@pytest.mark.slow
def test_blocks_of_a_model_under_wrappers_are_found():
    model = Quadratic(3.0)
    wrapped = torch.compile(model)
    options = {"steps": 4, "probes": 4, "sigma": 0.1}
    plain, found = (heterogeneity_of(m, lambda m, _: m.loss(0), [0], **options) for m in (model, wrapped))
    assert found.names == plain.names == ("first", "second")
    assert found.js0 == plain.js0


def test_fewer_than_two_blocks_are_refused_before_the_work(monkeypatch):
    from lightning_adam_mini.hessian import heterogeneity

    monkeypatch.setattr(heterogeneity, "block_tridiagonals", lambda *_, **__: pytest.fail("the work began"))
    with pytest.raises(ValueError, match="there are 0: give two or more, or fewer steps"):
        heterogeneity_of(Quadratic(1.0), Quadratic.loss, [0], steps=5)
    with pytest.raises(ValueError, match="unknown scale"):
        heterogeneity_of(Quadratic(1.0), Quadratic.loss, [0], steps=4, scale="median")
