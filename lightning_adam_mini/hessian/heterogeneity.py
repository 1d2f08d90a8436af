"""How different the spectra of a model's blocks are: Jensen-Shannon divergences between their densities.

The papers state the "average JS distance of spectrum among blocks" (JS0 at step 0) and print values from 0.09 to 286. A
Jensen-Shannon divergence is at most ln 2, and its root, the distance, at most 0.833: those values leave out the spacing
of the grid. Both are here. Each depends on the unit of the eigenvalues, so there are several (`Scale`).

Shapes: `k` blocks, `g` points of the grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_adam_mini.hessian.blocks_of import ParameterBlock
from lightning_adam_mini.hessian.common_grid import Scale, as_scale, common_densities
from lightning_adam_mini.hessian.lanczos import DEFAULT_BUDGET, Tridiagonal
from lightning_adam_mini.hessian.operators import HessianOperator
from lightning_adam_mini.hessian.quadrature import DEFAULT_PROBES, DEFAULT_SIGMA, DEFAULT_STEPS, SpectralDensity
from lightning_adam_mini.hessian.spectrum import block_tridiagonals

__all__ = [
    "Heterogeneity",
    "compare_spectra",
    "heterogeneity_of",
    "js_distance",
    "js_divergence",
    "js_unnormalized",
]


@dataclass(frozen=True, eq=False)
class Heterogeneity:
    """Divergences between the spectra of all pairs of blocks.

    Args:
        names: Of the blocks, k of them.
        divergences: `(k, k)`: Jensen-Shannon divergences in nats, from 0 to ln 2.
        spacing: Of the common grid, in the unit of `scale`.
        scale: Unit of the eigenvalues.
        sigma: Width of the Gaussian of the densities, in the same unit.
    """

    names: tuple[str, ...]
    divergences: Tensor
    spacing: float
    scale: Scale
    sigma: float

    @property
    def distances(self) -> Tensor:
        """Roots of the divergences, `(k, k)`: a metric, at most 0.833."""
        return self.divergences.sqrt()

    @property
    def unnormalized(self) -> Tensor:
        """The divergences without the spacing of the grid, `(k, k)`: sums over densities, without an upper bound."""
        return self.divergences / self.spacing

    @property
    def js0(self) -> float:
        """Mean divergence over the pairs of different blocks."""
        return _mean_over_pairs(self.divergences)

    @property
    def js0_distance(self) -> float:
        """Mean distance over the pairs of different blocks."""
        return _mean_over_pairs(self.distances)

    @property
    def js0_unnormalized(self) -> float:
        """Mean of the unnormalised sums, which depends on the grid: the likely form of the papers' figures."""
        return _mean_over_pairs(self.unnormalized)


def js_divergence(first: SpectralDensity, second: SpectralDensity) -> float:
    """Jensen-Shannon divergence of two densities, in nats: symmetric, 0 for equal ones, ln 2 for disjoint ones.

    Lin 1991, Sec. IV: `JS(p, q) = KL(p, m) / 2 + KL(q, m) / 2` with `m = (p + q) / 2`, of the masses at the points of
    the grid (density times spacing).

    Raises:
        ValueError: The densities lie on different grids.
    """
    _check_grids([first, second])
    return _divergences(torch.stack([first.masses, second.masses]))[0, 1].item()


def js_distance(first: SpectralDensity, second: SpectralDensity) -> float:
    """Root of the divergence, a metric (Endres and Schindelin 2003).

    Raises:
        ValueError: The densities lie on different grids.
    """
    return math.sqrt(js_divergence(first, second))


def js_unnormalized(first: SpectralDensity, second: SpectralDensity) -> float:
    """The same sum over densities instead of masses: the divergence over the spacing of the grid.

    Raises:
        ValueError: The densities lie on different grids.
    """
    return js_divergence(first, second) / first.spacing


def compare_spectra(
    tridiagonals: Mapping[str, Sequence[Tridiagonal]],
    *,
    scale: Scale | str = Scale.RAW,
    sigma: float = DEFAULT_SIGMA,
    num_points: int | None = None,
) -> Heterogeneity:
    """Divergences between the spectra of blocks, on a grid that they share.

    Args:
        tridiagonals: By the name of the block, from `block_tridiagonals`.
        scale: Unit of the eigenvalues.
        sigma: Width of the Gaussian, in that unit.
        num_points: Of the grid; by default 50,000, and more where sigma asks for them.

    Raises:
        ValueError: Less than two blocks, or as in `common_densities`.
    """
    _check_count(len(tridiagonals))
    scale = as_scale(scale)
    densities = common_densities(tridiagonals, scale=scale, sigma=sigma, num_points=num_points)
    masses = torch.stack([found.masses for found in densities.values()])
    spacing = next(iter(densities.values())).spacing
    return Heterogeneity(tuple(densities), _divergences(masses), spacing, scale, sigma)


def heterogeneity_of(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    *,
    blocks: Sequence[ParameterBlock] | None = None,
    steps: int = DEFAULT_STEPS,
    probes: int = DEFAULT_PROBES,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    budget_bytes: int = DEFAULT_BUDGET,
    scale: Scale | str = Scale.RAW,
    sigma: float = DEFAULT_SIGMA,
) -> Heterogeneity:
    """From a model to the divergences between its blocks' spectra.

    Args:
        model: In eval mode; with batch norm in train mode, the Hessian has terms between samples.
        loss_fn: Takes the model and a batch, returns a scalar.
        batches: The same ones on each pass.
        blocks: By default the parameters of two dimensions or more that have `steps` elements at least.
        steps: Lanczos steps.
        probes: Random starts of each block.
        seed: Of the starts.
        dtype: Of the computation.
        budget_bytes: For kept vectors of Lanczos.
        scale: Unit of the eigenvalues.
        sigma: Width of the Gaussian, in that unit.

    Raises:
        ValueError: Bad input; see `checks`.
    """
    scale = as_scale(scale)
    operator = HessianOperator(model, loss_fn, batches, dtype=dtype)
    if blocks is None:
        shapes = operator.layout.shapes  # of the model under wrappers such as DDP
        blocks = [ParameterBlock(name, name) for name, s in shapes.items() if len(s) > 1 and s.numel() >= steps]
    _check_count(len(blocks))
    found = block_tridiagonals(operator, blocks, steps=steps, probes=probes, seed=seed, budget_bytes=budget_bytes)
    return compare_spectra(found, scale=scale, sigma=sigma)


def _check_count(blocks: int) -> None:
    if blocks < 2:
        raise ValueError(f"heterogeneity compares blocks, and there are {blocks}: give two or more, or fewer steps")


def _divergences(masses: Tensor) -> Tensor:
    """Jensen-Shannon divergences between all pairs of rows: the entropy of the mean less the mean of the entropies.

    Args:
        masses: `(k, g)`, whose rows sum to 1.
    """
    count = len(masses)
    entropies = _entropies(masses)
    result = torch.zeros(count, count, dtype=torch.float64)
    for number in range(count - 1):
        means = (masses[number + 1 :] + masses[number]) / 2
        found = _entropies(means) - (entropies[number + 1 :] + entropies[number]) / 2
        result[number, number + 1 :] = result[number + 1 :, number] = found
    return result.clamp_(0, math.log(2))  # rounding alone leaves the range


def _entropies(masses: Tensor) -> Tensor:
    return torch.special.entr(masses).sum(1)


def _mean_over_pairs(values: Tensor) -> float:
    rows, columns = torch.triu_indices(len(values), len(values), 1)
    return values[rows, columns].mean().item()


def _check_grids(densities: Sequence[SpectralDensity]) -> None:
    first, *others = densities
    if not all(torch.equal(first.grid, other.grid) for other in others):
        raise ValueError("the densities lie on different grids: compute both on one, see make_grid")
