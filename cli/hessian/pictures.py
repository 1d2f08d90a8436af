"""Pictures: densities of spectra, divergences between blocks, and dense Hessians, small enough for a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.nn import functional as F

from lightning_adam_mini.hessian import SpectralDensity
from lightning_adam_mini.hessian.heterogeneity import Heterogeneity

__all__ = ["draw_densities", "draw_divergences", "draw_hessians", "drawn", "show_matrix", "shrunk"]

T = TypeVar("T")

COLUMNS = 4
MOST_PANELS = 64
"""Nobody looks at a longer picture, and some thousand rows of panels are more than an image can hold."""
MOST_LABELS, MOST_LETTERS = 96, 46
MOST_PIXELS, DECADES = 512, 4
FLOOR = 1e-10
"""Below this, a logarithmic axis shows rounding alone."""


def drawn(blocks: Mapping[str, T]) -> tuple[dict[str, T], str]:
    """The blocks that a picture shows: 64 at even distances, the first and the last among them.

    Args:
        blocks: By name.

    Returns:
        The blocks, and for the caption how many they are where some are missing.
    """
    count, names = len(blocks), list(blocks)
    if count <= MOST_PANELS:
        return dict(blocks), ""
    chosen = [names[round(number * (count - 1) / (MOST_PANELS - 1))] for number in range(MOST_PANELS)]
    return {name: blocks[name] for name in chosen}, f"; {MOST_PANELS} of {count:,} blocks"


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
    """A heat map of the divergences between all pairs of blocks.

    Colours follow the root of the divergence, from 0 to that of ln 2, so that models compare and small values differ.
    """
    count = len(found.names)
    size = min(max(4.0, (0.32 if count <= 24 else 0.16) * count + 2.5), 18.0)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    scale = PowerNorm(0.5, vmin=0, vmax=math.log(2))
    image = axes.imshow(found.divergences.numpy(), norm=scale, cmap="viridis", interpolation="nearest")
    if count <= 12:
        for row in range(count):
            for column in range(count):
                value = found.divergences[row, column].item()
                colour = "black" if scale(value) > 0.7 else "white"
                axes.text(column, row, f"{value:.3f}", ha="center", va="center", fontsize=6, color=colour)
    every = math.ceil(count / MOST_LABELS)
    names = [_short(name) for name in found.names[::every]]
    axes.set_xticks(range(0, count, every), names, rotation=90, fontsize=6)
    axes.set_yticks(range(0, count, every), names, fontsize=6)
    axes.set_title(f"mean over pairs {found.js0:.3g}", fontsize=9)
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("Jensen-Shannon divergence, nats", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def draw_hessians(matrices: Mapping[str, Tensor]) -> Figure:
    """Absolute entries of dense Hessians, each up to a scale of its own: the 99th percentile of the entries."""
    figure, panels = _panels(len(matrices), 3.0)
    for axes, (name, matrix) in zip(panels, matrices.items(), strict=True):
        values = shrunk(matrix, most=MOST_PIXELS)
        ordered = values.flatten().sort().values
        top = ordered[int(0.99 * (ordered.numel() - 1))].item() or 1.0
        axes.imshow(values.numpy(), vmin=0, vmax=top, cmap="magma", interpolation="nearest")
        axes.set_title(f"{_short(name)}, {len(matrix)} rows", fontsize=7)
        axes.set_xticks([])
        axes.set_yticks([])
    return figure


def shrunk(matrix: Tensor, most: int = 256) -> Tensor:
    """Absolute values; of a large matrix the largest of each square, at most `most` to a side, so that lines stay."""
    step = math.ceil(len(matrix) / most)
    return F.max_pool2d(matrix.abs()[None, None], step, ceil_mode=True)[0, 0].float()


def show_matrix(axes: Axes, values: Tensor, title: str) -> None:
    """Draw values `(k, k)` in colours that span four decades below the largest one.

    Args:
        axes: Where.
        values: Not negative; see `shrunk`.
        title: Above the picture.
    """
    top = values.max().item() or 1.0
    shown = (values / top).clamp(min=10.0**-DECADES).log10()
    axes.imshow(shown.numpy(), vmin=-DECADES, vmax=0, cmap="magma", interpolation="nearest")
    axes.set_title(f"{title}\nlargest {top:.1e}", fontsize=7)
    axes.set_xticks([])
    axes.set_yticks([])


def _panels(count: int, height: float) -> tuple[Figure, Sequence[Axes]]:
    columns = min(COLUMNS, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(3.0 * columns, height * rows), layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axes in every[count:]:
        axes.remove()
    return figure, every[:count]


def _short(name: str) -> str:
    """A name by both of its ends: blocks may differ in either."""
    name = name.removeprefix("model.")
    return name if len(name) <= MOST_LETTERS else f"{name[: MOST_LETTERS // 2 - 4]}...{name[-MOST_LETTERS // 2 - 1 :]}"
