"""Stochastic Lanczos quadrature: the density of a Hessian's eigenvalues from a few tridiagonal matrices.

Ghorbani, Krishnan and Xiao 2019, Sec. 2; Yao et al. 2020 (PyHessian), Sec. 3. A start vector of m Lanczos steps gives m
nodes and weights of a Gauss quadrature for its spectral measure; the mean over random starts estimates the density of
eigenvalues, here blurred by a Gaussian.

Shapes: `m` nodes, `g` points of the grid.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_adam_mini.hessian.lanczos import Tridiagonal

__all__ = [
    "DEFAULT_SIGMA",
    "Quadrature",
    "SpectralDensity",
    "density",
    "density_of_eigenvalues",
    "make_grid",
    "moments",
    "quadrature",
]

DEFAULT_STEPS, DEFAULT_PROBES = 100, 10
DEFAULT_SIGMA = math.sqrt(1e-5)
"""Width of the Gaussian, in units of the eigenvalues."""
DEFAULT_POINTS, DEFAULT_MARGIN = 50_000, 1.0
_CHUNK = 2**22
"""Values of Gaussians that are computed at a time: 32 MiB."""


@dataclass(frozen=True, eq=False)
class Quadrature:
    """A spectral measure as points of mass.

    Args:
        nodes: `(m,)`, ascending, float64.
        weights: `(m,)`, which sum to 1.
    """

    nodes: Tensor
    weights: Tensor


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """A density of eigenvalues on an evenly spaced grid.

    Args:
        grid: `(g,)`, float64.
        values: `(g,)`; `values.sum() * spacing` is 1.
        sigma: Width of the Gaussian.
    """

    grid: Tensor
    values: Tensor
    sigma: float

    @property
    def spacing(self) -> float:
        """Distance of two neighbours on the grid."""
        return ((self.grid[-1] - self.grid[0]) / (self.grid.numel() - 1)).item()

    @property
    def masses(self) -> Tensor:
        """Probability at each point of the grid; sums to 1."""
        return self.values * self.spacing


def quadrature(tridiagonal: Tridiagonal) -> Quadrature:
    """Nodes and weights: eigenvalues of T, and the squares of the first components of its eigenvectors."""
    nodes, firsts, _ = tridiagonal.ritz
    return Quadrature(nodes, firsts.square())


def make_grid(
    quadratures: Sequence[Quadrature], *, num_points: int = DEFAULT_POINTS, margin: float = DEFAULT_MARGIN
) -> Tensor:
    """A grid for all of some quadratures, so that their densities can be compared.

    The public code of the paper takes the mean over starts of the smallest and largest nodes; here they are the
    extremes over all, so that no mass lies outside.

    Args:
        quadratures: Of all blocks and starts.
        num_points: Points of the grid.
        margin: Added below and above, in units of the eigenvalues; some sigmas at least.

    Raises:
        ValueError: No quadrature, less than two points, or a margin that is not positive.
    """
    if not quadratures or num_points < 2 or not margin > 0:
        raise ValueError("a grid needs a quadrature, two points or more, and a positive margin")
    low = min(q.nodes[0].item() for q in quadratures)
    high = max(q.nodes[-1].item() for q in quadratures)
    return torch.linspace(low - margin, high + margin, num_points, dtype=torch.float64)


def density(quadratures: Sequence[Quadrature], grid: Tensor, *, sigma: float = DEFAULT_SIGMA) -> SpectralDensity:
    """The mean over starts of the measures, blurred by a Gaussian and normalised on the grid.

    Args:
        quadratures: One for each start.
        grid: `(g,)`, evenly spaced and ascending; see `make_grid`.
        sigma: Width of the Gaussian, in units of the eigenvalues.

    Raises:
        ValueError: No quadrature, a sigma that is not positive, an uneven grid, or a grid that has no mass on it.
    """
    if not quadratures:
        raise ValueError("a density needs the quadrature of one start at least")
    nodes = torch.cat([q.nodes for q in quadratures])
    weights = torch.cat([q.weights for q in quadratures]) / len(quadratures)
    return _blur(nodes, weights, grid, sigma)


def density_of_eigenvalues(eigenvalues: Tensor, grid: Tensor, *, sigma: float = DEFAULT_SIGMA) -> SpectralDensity:
    """The same curve of known eigenvalues `(n,)`: the mean over them of Gaussians.

    Raises:
        ValueError: As in `density`.
    """
    values = eigenvalues.to(torch.float64).flatten()
    return _blur(values, torch.full_like(values, 1 / max(values.numel(), 1)), grid, sigma)


def moments(quadratures: Sequence[Quadrature], order: int) -> tuple[float, float]:
    """The mean of the eigenvalues to a power, `trace(H^k) / n`: an estimate over starts and its standard error.

    For each start it is `v^T H^k v`, exact up to `k = 2 m - 1` for m steps.

    Args:
        quadratures: One for each start.
        order: The power k.

    Returns:
        The mean, and its standard error, NaN for one start.
    """
    samples = torch.stack([(q.weights * q.nodes**order).sum() for q in quadratures])
    return samples.mean().item(), _standard_error(samples)


def _standard_error(samples: Tensor) -> float:
    return (samples.std() / samples.numel() ** 0.5).item() if samples.numel() > 1 else math.nan


def _blur(nodes: Tensor, weights: Tensor, grid: Tensor, sigma: float) -> SpectralDensity:
    spacings = grid.diff()
    if grid.numel() < 2 or not spacings.min() > 0 or spacings.max() - spacings.min() > 1e-6 * spacings.max():
        raise ValueError("the grid must be evenly spaced and ascending, of two points or more: see make_grid")
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, not {sigma}")
    spacing = ((grid[-1] - grid[0]) / (grid.numel() - 1)).item()
    if sigma < spacing:
        warnings.warn(
            f"sigma {sigma:.3g} is below the spacing of the grid, {spacing:.3g}: mass falls between its points. Take "
            f"{math.ceil((grid[-1] - grid[0]).item() / sigma) + 1} points or a sigma of {spacing:.3g} or more",
            stacklevel=3,
        )
    values = torch.zeros(grid.numel(), dtype=torch.float64)
    length = max(1, _CHUNK // grid.numel())
    for some, shares in zip(nodes.split(length), weights.split(length), strict=True):
        distances = (grid.unsqueeze(1) - some) / sigma
        values += distances.square_().mul_(-0.5).exp_() @ shares
    total = values.sum().item() * spacing
    if not total > 0:
        raise ValueError("no mass lies on the grid: widen it, or make sigma larger (see the warning, if there is one)")
    return SpectralDensity(grid, values / total, sigma)
