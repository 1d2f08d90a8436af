"""Densities of the spectra of blocks on one grid, in a unit that they share or in one of each block's own."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from enum import StrEnum

from lightning_adam_mini.hessian.lanczos import Tridiagonal
from lightning_adam_mini.hessian.quadrature import (
    DEFAULT_MARGIN,
    DEFAULT_POINTS,
    DEFAULT_SIGMA,
    Quadrature,
    SpectralDensity,
    density,
    make_grid,
    quadrature,
)

__all__ = ["Scale", "as_scale", "common_densities"]

MAX_POINTS = 400_000
"""Points of a grid that is refined until it resolves sigma: some seconds for a block of 1000 nodes."""
_MARGIN_IN_SIGMAS = 8.0


class Scale(StrEnum):
    """Unit of the eigenvalues."""

    RAW = "raw"
    """As they are: what the public code of the papers computes its densities of, and the default."""
    MODEL = "model"
    """In units of the largest absolute eigenvalue over all blocks: blocks differ by size, and models compare."""
    TOP = "top"
    """In units of the block's largest absolute eigenvalue: shapes of spectra alone."""
    TENTH = "tenth"
    """In units of the block's 10th largest eigenvalue: how the papers' pictures of block spectra are drawn."""


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
        sigma: Width of the Gaussian, in that unit. Spectra that lie within it of each other look alike.
        num_points: Of the grid; by default 50,000, and up to 400,000 where half of sigma asks for a finer one.

    Raises:
        ValueError: An unknown scale, a sigma that is no width, no block, a block without a spectrum, or one whose unit
            is zero or not known.
    """
    scale = as_scale(scale)
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be positive and finite, not {sigma}")
    if not tridiagonals:
        raise ValueError("densities need the spectrum of one block at least")
    if empty := [name for name, found in tridiagonals.items() if not found]:
        raise ValueError(f"{empty[0]} has no spectrum: Lanczos needs a start at least")
    plain = {name: [quadrature(t) for t in found] for name, found in tridiagonals.items()}
    units = _units(plain, scale)
    scaled = {name: [Quadrature(q.nodes / units[name], q.weights) for q in some] for name, some in plain.items()}
    every = [q for some in scaled.values() for q in some]
    # As in the public code a margin of 1, if that is enough, where blocks share a unit; where each has its own, the
    # shapes of the spectra get all the points.
    margin = DEFAULT_MARGIN if scale in (Scale.RAW, Scale.MODEL) else 0.0
    margin = max(margin, _MARGIN_IN_SIGMAS * sigma)
    if num_points is None:
        width = max(q.nodes[-1].item() for q in every) - min(q.nodes[0].item() for q in every) + 2 * margin
        num_points = min(max(DEFAULT_POINTS, math.ceil(2 * width / sigma) + 1), MAX_POINTS)
    grid = make_grid(every, num_points=num_points, margin=margin)
    return {name: density(some, grid, sigma=sigma) for name, some in scaled.items()}


def as_scale(scale: Scale | str) -> Scale:
    """A scale by its name.

    Raises:
        ValueError: There is none of that name.
    """
    if scale not in list(Scale):
        raise ValueError(f"unknown scale {scale!r}; choose from {', '.join(Scale)}")
    return Scale(scale)


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
            f"the {what} eigenvalue of {whose} is {unit:.3g}, which is no unit: leave it out, or scale 'raw'"
        )
