"""Dense Hessians of a perceptron with one hidden layer, and whether they fall into a block for each neuron.

Collobert 2004 tells why they should: with cross entropy the blocks between two hidden neurons have a factor p (1 - p)
that vanishes as the data are fitted. Zhang et al. 2024 (Adam-mini) see it at the start too, and the more so the more
classes there are.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_adam_mini.hessian.block_structure import Score
from lightning_adam_mini.hessian.exact import check_dense

from ..hessian.matrix_pictures import show_matrix, shrunk
from .checks import check_above, check_least
from .common.outcome import Claim, Outcome, Row, medians
from .image_task import CLASSES
from .perceptron_task import BUDGET, HIDDEN, OUTPUT, PIXELS, digits, loss_of, noise, perceptron, score_neurons
from .training import Training, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Settings", "run"]

log = logging.getLogger(__name__)

PAPER = "Adam-mini paper, Hessians of a perceptron"
DIGITS, NOISE = "digits", "normal noise"
PANELS = 6


@dataclass(frozen=True)
class Settings:
    """Sizes of the study.

    Args:
        seeds: Of weights and data.
        hidden: Hidden neurons.
        images: Digits, shrunk to 7 by 7 pixels, that are fitted.
        steps: Of Adam on all of them.
        parts: Of the steps, at which the Hessian is taken, from 0 (the start) to 1 (the end).
        rate: Peak learning rate.
        inputs: Of the normal noise.
        samples: Of the noise, whose classes are random.
        classes: Numbers of classes of the noise; one Hessian at the start for each.
    """

    seeds: list[int]
    hidden: int
    images: int
    steps: int
    parts: list[float]
    rate: float
    inputs: int
    samples: int
    classes: list[int]

    def __post_init__(self) -> None:
        """Check what can be before the work."""
        check_least(self, 1, "images", "steps", "inputs", "samples")
        check_least(self, 2, "hidden", "classes")
        check_above(self, 0, "rate")
        if min(self.parts) < 0 or max(self.parts) > 1 or self.parts != sorted(self.parts):
            raise ValueError(f"parts must ascend from 0 (the start) to 1 (the end), not {self.parts}")
        if len(self.parts) > PANELS:
            raise ValueError(f"parts are a picture each: give at most {PANELS}, not {len(self.parts)}")
        if len(self.moments()) < len(self.parts):
            raise ValueError(f"two of parts {self.parts} are the same of {self.steps} steps: give more steps")
        if self.classes != sorted(self.classes):
            raise ValueError(f"classes must ascend, not {self.classes}")
        sizes = {"the perceptron": PIXELS + CLASSES, "the hidden layer on noise": self.inputs}
        check_dense([(name, self.hidden * size) for name, size in sizes.items()], BUDGET)

    def moments(self) -> dict[int, float]:
        """Parts by their number of steps."""
        return {round(part * self.steps): part for part in self.parts}


def run(settings: Settings) -> Outcome:
    """Share of the squared norm within neurons of both layers, while digits are fitted and by the number of classes."""
    rows: list[Row] = []
    pictures: dict[float, Tensor] = {}
    for seed in settings.seeds:
        rows += _on_digits(settings, seed, pictures if seed == settings.seeds[0] else {})
        for classes in settings.classes:
            rows += _on_noise(settings, seed, classes)
    summary = medians(rows, ("data", "classes", "part", "layer"), ("loss", "share", "expected", "contrast"))
    return Outcome(rows, _claims(rows, settings), partial(_draw, rows, pictures), size=(12, 6.5), summary=summary)


def _on_digits(settings: Settings, seed: int, pictures: dict[float, Tensor]) -> list[Row]:
    batch = digits(settings.images, seed)
    model = perceptron(PIXELS, settings.hidden, CLASSES, seed)
    moments = settings.moments()
    rows: list[Row] = []

    def measure(step: int) -> None:
        if step not in moments:
            return
        loss, scores, matrix = score_neurons(model, batch)
        log.info("seed %d, %d of %d steps: loss %.3f", seed, step, settings.steps, loss)
        rows.extend(_rows(seed, DIGITS, CLASSES, moments[step], loss, scores))
        pictures[moments[step]] = shrunk(matrix)

    optimizer = torch.optim.Adam(model.parameters(), lr=settings.rate)
    train(model, [optimizer], lambda _: loss_of(model, batch), Training(settings.steps, clip=None), measure)
    return rows


def _on_noise(settings: Settings, seed: int, classes: int) -> list[Row]:
    batch = noise(settings.samples, settings.inputs, classes, seed)
    model = perceptron(settings.inputs, settings.hidden, classes, seed)
    loss, scores, _ = score_neurons(model, batch, hidden_alone=True)
    return _rows(seed, NOISE, classes, 0.0, loss, scores)


def _rows(seed: int, data: str, classes: int, part: float, loss: float, scores: Mapping[str, Score]) -> list[Row]:
    return [
        {
            "seed": seed, "data": data, "classes": classes, "part": part, "loss": loss, "layer": layer,
            "share": score.share, "expected": score.expected, "contrast": score.contrast,
        }
        for layer, score in scores.items()
    ]  # fmt: skip


def _claims(rows: Sequence[Row], settings: Settings) -> list[Claim]:
    claims = []
    for layer in (HIDDEN, OUTPUT):
        for part in settings.parts:
            shares = _shares(rows, DIGITS, layer, part=part)
            expected = next(row["expected"] for row in rows if (row["data"], row["layer"]) == (DIGITS, layer))
            measured = f"{_told(shares)}, by chance {expected:.3f}"
            text = f"{layer}, {part:.0%} of the steps: neurons hold most of the squared norm on every seed"
            claims.append(Claim(text, min(shares) > 0.5, measured, PAPER))
    by_classes = [_shares(rows, NOISE, HIDDEN, classes=count) for count in settings.classes]
    told = ", ".join(f"{count}: {_told(shares)}" for count, shares in zip(settings.classes, by_classes, strict=True))
    if len(by_classes) > 1:
        text = "hidden layer, normal noise at the start: the share within neurons rises with the number of classes"
        middles = [statistics.median(shares) for shares in by_classes]
        holds = all(low < high for low, high in pairwise(middles))
        claims.append(Claim(text, holds, told, PAPER))
    return claims


def _shares(rows: Sequence[Row], data: str, layer: str, **where: float) -> list[float]:
    return [
        row["share"]
        for row in rows
        if (row["data"], row["layer"]) == (data, layer) and all(row[key] == value for key, value in where.items())
    ]


def _told(shares: Sequence[float]) -> str:
    return f"{statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})"


def _draw(rows: Sequence[Row], pictures: Mapping[float, Tensor], figure: Figure) -> None:
    grid = figure.add_gridspec(2, PANELS, height_ratios=(1.3, 1))
    span = max(PANELS // len(pictures), 1)
    for number, (part, values) in enumerate(pictures.items()):
        axes = figure.add_subplot(grid[0, number * span : (number + 1) * span])
        show_matrix(axes, values, f"both layers, {part:.0%} of the steps")
    fitted, noise = figure.add_subplot(grid[1, : PANELS // 2]), figure.add_subplot(grid[1, PANELS // 2 :])
    for layer, color in ((HIDDEN, "tab:blue"), (OUTPUT, "tab:orange")):
        own = [row for row in rows if (row["data"], row["layer"]) == (DIGITS, layer)]
        fitted.plot([row["part"] for row in own], [row["share"] for row in own], "o", color=color, label=layer)
        fitted.axhline(own[0]["expected"], color=color, linestyle=":")
    fitted.set(xlabel="part of the steps", ylabel="share within neurons", ylim=(0, 1.02))
    fitted.legend(fontsize=7)
    own = [row for row in rows if row["data"] == NOISE]
    noise.plot([row["classes"] for row in own], [row["share"] for row in own], "o")
    noise.axhline(own[0]["expected"], linestyle=":")
    noise.set(xscale="log", xlabel="classes (normal noise, at the start)", ylabel="share, hidden layer", ylim=(0, 1.02))
