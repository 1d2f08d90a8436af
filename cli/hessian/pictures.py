"""Pictures: densities of spectra, divergences between blocks, and dense Hessians."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lightning_adam_mini.hessian import SpectralDensity
from lightning_adam_mini.hessian.heterogeneity import Heterogeneity

__all__ = ["draw_densities", "draw_divergences", "draw_hessians"]

COLUMNS = 4
FLOOR = 1e-10
"""Below it a logarithmic axis shows rounding alone."""


def draw_densities(densities: Mapping[str, SpectralDensity], *, logarithmic: bool) -> Figure:
    """Small multiples, a density each.

    Args:
        densities: By the name of the block.
        logarithmic: The vertical axis, from 1e-10.
    """
    figure, panels = _panels(len(densities), 2.2)
    for axes, (name, found) in zip(panels, densities.items(), strict=True):
        axes.plot(found.grid.numpy(), found.values.numpy(), linewidth=0.9)
        if logarithmic:
            axes.set_yscale("log")
            top = found.values.max().item()
            axes.set_ylim(max(FLOOR, 1e-8 * top), 3 * top)
        axes.set_title(_short(name), fontsize=7)
        axes.tick_params(labelsize=6)
        axes.xaxis.set_major_locator(MaxNLocator(4))
    figure.supxlabel("eigenvalue", fontsize=8)
    figure.supylabel("density", fontsize=8)
    return figure


def draw_divergences(found: Heterogeneity) -> Figure:
    """A heat map of the divergences between all pairs of blocks, on the fixed scale 0 to ln 2."""
    count = len(found.names)
    size = max(4.0, 0.32 * count + 2.5)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(found.divergences.numpy(), vmin=0, vmax=math.log(2), cmap="viridis")
    if count <= 12:
        for row in range(count):
            for column in range(count):
                value = found.divergences[row, column].item()
                colour = "black" if value > 0.5 else "white"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6, color=colour)
    names = [_short(name) for name in found.names]
    axes.set_xticks(range(count), names, rotation=90, fontsize=6)
    axes.set_yticks(range(count), names, fontsize=6)
    axes.set_title(f"Jensen-Shannon divergence, nats; mean over pairs {found.js0:.3f}", fontsize=9)
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def draw_hessians(matrices: Mapping[str, Tensor]) -> Figure:
    """Absolute entries of dense Hessians, each up to a scale of its own: the 99th percentile of the entries."""
    figure, panels = _panels(len(matrices), 3.0)
    for axes, (name, matrix) in zip(panels, matrices.items(), strict=True):
        values = matrix.abs()
        if (step := math.ceil(len(values) / 512)) > 1:  # the largest of a few entries: lines stay to be seen
            size = len(values) // step * step
            values = values[:size, :size].unflatten(1, (-1, step)).amax(2).unflatten(0, (-1, step)).amax(1)
        ordered = values.flatten().sort().values
        top = ordered[int(0.99 * (ordered.numel() - 1))].item() or 1.0
        axes.imshow(values.numpy(), vmin=0, vmax=top, cmap="magma", interpolation="nearest")
        axes.set_title(f"{_short(name)}, {len(matrix)} rows", fontsize=7)
        axes.set_xticks([])
        axes.set_yticks([])
    return figure


def _panels(count: int, height: float) -> tuple[Figure, Sequence[Axes]]:
    columns = min(COLUMNS, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(3.0 * columns, height * rows), layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axes in every[count:]:
        axes.remove()
    return figure, every[:count]


def _short(name: str) -> str:
    return name.removeprefix("model.")[-38:]
