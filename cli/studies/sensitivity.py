"""Loss of AdamW and of Adam-mini over learning rate, beta2 and eps (Zhang et al. 2024, Adam-mini, Fig. 5c)."""

from __future__ import annotations

import logging
import statistics
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING

from lightning_adam_mini.factory import AdamMini, AdamW, OptimizerFactory

from .common.outcome import Claim, Outcome, Row, heat_map, medians
from .common.study import check_above, check_least
from .common.training import TextSettings, TextTask, final_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Settings", "run"]

log = logging.getLogger(__name__)

PAPER = "Adam-mini paper, Figure 5c"
OPTIMIZERS: dict[str, type[AdamW] | type[AdamMini]] = {"AdamW": AdamW, "AdamMini": AdamMini}


@dataclass(frozen=True)
class Settings(TextSettings):
    """Sizes of the study.

    Args:
        rates: Peak learning rates.
        beta2s: Decay rates of the second moment.
        epss: What is added to its root.
        tolerance: Nats a byte above the best cell that count as good.
    """

    rates: list[float]
    beta2s: list[float]
    epss: list[float]
    tolerance: float

    def __post_init__(self) -> None:
        """Check the grid."""
        super().__post_init__()
        check_above(self, 0, "rates", "tolerance")
        check_least(self, 0, "beta2s", "epss")
        if max(self.beta2s) >= 1:
            raise ValueError(f"beta2s must be below 1, not {max(self.beta2s):g}")


def run(settings: Settings) -> Outcome:
    """The validation loss of every cell, for every seed."""
    task = TextTask(settings)
    rows: list[Row] = []
    for name, rate in product(OPTIMIZERS, settings.rates):
        for beta2, eps, seed in product(settings.beta2s, settings.epss, settings.seeds):
            factory = OPTIMIZERS[name](lr=rate, betas=(0.9, beta2), eps=eps, weight_decay=0.0)
            loss = _loss(task, settings, seed, factory)
            rows.append({"optimizer": name, "rate": rate, "beta2": beta2, "eps": eps, "seed": seed, "loss": loss})
        log.info("%s at rate %g done", name, rate)
    summary = medians(rows, ("optimizer", "rate", "beta2", "eps"), ("loss",))
    losses = {name: [line["loss"] for line in summary if line["optimizer"] == name] for name in OPTIMIZERS}
    share = {name: _share(own, settings.tolerance) for name, own in losses.items()}
    best = ", ".join(f"{name} {100 * share[name]:.0f} % of cells, best {min(losses[name]):.3f}" for name in OPTIMIZERS)
    spans = ", ".join(f"{name} {statistics.median(own) - min(own):.3f}" for name, own in losses.items())
    at_best = {name: _at_best_rate(summary, name) for name in OPTIMIZERS}
    inner = ", ".join(f"{name} {max(at_best[name]) - min(at_best[name]):.3f}" for name in OPTIMIZERS)
    claims = [
        Claim(
            f"no fewer cells of Adam-mini than of AdamW, up to a tenth, are within {settings.tolerance:g} of its best",
            share["AdamMini"] >= share["AdamW"] - 0.1,
            f"{best}; median minus best: {spans}",
            PAPER,
        ),
        Claim(
            f"at its best rate, no beta2 and eps costs Adam-mini more than {settings.tolerance:g} nats",
            max(at_best["AdamMini"]) - min(at_best["AdamMini"]) <= settings.tolerance,
            f"largest minus smallest loss: {inner}",
            PAPER,
        ),
    ]
    return Outcome(rows, claims, partial(_draw, summary, settings), summary=summary, size=(11, 6))


def _loss(task: TextTask, settings: Settings, seed: int, factory: OptimizerFactory) -> float:
    return final_loss(task, settings, seed, lambda model: [factory.build(model)])


def _share(losses: list[float], tolerance: float) -> float:
    """Share of cells that are about as good as the best."""
    return sum(loss <= min(losses) + tolerance for loss in losses) / len(losses)


def _at_best_rate(summary: list[Row], name: str) -> list[float]:
    """Losses of all cells with the learning rate of the best cell."""
    own = [line for line in summary if line["optimizer"] == name]
    rate = min(own, key=lambda line: line["loss"])["rate"]
    return [line["loss"] for line in own if line["rate"] == rate]


def _draw(summary: list[Row], settings: Settings, figure: Figure) -> None:
    losses = [line["loss"] for line in summary]
    low, high = min(losses), statistics.quantiles(losses, n=10)[-1]
    panels = figure.subplots(len(OPTIMIZERS), len(settings.epss), squeeze=False)
    for line, name in zip(panels, OPTIMIZERS, strict=True):
        for axes, eps in zip(line, settings.epss, strict=True):
            cell = {(r["rate"], r["beta2"]): r["loss"] for r in summary if (r["optimizer"], r["eps"]) == (name, eps)}
            values = [[cell[rate, beta2] for beta2 in settings.beta2s] for rate in settings.rates]
            names = [f"{rate:g}" for rate in settings.rates], [f"{beta2:g}" for beta2 in settings.beta2s]
            heat_map(axes, values, *names, low=low, high=high)
            axes.set(title=f"{name}, eps {eps:g}", xlabel="beta2", ylabel="learning rate")
