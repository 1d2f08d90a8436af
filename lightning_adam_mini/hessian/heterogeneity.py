"""How different the spectra of a model's blocks are: Jensen-Shannon divergences between their densities.

The papers state the "average JS distance of spectrum among blocks" (JS0 at step 0) and print values from 0.09 to 286. A
Jensen-Shannon divergence is at most ln 2, and its root, the distance, at most 0.833: those values leave out the spacing
of the grid. Both are here. Each depends on the unit of the eigenvalues, so there are several units (`Scale`).

Shapes: `k` blocks, `g` points of the grid.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from lightning_adam_mini.hessian.lanczos import DEFAULT_BUDGET, Tridiagonal
from lightning_adam_mini.hessian.operators import HessianOperator
from lightning_adam_mini.hessian.spectrum import (
    DEFAULT_MARGIN,
    DEFAULT_POINTS,
    DEFAULT_PROBES,
    DEFAULT_SIGMA,
    DEFAULT_STEPS,
    Quadrature,
    SpectralDensity,
    block_tridiagonals,
    density,
    make_grid,
    quadrature,
)
from lightning_adam_mini.hessian.vectors import ParameterBlock

__all__ = ["Heterogeneity", "Scale", "common_densities", "compare_spectra", "heterogeneity_of", "js_divergence"]

MAX_POINTS = 400_000
"""Points of a grid that is refined until it resolves sigma: some seconds for a block of 1000 nodes."""
_MARGIN_IN_SIGMAS = 8.0


class Scale(StrEnum):
    """Unit of the eigenvalues."""

    RAW = "raw"
    """As they are: the papers' public code computes its densities of these; the default."""
    MODEL = "model"
    """In units of the largest absolute eigenvalue over all blocks: blocks differ by size, and models compare."""
    TOP = "top"
    """In units of the block's largest absolute eigenvalue: shapes of spectra alone."""
    TENTH = "tenth"
    """In units of the block's 10th largest eigenvalue: how the papers draw their pictures of block spectra."""

    @classmethod
    def _missing_(cls, value: object) -> Scale:
        raise ValueError(f"unknown scale {value!r}; choose from {', '.join(cls)}")


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
        """Roots of the divergences, `(k, k)`: a metric (Endres and Schindelin 2003), at most 0.833."""
        return self.divergences.sqrt()

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
        """The mean divergence without the spacing of the grid: a sum over densities, which has no upper bound.

        It depends on the grid; the papers' values are likely of this form.
        """
        return _mean_over_pairs(self.divergences / self.spacing)


def js_divergence(first: SpectralDensity, second: SpectralDensity) -> float:
    """Jensen-Shannon divergence of two densities, in nats: symmetric, 0 for equal ones, ln 2 for disjoint ones.

    Lin 1991, Sec. IV: `JS(p, q) = KL(p, m) / 2 + KL(q, m) / 2` with `m = (p + q) / 2`, of the masses at the points of
    the grid (density times spacing).

    Raises:
        ValueError: The densities are on different grids.
    """
    if not torch.equal(first.grid, second.grid):
        raise ValueError("the densities are on different grids: compute both on one, see make_grid")
    return _divergences(torch.stack([first.masses, second.masses]))[0, 1].item()


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
        ValueError: Bad input; see `HessianOperator`, `block_tridiagonals` and `compare_spectra`.
    """
    scale = Scale(scale)
    operator = HessianOperator(model, loss_fn, batches, dtype=dtype)
    if blocks is None:
        shapes = operator.layout.shapes  # of the model without wrappers such as DDP
        blocks = [ParameterBlock(name, name) for name, s in shapes.items() if len(s) > 1 and s.numel() >= steps]
    _check_count(len(blocks))
    found = block_tridiagonals(operator, blocks, steps=steps, probes=probes, seed=seed, budget_bytes=budget_bytes)
    return compare_spectra(found, scale=scale, sigma=sigma)


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
        num_points: Of the grid; by default 50,000, and more where sigma requires a finer one.

    Raises:
        ValueError: Fewer than two blocks, or as in `common_densities`.
    """
    _check_count(len(tridiagonals))
    densities = common_densities(tridiagonals, scale=scale, sigma=sigma, num_points=num_points)
    masses = torch.stack([found.masses for found in densities.values()])
    spacing = next(iter(densities.values())).spacing
    return Heterogeneity(tuple(densities), _divergences(masses), spacing, Scale(scale), sigma)


def common_densities(
    tridiagonals: Mapping[str, Sequence[Tridiagonal]],
    *,
    scale: Scale | str = Scale.RAW,
    sigma: float = DEFAULT_SIGMA,
    num_points: int | None = None,
) -> dict[str, SpectralDensity]:
    """Densities of the spectra of blocks on one grid, by name.

    Args:
        tridiagonals: By the name of the block.
        scale: Unit of the eigenvalues.
        sigma: Width of the Gaussian, in that unit. Spectra that lie within it of each other look the same.
        num_points: Of the grid; by default 50,000, and up to 400,000 where half of sigma requires a finer one.

    Raises:
        ValueError: An unknown scale, a sigma that is not positive and finite, no block, a block without a spectrum, or
            one whose unit is zero or not known.
    """
    scale = Scale(scale)
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be positive and finite, not {sigma}")
    if not tridiagonals:
        raise ValueError("densities need the spectrum of one block at least")
    if empty := [name for name, found in tridiagonals.items() if not found]:
        raise ValueError(f"{empty[0]} has no spectrum: Lanczos needs a start at least")
    raw = {name: [quadrature(t) for t in found] for name, found in tridiagonals.items()}
    units = _units(raw, scale)
    scaled = {name: [Quadrature(q.nodes / units[name], q.weights) for q in some] for name, some in raw.items()}
    every = [q for some in scaled.values() for q in some]
    # A margin of 1, as in the public code, if that is enough, where blocks share a unit; where each has its own, the
    # shapes of the spectra get all the points.
    margin = DEFAULT_MARGIN if scale in (Scale.RAW, Scale.MODEL) else 0.0
    margin = max(margin, _MARGIN_IN_SIGMAS * sigma)
    if num_points is None:
        width = max(q.nodes[-1].item() for q in every) - min(q.nodes[0].item() for q in every) + 2 * margin
        num_points = min(max(DEFAULT_POINTS, math.ceil(2 * width / sigma) + 1), MAX_POINTS)
    grid = make_grid(every, num_points=num_points, margin=margin)
    return {name: density(some, grid, sigma=sigma) for name, some in scaled.items()}


def _units(quadratures: Mapping[str, Sequence[Quadrature]], scale: Scale) -> dict[str, float]:
    """What the eigenvalues of each block are divided by."""
    if scale is Scale.RAW:
        return dict.fromkeys(quadratures, 1.0)
    if scale is Scale.MODEL:
        largest = max(_largest(q) for some in quadratures.values() for q in some)
        _check_unit("all blocks", "largest absolute", largest)
        return dict.fromkeys(quadratures, largest)
    found = {}
    for name, some in quadratures.items():
        if scale is Scale.TOP:
            what, sizes = "largest absolute", [_largest(q) for q in some]
        else:
            what, sizes = "10th largest", [_tenth(name, q) for q in some]
        found[name] = statistics.median_low(sizes)  # over starts
        _check_unit(name, what, found[name])
    return found


def _largest(found: Quadrature) -> float:
    return found.nodes.abs().max().item()


def _tenth(name: str, found: Quadrature) -> float:
    if (count := found.nodes.numel()) < 10:
        raise ValueError(f"{name} has {count} eigenvalues, so no 10th: take 10 Lanczos steps or more, or scale 'top'")
    return found.nodes[-10].item()


def _check_unit(whose: str, what: str, unit: float) -> None:
    if not unit > 0:
        raise ValueError(
            f"the {what} eigenvalue of {whose} is {unit:.3g}, which is no unit: leave it out, or use scale 'raw'"
        )


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
    return result.clamp_(0, math.log(2))  # rounding can leave the range


def _entropies(masses: Tensor) -> Tensor:
    return torch.special.entr(masses).sum(1)


def _mean_over_pairs(values: Tensor) -> float:
    rows, columns = torch.triu_indices(len(values), len(values), 1)
    return values[rows, columns].mean().item()
