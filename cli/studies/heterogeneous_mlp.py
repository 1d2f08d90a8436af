"""SGD and Adam on a perceptron with more and more heterogeneous layers ("Why Transformers Need Adam", MNIST MLP).

With heterogeneity c the four layers keep weights that are scaled by factors from 1/sqrt(c) to sqrt(c), evenly spaced in
their logarithm, and the forward pass divides by them. Their Hessians then differ by up to c^2 more than those of c = 1.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lightning_adam_mini.factory import SGD, Adam, AdamMini, OptimizerFactory

from ...tasks.data.sampling import seed_of
from .common.outcome import Claim, Outcome, Row, lines_with_range, mean_and_spread, medians
from .common.study import check_above, check_least
from .common.training import CLASSES, PIXELS, DivergedError, ImageTask, best_rate, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ScaledPerceptron", "Settings", "run"]

log = logging.getLogger(__name__)

PAPER = "Why Transformers Need Adam, MLP on MNIST"


@dataclass(frozen=True)
class Settings:
    """Sizes of the study.

    Args:
        seeds: Of weights and batches. The first one picks learning rates; the others are reported.
        heterogeneity: Ratio of the largest to the smallest factor of a layer; others are compared with the first.
        sharpest: The layer with the smallest factor, which has the largest Hessian.
        layers: Matrices of the perceptron.
        width: Of its hidden layers.
        steps: Of a run.
        batch_size: Images in a batch.
        sgd_rates: Learning rates of SGD with momentum 0.9.
        adam_rates: Learning rates of Adam and of Adam-mini, as many.
    """

    seeds: list[int]
    heterogeneity: list[float]
    sharpest: Literal["first", "last"]
    layers: int
    width: int
    steps: int
    batch_size: int
    sgd_rates: list[float]
    adam_rates: list[float]

    def __post_init__(self) -> None:
        """Check the numbers."""
        if len(self.seeds) < 2:
            raise ValueError("seeds must be at least two: the first picks learning rates, the others are reported")
        check_least(self, 1, "width", "steps", "batch_size", "heterogeneity")
        check_least(self, 2, "layers")
        check_above(self, 0, "sgd_rates", "adam_rates")
        if len(self.sgd_rates) != len(self.adam_rates):
            raise ValueError("sgd_rates and adam_rates must be as many, so that no optimizer is tuned more")


def run(settings: Settings) -> Outcome:
    """Accuracy of SGD, Adam and Adam-mini at each heterogeneity, each at its best learning rate there."""
    task = ImageTask(settings.batch_size)
    rows: list[Row] = []
    for name in OPTIMIZERS:
        for spread in settings.heterogeneity:
            rows += _tuned(task, settings, name, spread)
            log.info("%s, heterogeneity %g: accuracy %.3f", name, spread, rows[-1]["accuracy"])
    first, last = settings.heterogeneity[0], settings.heterogeneity[-1]
    accuracy = {
        (name, spread): [r["accuracy"] for r in rows if (r["optimizer"], r["heterogeneity"]) == (name, spread)]
        for name in OPTIMIZERS
        for spread in (first, last)
    }
    fall = {n: mean_and_spread(accuracy[n, first])[0] - mean_and_spread(accuracy[n, last])[0] for n in OPTIMIZERS}
    measured = {n: f"{n} {_percent(accuracy[n, first])} to {_percent(accuracy[n, last])}" for n in OPTIMIZERS}
    span = f"from heterogeneity {first:g} to {last:g}"
    claims = [
        Claim(f"SGD loses more than 5 % of accuracy {span}", fall["SGD"] > 0.05, measured["SGD"], PAPER),
        Claim(f"Adam loses less than 2 % {span}", fall["Adam"] < 0.02, measured["Adam"], PAPER),
        Claim(f"SGD loses at least 3 times what Adam loses {span}", fall["SGD"] > 3 * max(fall["Adam"], 0.0),
              f"{measured['SGD']}; {measured['Adam']}", PAPER),
        Claim(f"Adam-mini loses less than 2 % {span}", fall["AdamMini"] < 0.02, measured["AdamMini"]),
    ]  # fmt: skip
    summary = medians(rows, ("optimizer", "heterogeneity"), ("rate", "accuracy"))
    return Outcome(rows, claims, partial(_draw, rows), summary=summary, size=(7, 4.5))


OPTIMIZERS: dict[str, type[OptimizerFactory]] = {"SGD": SGD, "Adam": Adam, "AdamMini": AdamMini}


class ScaledPerceptron(nn.Module):
    """A perceptron whose layers keep weights `factor` times as large as those that they multiply with.

    The function at the start is the same for all factors; the Hessian of layer l is `factor_l^-2` times as large. So
    factors change the heterogeneity of the blocks of the Hessian, and nothing else.

    Args:
        width: Of the hidden layers.
        factors: One for each layer.
        generator: Draws the weights.
    """

    def __init__(self, width: int, factors: Sequence[float], generator: Generator) -> None:
        super().__init__()
        sizes = [PIXELS, *[width] * (len(factors) - 1), CLASSES]
        self.factors = list(factors)
        self.weights = nn.ParameterList(
            factor * (2 / rows) ** 0.5 * torch.randn(columns, rows, generator=generator)
            for factor, rows, columns in zip(factors, sizes, sizes[1:], strict=False)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(N, 10)` of images `(N, 784)`."""
        for number, (weight, factor) in enumerate(zip(self.weights, self.factors, strict=True)):
            images = F.linear(images if number == 0 else images.relu(), weight / factor)
        return images


def _tuned(task: ImageTask, settings: Settings, name: str, spread: float) -> list[Row]:
    """A row for each seed but the first, at the learning rate that was best on the first."""
    rates = settings.sgd_rates if name == "SGD" else settings.adam_rates
    tried = {rate: _accuracy(task, settings, name, spread, rate, settings.seeds[0]) for rate in rates}
    rate, is_inside = best_rate(tried, larger_is_better=True)
    return [
        {
            "optimizer": name,
            "heterogeneity": spread,
            "seed": seed,
            "rate": rate,
            "rate_is_inside": is_inside,
            "accuracy": _accuracy(task, settings, name, spread, rate, seed),
        }
        for seed in settings.seeds[1:]
    ]


def _accuracy(task: ImageTask, settings: Settings, name: str, spread: float, rate: float, seed: int) -> float:
    """Accuracy after a run, that of chance where it diverged."""
    places = [number / (settings.layers - 1) - 0.5 for number in range(settings.layers)]
    places = places if settings.sharpest == "first" else places[::-1]
    generator = Generator().manual_seed(seed_of(seed, "weights"))
    model = ScaledPerceptron(settings.width, [spread**place for place in places], generator)
    optimizer = OPTIMIZERS[name](lr=rate, weight_decay=0.0).build(model)
    try:
        train(model, [optimizer], partial(task.loss, model, seed), steps=settings.steps)
    except DivergedError:
        return 1 / CLASSES
    return task.accuracy(model)


def _percent(values: list[float]) -> str:
    mean, deviation = mean_and_spread(values)
    return f"{100 * mean:.1f} +- {100 * deviation:.1f} %"


def _draw(rows: list[Row], figure: Figure) -> None:
    axes = figure.subplots()
    for name in OPTIMIZERS:
        own = [row for row in rows if row["optimizer"] == name]
        spreads = list(dict.fromkeys(row["heterogeneity"] for row in own))
        by_seed = [[r["accuracy"] for r in own if r["seed"] == seed] for seed in dict.fromkeys(r["seed"] for r in own)]
        lines_with_range(axes, by_seed, name, at=spreads, marker="o")
    axes.set(xscale="log", xlabel="heterogeneity c", ylabel="validation accuracy", ylim=(0, 1))
    axes.legend()
