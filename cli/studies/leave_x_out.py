"""Adam with one learning rate each for some blocks (Zhang et al. 2024, Adam-mini, Appendix A and Fig. 8).

A left-out block moves along its momentum with one rate for the whole block, found on a grid; all others are Adam's. If
one good rate a block is enough, no block is worse for it.
"""

from __future__ import annotations

import logging
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim import Optimizer

from .common.outcome import Claim, Outcome, Row, mean_and_spread
from .common.study import check_above, check_least
from .common.training import TextSettings, TextTask, best_rate, final_loss, gradient_sizes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Settings", "run"]

log = logging.getLogger(__name__)

PAPER = "Adam-mini paper, Figure 8"
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Settings(TextSettings):
    """Sizes of the study. Rates are found on the first seed; differences are reported for the others.

    Args:
        adam_rates: Peak learning rates of Adam; gains are measured from that of the least mean loss over all seeds.
        factors: A block's rate times the root mean square of its gradient, as multiples of Adam's rate.
        more_out: How many blocks are left out together, in addition to one; each with its own rate of leaving one out.
        draws: Different random choices of blocks for each number of `more_out`.
    """

    adam_rates: list[float]
    factors: list[float]
    more_out: list[int]
    draws: int

    def __post_init__(self) -> None:
        """Check what can be before the work."""
        super().__post_init__()
        check_above(self, 0, "adam_rates", "factors")
        check_least(self, 1, "draws")
        check_least(self, 2, "more_out")
        if len(self.seeds) < 2:
            raise ValueError("seeds must be at least two: rates are found on the first and reported for the others")


def run(settings: Settings) -> Outcome:
    """Loss of Adam minus that of leaving blocks out, for every block alone and for random choices of several."""
    task = TextTask(settings)
    tuning, *others = settings.seeds
    names = [name for name, parameter in task.build(tuning).named_parameters() if parameter.ndim > 1]
    draw = random.Random(tuning)
    choices = [choice for count in settings.more_out for choice in _choices(names, count, settings.draws, draw)]
    by_rate = {r: {seed: _loss(task, settings, seed, r, {}) for seed in settings.seeds} for r in settings.adam_rates}
    adam_rate, _ = best_rate({rate: statistics.fmean(losses.values()) for rate, losses in by_rate.items()})
    adam = by_rate[adam_rate]
    sizes = gradient_sizes(task, settings, tuning, adam_rate)
    rates: dict[str, float] = {}
    rows: list[Row] = []
    for name in names:
        scale = adam_rate / sizes[name]
        tried = {
            factor: _loss(task, settings, tuning, adam_rate, {name: factor * scale}) for factor in settings.factors
        }
        factor, is_inside = best_rate(tried)
        tuned = adam[tuning] - tried[factor]
        rates[name] = factor * scale
        for seed in others:
            loss = _loss(task, settings, seed, adam_rate, {name: rates[name]})
            rows.append(_row(1, name, seed, (factor, is_inside, tuned), adam[seed], loss))
        log.info("%s: factor %g, gain %.4f where it was found", name, factor, tuned)
    for chosen in choices:
        for seed in others:
            loss = _loss(task, settings, seed, adam_rate, {name: rates[name] for name in chosen})
            rows.append(_row(len(chosen), " + ".join(chosen), seed, (None, None, None), adam[seed], loss))
    values = {"adam_rate": adam_rate, "adam_loss": {str(r): list(losses.values()) for r, losses in by_rate.items()}}
    summary = _by_choice(rows)
    claims = [_claim(summary, 1, "tuned_gain"), *(_claim(summary, n, "gain") for n in (1, *settings.more_out))]
    return Outcome(rows, claims, partial(_draw, summary), values=values, size=(9, 8), summary=summary)


def _choices(names: Sequence[str], count: int, draws: int, draw: random.Random) -> list[tuple[str, ...]]:
    """Different choices of some of the names, in the order in which they are drawn.

    Raises:
        ValueError: There are fewer.
    """
    if math.comb(len(names), count) < draws:
        raise ValueError(f"more_out {count}: there are fewer than {draws} choices among {len(names)} blocks")
    found: dict[tuple[str, ...], None] = {}
    while len(found) < draws:
        found[tuple(sorted(draw.sample(names, count)))] = None
    return list(found)


def _loss(task: TextTask, settings: Settings, seed: int, adam_rate: float, left_out: dict[str, float]) -> float:
    """Final loss where blocks by name have one rate each; Adam's with none."""

    def build(model: nn.Module) -> Sequence[Optimizer]:
        named = dict(model.named_parameters())
        rest = [parameter for name, parameter in named.items() if name not in left_out]
        optimizers: list[Optimizer] = [torch.optim.Adam(rest, lr=adam_rate, betas=BETAS)]
        if left_out:
            groups = [{"params": [named[name]], "lr": rate} for name, rate in left_out.items()]
            optimizers.append(torch.optim.SGD(groups, momentum=BETAS[0], dampening=BETAS[0]))
        return optimizers

    return final_loss(task, settings, seed, build)


def _row(
    count: int,
    blocks: str,
    seed: int,
    found: tuple[float | None, bool | None, float | None],
    adam: float,
    loss: float,
) -> Row:
    factor, is_inside, tuned = found
    return {
        "left_out": count, "blocks": blocks, "seed": seed, "factor": factor, "factor_is_inside": is_inside,
        "tuned_gain": tuned, "adam_loss": adam, "loss": loss, "gain": adam - loss,
    }  # fmt: skip


def _by_choice(rows: list[Row]) -> list[Row]:
    """One line for each choice of blocks, with mean and standard deviation of the gain over seeds."""
    kept, found = ("left_out", "blocks", "factor", "tuned_gain"), []
    for key in dict.fromkeys(tuple(row[column] for column in kept) for row in rows):
        gains = [row["gain"] for row in rows if tuple(row[column] for column in kept) == key]
        mean, deviation = mean_and_spread(gains)
        found.append(dict(zip(kept, key, strict=True)) | {"gain": mean, "spread": deviation})
    return found


def _claim(summary: list[Row], count: int, gain: str) -> Claim:
    """The paper's: leaving out is never clearly worse. Clearly: by more than 2 % of a nat a byte."""
    own = [line for line in summary if line["left_out"] == count]
    worst, best = (pick(own, key=lambda line: line[gain]) for pick in (min, max))
    measured = (
        f"gain {worst[gain]:+.4f} ({worst['blocks']}) to {best[gain]:+.4f} ({best['blocks']}), median "
        f"{statistics.median(line[gain] for line in own):+.4f}; "
        f"{sum(line[gain] > 0 for line in own)} of {len(own)} choices gain"
    )
    where = "on the seed that the rates were found on" if gain == "tuned_gain" else "on other seeds"
    text = f"leave {count} out, {where}: no choice loses more than 0.02 nats to Adam"
    return Claim(text, worst[gain] > -0.02, measured, PAPER)


def _draw(summary: list[Row], figure: Figure) -> None:
    axes = figure.subplots()
    labels = [line["blocks"].replace("model.", "").replace(".weight", "").replace("layers.", "") for line in summary]
    colors = [f"C{line['left_out'] - 1}" for line in summary]
    places = range(len(summary))
    axes.barh(places, [line["gain"] for line in summary], xerr=[line["spread"] for line in summary], color=colors)
    tuned = [(place, line["tuned_gain"]) for place, line in enumerate(summary) if line["tuned_gain"] is not None]
    axes.plot([gain for _, gain in tuned], [place for place, _ in tuned], "k|", label="on the seed of the rates")
    axes.legend()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(places, labels, fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel("validation loss of Adam minus that with blocks left out, nats a byte (above 0: no worse)")
