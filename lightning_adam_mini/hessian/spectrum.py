"""Spectra of a model's Hessian or of its blocks: Lanczos from random starts, densities, traces and top eigenvalues.

Stochastic Lanczos quadrature: Ghorbani, Krishnan and Xiao 2019, Sec. 2; Yao et al. 2020 (PyHessian), Sec. 3. A start
vector of m Lanczos steps gives m nodes and weights of a Gauss quadrature for its spectral measure; the mean over random
starts, blurred by a Gaussian, estimates the density of eigenvalues.

Shapes: `m` nodes, `g` points of the grid.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lightning_adam_mini.hessian.lanczos import DEFAULT_BUDGET, Recurrence, Tridiagonal, check_steps, vector_bytes
from lightning_adam_mini.hessian.operators import HessianOperator
from lightning_adam_mini.hessian.vectors import ParameterBlock, probe, probe_seed

__all__ = [
    "DEFAULT_SIGMA",
    "Quadrature",
    "RitzValues",
    "SpectralDensity",
    "TraceEstimate",
    "block_traces",
    "block_tridiagonals",
    "density",
    "density_of_eigenvalues",
    "make_grid",
    "model_tridiagonals",
    "moments",
    "quadrature",
    "top_eigenvalues",
    "trace",
]

_logger = logging.getLogger(__name__)

DEFAULT_STEPS, DEFAULT_PROBES = 100, 10
DEFAULT_SIGMA = math.sqrt(1e-5)
"""Width of the Gaussian, in units of the eigenvalues."""
DEFAULT_POINTS, DEFAULT_MARGIN = 50_000, 1.0
_CHUNK = 2**22
"""Values of Gaussians that are computed at a time: 32 MiB."""


def model_tridiagonals(
    operator: HessianOperator,
    *,
    steps: int = DEFAULT_STEPS,
    probes: int = DEFAULT_PROBES,
    seed: int = 0,
    budget_bytes: int = DEFAULT_BUDGET,
    on_step: Callable[[int, int], None] | None = None,
) -> list[Tridiagonal]:
    """Lanczos with the whole Hessian from random normal starts, one after another.

    Vectors of a start are kept for reorthogonalisation where they fit the budget, and freed afterwards. Else the
    three-term recurrence runs, whose memory beyond the model and its activations is four times the parameters: two
    vectors, and two more while a product is computed. What the vectors leave of the budget goes to the graphs of
    gradients, which spare each product the first two of its three passes.

    Args:
        operator: The Hessian.
        steps: Lanczos steps of a start.
        probes: Number of starts.
        seed: Of the starts.
        budget_bytes: For kept vectors and graphs, per rank; with 0 none is kept.
        on_step: Called after each product with the number of products so far and in all.

    Returns:
        A tridiagonal matrix for each start, without its vectors.

    Raises:
        ValueError: More steps than parameters, or no start.
    """
    check_steps(steps, {"the model": operator.size})
    _check_probes(probes)
    needed = vector_bytes(steps, operator.local_size, operator.dtype)
    keeps = needed <= budget_bytes
    if not keeps:
        _logger.info(
            "Lanczos by the three-term recurrence: the vectors of %d steps would take %.1f GB, and the budget is %.1f",
            steps,
            needed / 1e9,
            budget_bytes / 1e9,
        )
    found = []
    with operator.keep_graphs(budget_bytes - (needed if keeps else 0)):
        for number in range(probes):
            start = partial(operator.layout.random, probe_seed(seed, "", number))
            recurrence = Recurrence(start, steps, reorthogonalize=keeps, dots=operator.layout.dots)
            unused = None
            while not recurrence.is_done:
                unused = recurrence.advance(operator.product(recurrence.vector, out=unused))
                if on_step:
                    on_step(number * steps + recurrence.steps, probes * steps)
            found.append(replace(recurrence.result(), vectors=None))
            del recurrence, unused
    return found


def block_tridiagonals(
    operator: HessianOperator,
    blocks: Sequence[ParameterBlock],
    *,
    steps: int = DEFAULT_STEPS,
    probes: int = DEFAULT_PROBES,
    seed: int = 0,
    budget_bytes: int = DEFAULT_BUDGET,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, list[Tridiagonal]]:
    """Lanczos with principal blocks of the Hessian, in step: all blocks and starts share the passes over the batches.

    Args:
        operator: The Hessian.
        blocks: Blocks with unique names.
        steps: Lanczos steps of a start; at most as many as the smallest block has rows.
        probes: Random normal starts of each block.
        seed: Of the starts; those of a block do not depend on which other blocks there are.
        budget_bytes: For the kept vectors of all blocks and starts together. Blocks are reorthogonalised from the
            smallest on, as long as they fit; the others run by the three-term recurrence. What is left goes to the
            graphs of gradients.
        on_step: Called after each pass with the number of passes so far and in all.

    Returns:
        By the name of the block, a tridiagonal matrix for each start, without its vectors.

    Raises:
        ValueError: More steps than rows of a block, an unknown block, two blocks of one name, or no start.
    """
    names = [block.name for block in blocks]
    if len(set(names)) < len(names):
        raise ValueError(f"two blocks have one name: {sorted({name for name in names if names.count(name) > 1})}")
    sizes = {block.name: operator.block_size(block) for block in blocks}
    check_steps(steps, sizes)
    _check_probes(probes)
    keeps, left = _blocks_that_fit(sizes, steps * probes, operator.dtype, budget_bytes)
    recurrences = {}
    for name, size in sizes.items():
        draws = [
            partial(probe, size, seed, name, k, dtype=operator.dtype, device=operator.device) for k in range(probes)
        ]
        recurrences[name] = [Recurrence(start, steps, reorthogonalize=keeps[name]) for start in draws]
    with operator.keep_graphs(left):
        for number in range(steps):
            active = {
                name: running for name, some in recurrences.items() if (running := [r for r in some if not r.is_done])
            }
            if not active:
                break
            vectors = {name: torch.stack([r.vector for r in some]) for name, some in active.items()}
            products = operator.block_products(vectors, blocks)
            del vectors
            for name, some in active.items():
                for recurrence, product in zip(some, products.pop(name), strict=True):
                    # A clone: a view would keep the products of all blocks alive.
                    recurrence.advance(product.clone())
            if on_step:
                on_step(number + 1, steps)
    return {name: [replace(r.result(), vectors=None) for r in recurrences[name]] for name in names}


def _blocks_that_fit(
    sizes: dict[str, int], num_vectors: int, dtype: torch.dtype, budget_bytes: int
) -> tuple[dict[str, bool], int]:
    """Which blocks keep their vectors, from the smallest on, and the bytes that are left."""
    keeps, left = {}, budget_bytes
    for name, size in sorted(sizes.items(), key=lambda item: item[1]):
        needed = vector_bytes(num_vectors, size, dtype)
        keeps[name] = needed <= left
        left -= needed if keeps[name] else 0
    rest = [name for name, fits in keeps.items() if not fits]
    if rest:
        _logger.info(
            "Lanczos by the three-term recurrence for %d of %d blocks, whose vectors do not fit %.1f GB: %s",
            len(rest),
            len(keeps),
            budget_bytes / 1e9,
            ", ".join(rest[:5]),
        )
    return keeps, left


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
        """Distance between neighbouring points of the grid."""
        return _spacing(self.grid)

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
    """A grid that several quadratures share, so that their densities can be compared.

    The paper's public code takes the mean over starts of the smallest and largest nodes; here the grid spans the
    extremes over all, so that no mass is outside.

    Args:
        quadratures: Of all blocks and starts.
        num_points: Points of the grid.
        margin: Added below and above, in units of the eigenvalues; some sigmas at least.

    Raises:
        ValueError: No quadrature, fewer than two points, or a margin that is not positive.
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
        ValueError: No quadrature, a sigma that is not positive, an uneven grid, or no mass on the grid.
    """
    if not quadratures:
        raise ValueError("a density needs the quadrature of one start at least")
    nodes = torch.cat([q.nodes for q in quadratures])
    weights = torch.cat([q.weights for q in quadratures]) / len(quadratures)
    return _blur(nodes, weights, grid, sigma)


def density_of_eigenvalues(eigenvalues: Tensor, grid: Tensor, *, sigma: float = DEFAULT_SIGMA) -> SpectralDensity:
    """The same curve from known eigenvalues `(n,)`: the mean of one Gaussian each.

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
    return _mean_and_error(torch.stack([(q.weights * q.nodes**order).sum() for q in quadratures]))


def _blur(nodes: Tensor, weights: Tensor, grid: Tensor, sigma: float) -> SpectralDensity:
    spacings = grid.diff()
    if grid.numel() < 2 or not spacings.min() > 0 or spacings.max() - spacings.min() > 1e-6 * spacings.max():
        raise ValueError("the grid must be evenly spaced and ascending, of two points or more: see make_grid")
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, not {sigma}")
    spacing = _spacing(grid)
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


def _spacing(grid: Tensor) -> float:
    return ((grid[-1] - grid[0]) / (grid.numel() - 1)).item()


@dataclass(frozen=True, eq=False)
class TraceEstimate:
    """A trace as a mean over random vectors.

    Args:
        value: The mean.
        standard_error: Of the mean; NaN for one vector.
        samples: `(k,)`, one for each vector, float64.
    """

    value: float
    standard_error: float
    samples: Tensor


def trace(
    operator: HessianOperator, *, probes: int = 100, seed: int = 0, budget_bytes: int = DEFAULT_BUDGET
) -> TraceEstimate:
    """The trace of the whole Hessian: the mean of `v^T H v` for random signs v (Hutchinson 1990).

    Args:
        operator: The Hessian.
        probes: Number of vectors, each of which takes a product.
        seed: Of the vectors.
        budget_bytes: For kept graphs of gradients; see `HessianOperator.keep_graphs`.

    Raises:
        ValueError: No vector.
    """
    _check_probes(probes)
    samples = []
    with operator.keep_graphs(budget_bytes):
        for number in range(probes):
            vector = operator.layout.random(probe_seed(seed, "", number), rademacher=True)
            samples.append(operator.layout.dots(vector.unsqueeze(0), operator.product(vector)).item())
    return _estimate(samples)


def block_traces(
    operator: HessianOperator,
    blocks: Sequence[ParameterBlock],
    *,
    probes: int = 100,
    seed: int = 0,
    budget_bytes: int = DEFAULT_BUDGET,
) -> dict[str, TraceEstimate]:
    """Traces of principal blocks, by name; all blocks share the passes over the batches.

    Args:
        operator: The Hessian.
        blocks: Blocks with unique names.
        probes: Number of vectors for each block.
        seed: Of the vectors.
        budget_bytes: For kept graphs of gradients.

    Raises:
        ValueError: No vector, or an unknown block.
    """
    _check_probes(probes)
    samples: dict[str, list[float]] = {block.name: [] for block in blocks}
    sizes = {block.name: operator.block_size(block) for block in blocks}
    with operator.keep_graphs(budget_bytes):
        for number in range(probes):
            vectors = {
                name: probe(size, seed, name, number, dtype=operator.dtype, device=operator.device, rademacher=True)
                for name, size in sizes.items()
            }
            for name, product in operator.block_products(vectors, blocks).items():
                samples[name].append(torch.dot(vectors[name].double(), product.double()).item())
    return {name: _estimate(some) for name, some in samples.items()}


@dataclass(frozen=True, eq=False)
class RitzValues:
    """Approximate eigenvalues of an operator.

    Args:
        values: `(k,)`, float64.
        residuals: `(k,)`: norms |A x - value x| of the Ritz vectors x; an eigenvalue lies within each of them.
    """

    values: Tensor
    residuals: Tensor


def top_eigenvalues(tridiagonal: Tridiagonal, k: int, *, by_magnitude: bool = False) -> RitzValues:
    """The largest eigenvalues that Lanczos found, with the residuals of their Ritz vectors.

    The residual of the i-th is `|beta_m s_mi|`, s_i being the eigenvector of T (Parlett, Sec. 13.2). The three-term
    recurrence finds converged eigenvalues more than once, and its residuals hold up to the orthogonality it lost.

    Args:
        tridiagonal: From `lanczos`.
        k: Number of eigenvalues.
        by_magnitude: Take those of the largest absolute value instead.

    Raises:
        ValueError: `k` is less than one, or more than the number of steps.
    """
    if not 1 <= k <= tridiagonal.steps:
        raise ValueError(f"{k} eigenvalues from {tridiagonal.steps} Lanczos steps: ask for 1 to {tridiagonal.steps}")
    nodes, _, lasts = tridiagonal.ritz
    order = (nodes.abs() if by_magnitude else nodes).argsort(descending=True)[:k]
    return RitzValues(nodes[order], (tridiagonal.residual * lasts).abs()[order])


def _estimate(samples: Sequence[float]) -> TraceEstimate:
    values = torch.tensor(samples, dtype=torch.float64)
    return TraceEstimate(*_mean_and_error(values), values)


def _mean_and_error(samples: Tensor) -> tuple[float, float]:
    """The mean and its standard error."""
    error = (samples.std() / samples.numel() ** 0.5).item() if samples.numel() > 1 else math.nan
    return samples.mean().item(), error


def _check_probes(probes: int) -> None:
    if probes < 1:
        raise ValueError(f"an estimate needs one random vector at least, not {probes}")
