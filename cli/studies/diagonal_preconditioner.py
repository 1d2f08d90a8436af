"""Adam's diagonal and the condition number of one dense block (Zhang et al. 2024, "Why Transformers Need Adam").

`tau = sum_i |H_ii| / sum_ij |H_ij|` says how diagonal H is, and `r = kappa(D H) / kappa(H)` what D = 1 / |H w| at
random weights w does to it. Eigenvalues are fixed; eigenvectors turn away from the axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from scipy.stats import spearmanr
from torch import Generator

from lightning_adam_mini.hessian.block_structure import tau

from .common.outcome import Claim, Outcome, Row, medians
from .common.quadratics import BlockQuadratic, ScaledDescent, adam_scale, check_condition
from .common.study import check_above, check_least

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Settings", "run"]

PAPER = "Why Transformers Need Adam, r against tau"


@dataclass(frozen=True)
class Settings:
    """Sizes of the study.

    Args:
        seeds: A draw of eigenvectors and weights each.
        dimensions: Sizes of the block.
        condition_numbers: Of H, whose eigenvalues are evenly spaced from 1 to it, in random order.
        angles: How far eigenvectors are turned, from 0 (H is diagonal) on, ascending: the root mean square, in radians,
            of the norm of a generator's row.
    """

    seeds: list[int]
    dimensions: list[int]
    condition_numbers: list[float]
    angles: list[float]

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_least(self, 2, "dimensions")
        check_above(self, 1, "condition_numbers")
        check_condition("condition_numbers", max(self.condition_numbers))
        if self.angles[0] != 0 or len(self.angles) < 2 or self.angles != sorted(self.angles):
            raise ValueError(f"angles must ascend from 0 (a diagonal matrix) to others, not {self.angles}")


def run(settings: Settings) -> Outcome:
    """Values of tau and r for every size, condition number, angle and seed."""
    rows = [
        _row(size, condition, angle, seed)
        for condition in settings.condition_numbers
        for size in settings.dimensions
        for angle in settings.angles
        for seed in settings.seeds
    ]
    summary = medians(rows, ("condition_number", "dimension", "angle"), ("tau", "r"))
    claims = [
        claim
        for condition in settings.condition_numbers
        for size in settings.dimensions
        for claim in _claims([s for s in summary if (s["condition_number"], s["dimension"]) == (condition, size)])
    ]
    return Outcome(rows, claims, partial(_draw, rows), summary=summary)


def _row(size: int, condition: float, angle: float, seed: int) -> Row:
    generator = Generator().manual_seed(seed)
    order = torch.randperm(size, generator=generator)
    eigenvalues = torch.linspace(1, condition, size, dtype=torch.float64)[order]
    noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
    rotation = torch.matrix_exp(angle * (noise - noise.T) / (2 * size) ** 0.5)
    hessian = rotation * eigenvalues @ rotation.T
    weights = torch.randn(size, generator=generator, dtype=torch.float64)
    problem = BlockQuadratic((hessian + hessian.T) / 2, weights, (size,))
    scaled = ScaledDescent(problem, adam_scale(problem)).condition_number
    return {
        "condition_number": condition, "dimension": size, "angle": angle, "seed": seed,
        "tau": tau(problem.hessian), "r": scaled / condition,
    }  # fmt: skip


def _claims(lines: list[Row]) -> list[Claim]:
    """Of one size and condition number: r rises as H gets denser, and D hurts a dense H and helps a diagonal one."""
    dense, diagonal = min(lines, key=lambda line: line["tau"]), max(lines, key=lambda line: line["tau"])
    where = f"kappa {dense['condition_number']:g}, d {dense['dimension']}"
    measured = f"median r {diagonal['r']:.3g} at tau {diagonal['tau']:.2f}, {dense['r']:.3g} at tau {dense['tau']:.2f}"
    taus, rs = [line["tau"] for line in lines], [line["r"] for line in lines]
    correlation = float(spearmanr(taus, rs).statistic)
    ranked = f"{measured}; rank correlation of tau and r {correlation:.2f}"
    return [
        Claim(
            f"{where}: r falls as H gets more diagonal",
            dense["r"] > diagonal["r"] and correlation < -0.7,
            ranked,
            PAPER,
        ),
        Claim(f"{where}: D worsens a dense H (r > 1)", dense["r"] > 1, measured, PAPER),
        Claim(f"{where}: D improves a diagonal H (r < 1)", diagonal["r"] < 1, measured, PAPER),
    ]


def _draw(rows: list[Row], figure: Figure) -> None:
    conditions = list(dict.fromkeys(row["condition_number"] for row in rows))
    for axes, condition in zip(figure.subplots(1, len(conditions), squeeze=False)[0], conditions, strict=True):
        own = [row for row in rows if row["condition_number"] == condition]
        lines = medians(own, ("dimension", "angle"), ("tau", "r"))
        for size in dict.fromkeys(row["dimension"] for row in own):
            points = [row for row in own if row["dimension"] == size]
            (line,) = axes.plot(
                [one["tau"] for one in lines if one["dimension"] == size],
                [one["r"] for one in lines if one["dimension"] == size],
                marker="o",
                label=f"d = {size}",
            )
            places, heights = [row["tau"] for row in points], [row["r"] for row in points]
            axes.scatter(places, heights, s=4, alpha=0.25, color=line.get_color())
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(yscale="log", xlabel="tau (1: diagonal)", ylabel="r", title=f"kappa(H) = {condition:g}")
        axes.legend()
