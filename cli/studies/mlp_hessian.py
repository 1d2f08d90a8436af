"""Dense Hessians of a perceptron with one hidden layer, and whether they fall into a block for each neuron.

Collobert 2004 explains why they should: with cross entropy the blocks between two hidden neurons have a factor
p (1 - p) that vanishes as the data are fitted. Zhang et al. 2024 (Adam-mini) see it at the start too, more so with more
classes.
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
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lightning_adam_mini.blocks import Blocks
from lightning_adam_mini.hessian import HessianOperator, dense_hessian, exact_scores
from lightning_adam_mini.hessian.block_structure import Score
from lightning_adam_mini.hessian.exact import check_dense

from ...tasks.data.sampling import seed_of
from ..hessian.pictures import show_matrix, shrunk
from .common.outcome import Claim, Outcome, Row, medians
from .common.study import check_above, check_least
from .common.training import CLASSES, ImageTask, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Settings", "run"]

log = logging.getLogger(__name__)

PAPER = "Adam-mini paper, Hessians of a perceptron"
DIGITS, NOISE = "digits", "normal noise"
HIDDEN, OUTPUT = "hidden layer", "output layer"
PANELS = 6
SMALL = 7
INPUTS = SMALL**2
BUDGET = 2**32
"""Bytes that a dense Hessian may take."""
Batch = tuple[Tensor, Tensor]


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
        sizes = {"the perceptron": INPUTS + CLASSES, "the hidden layer on noise": self.inputs}
        check_dense({name: self.hidden * size for name, size in sizes.items()}, BUDGET)

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
    batch = _digits(settings.images, seed)
    model = _perceptron(INPUTS, settings.hidden, CLASSES, seed)
    moments = settings.moments()
    rows: list[Row] = []

    def measure(step: int) -> None:
        if step not in moments:
            return
        loss, scores, matrix = _score_neurons(model, batch)
        log.info("seed %d, %d of %d steps: loss %.3f", seed, step, settings.steps, loss)
        rows.extend(_rows(seed, DIGITS, CLASSES, moments[step], loss, scores))
        pictures[moments[step]] = shrunk(matrix)

    optimizer = torch.optim.Adam(model.parameters(), lr=settings.rate)
    train(model, [optimizer], lambda _: _loss_of(model, batch), steps=settings.steps, observe=measure)
    return rows


def _on_noise(settings: Settings, seed: int, classes: int) -> list[Row]:
    batch = _noise(settings.samples, settings.inputs, classes, seed)
    model = _perceptron(settings.inputs, settings.hidden, classes, seed)
    loss, scores, _ = _score_neurons(model, batch, hidden_alone=True)
    return _rows(seed, NOISE, classes, 0.0, loss, scores)


def _perceptron(inputs: int, hidden: int, classes: int, seed: int) -> nn.Sequential:
    """Two layers without biases, float64; smooth, so that the Hessian has no jumps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "weights"))
        layers = nn.Linear(inputs, hidden, bias=False), nn.Tanh(), nn.Linear(hidden, classes, bias=False)
        return nn.Sequential(*layers).double()


def _digits(count: int, seed: int) -> Batch:
    """Digits shrunk to 7 by 7 pixels, `(count, 49)`, drawn with replacement, and their labels."""
    images, labels = ImageTask(count).batch(seed, 0)
    return F.avg_pool2d(images.view(-1, 1, 28, 28), 28 // SMALL).flatten(1).double(), labels


def _noise(count: int, inputs: int, classes: int, seed: int) -> Batch:
    """Standard normal inputs `(count, inputs)` and random labels."""
    generator = Generator().manual_seed(seed_of(seed, "noise", classes))
    values = torch.randn(count, inputs, generator=generator, dtype=torch.float64)
    return values, torch.randint(classes, (count,), generator=generator)


def _loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross entropy."""
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels)


def _score_neurons(
    model: nn.Sequential, batch: Batch, *, hidden_alone: bool = False
) -> tuple[float, dict[str, Score], Tensor]:
    """The loss; by layer, the score of one block per neuron; and the Hessian.

    `hidden_alone` leaves out the output layer, which is by far the larger one with many classes.
    """
    weights = dict(zip((HIDDEN, OUTPUT), model.parameters(), strict=True))
    weights[OUTPUT].requires_grad_(not hidden_alone)
    matrix = dense_hessian(HessianOperator(model, _loss_of, [batch]), budget_bytes=BUDGET).matrix
    found, start = {}, 0
    for name, weight in weights.items():
        if weight.requires_grad:
            part = slice(start, start := start + weight.numel())
            by_neuron = {"neuron": Blocks.rows(tuple(weight.shape), block_size=1)}
            found[name] = exact_scores(matrix[part, part], by_neuron)["neuron"]
    weights[OUTPUT].requires_grad_(True)
    with torch.no_grad():
        return float(_loss_of(model, batch)), found, matrix


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
            measured = f"{_median_and_range(shares)}, by chance {expected:.3f}"
            text = f"{layer}, {part:.0%} of the steps: neurons hold most of the squared norm on every seed"
            claims.append(Claim(text, min(shares) > 0.5, measured, PAPER))
    by_classes = [_shares(rows, NOISE, HIDDEN, classes=count) for count in settings.classes]
    pairs = zip(settings.classes, by_classes, strict=True)
    measured = ", ".join(f"{count}: {_median_and_range(shares)}" for count, shares in pairs)
    if len(by_classes) > 1:
        text = "hidden layer, normal noise at the start: the share within neurons rises with the number of classes"
        middles = [statistics.median(shares) for shares in by_classes]
        holds = all(low < high for low, high in pairwise(middles))
        claims.append(Claim(text, holds, measured, PAPER))
    return claims


def _shares(rows: Sequence[Row], data: str, layer: str, **where: float) -> list[float]:
    return [
        row["share"]
        for row in rows
        if (row["data"], row["layer"]) == (data, layer) and all(row[key] == value for key, value in where.items())
    ]


def _median_and_range(shares: Sequence[float]) -> str:
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
