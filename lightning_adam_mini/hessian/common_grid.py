"""Densities of the spectra of blocks on one grid, in a unit that they share or in one of each block's own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import StrEnum

import torch

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
    """Unit of a block's eigenvalues."""

    RAW = "raw"
    """As they are: what the public code of the papers computes its densities of, and the default."""
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
        scale: Unit of each block's eigenvalues.
        sigma: Width of the Gaussian, in that unit. Spectra that lie within it of each other look alike.
        num_points: Of the grid; by default 50,000, and up to 400,000 where half of sigma asks for a finer one.

    Raises:
        ValueError: An unknown scale, a block without a spectrum, or one whose unit is zero or not known.
    """
    scale = as_scale(scale)
    if empty := [name for name, found in tridiagonals.items() if not found]:
        raise ValueError(f"{empty[0]} has no spectrum: Lanczos needs a start at least")
    scaled = {name: _scaled(name, [quadrature(t) for t in found], scale) for name, found in tridiagonals.items()}
    every = [q for some in scaled.values() for q in some]
    # A margin of 1 as in the public code where it is wide enough, and narrow where the eigenvalues are in [-1, 1].
    margin = DEFAULT_MARGIN if scale is Scale.RAW else 0.0
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


def _scaled(name: str, quadratures: list[Quadrature], scale: Scale) -> list[Quadrature]:
    """Quadratures in another unit: the median over starts of what each start finds."""
    if scale is Scale.RAW:
        return quadratures
    if scale is Scale.TOP:
        found = [q.nodes.abs().max().item() for q in quadratures]
    else:
        if (fewest := min(q.nodes.numel() for q in quadratures)) < 10:
            raise ValueError(
                f"{name} has {fewest} eigenvalues, so no 10th: take 10 Lanczos steps or more, or scale 'top'"
            )
        found = [q.nodes[-10].item() for q in quadratures]
    unit = torch.tensor(found, dtype=torch.float64).median().item()
    if not unit > 0:
        what = "largest absolute" if scale is Scale.TOP else "10th largest"
        raise ValueError(
            f"the {what} eigenvalue of {name} is {unit:.3g}, which is no unit: leave it out, or scale 'raw'"
        )
    return [Quadrature(q.nodes / unit, q.weights) for q in quadratures]
