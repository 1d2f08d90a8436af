"""How far memory-saving optimizers lead from AdamW's weights (Zhang et al. 2024, Adam-mini, Appendix D.5, Fig. 15)."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lightning_adam_mini.factory import CAME, LAMB, SM3, Adafactor, AdamMini, AdamW, Lion, OptimizerFactory

from .common.outcome import Claim, Outcome, Row, lines_with_range, medians
from .common.study import check_above
from .common.training import DivergedError, TextSettings, TextTask, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Settings", "run"]

PAPER = "Adam-mini paper, Figure 15"
MINI, WHOLE, SCALED = "Adam-mini", "Adam-mini, a block a tensor", "Adafactor, scaled by parameters"


@dataclass(frozen=True)
class Settings(TextSettings):
    """Sizes of the study.

    Args:
        rate: Peak learning rate of every optimizer, as in the paper.
        every: Steps between two measurements; the last step is measured too.
    """

    rate: float
    every: int

    def __post_init__(self) -> None:
        """Check the interval."""
        super().__post_init__()
        check_above(self, 0, "rate")
        if not 1 <= self.every <= self.steps:
            raise ValueError(f"every must be between 1 and steps ({self.steps}), not {self.every}")


def run(settings: Settings) -> Outcome:
    """Euclidean distance of all weights to AdamW's after the same number of steps on the same batches."""
    task = TextTask(settings)
    rows: list[Row] = []
    for seed in settings.seeds:
        reference, adamw_loss = _trajectory(task, settings, seed, AdamW(lr=settings.rate, weight_decay=0.0))
        moved = [float((weights - reference[0]).norm()) for weights in reference]
        rows += [_row("AdamW", seed, n, settings, 0.0, moved, adamw_loss) for n in range(len(moved))]
        for name, factory in _factories(settings.rate).items():
            weights, loss = _trajectory(task, settings, seed, factory)
            distances = [float((own - other).norm()) for own, other in zip(weights, reference, strict=True)]
            rows += [_row(name, seed, n, settings, distance, moved, loss) for n, distance in enumerate(distances)]
    last = max(row["step"] for row in rows)
    summary = medians([r for r in rows if r["step"] == last], ("optimizer",), ("distance", "relative", "final_loss"))
    claims = [_claim(rows, settings), _nearer(rows, (SCALED, "CAME", "SM3", "LAMB"))]
    return Outcome(rows, claims, partial(_draw, rows), summary=summary, size=(8, 5))


def _factories(rate: float) -> dict[str, OptimizerFactory]:
    """All but AdamW, without weight decay; other options are the factories' defaults."""
    factories: dict[str, OptimizerFactory] = {
        MINI: AdamMini(),
        WHOLE: AdamMini(partition="default"),
        "Adafactor": Adafactor(),
        SCALED: Adafactor(scale_parameter=True),
        "CAME": CAME(),
        "SM3": SM3(),
        "LAMB": LAMB(),
        "Lion": Lion(),
    }
    return {name: replace(factory, lr=rate, weight_decay=0.0) for name, factory in factories.items()}


def _trajectory(task: TextTask, settings: Settings, seed: int, factory: OptimizerFactory) -> tuple[list[Tensor], float]:
    """Flat weights every few steps, the first ones before the first step, and the validation loss at the end."""
    model = task.build(seed)
    seen: list[Tensor] = []

    def keep(steps: int) -> None:
        if steps % settings.every == 0 or steps == settings.steps:
            seen.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())

    loss_of = partial(task.loss, model, seed)
    try:
        train(model, [factory.build(model)], loss_of, steps=settings.steps, clip=1.0, observe=keep)
    except DivergedError as error:
        raise ValueError(f"{type(factory).__name__} at rate {settings.rate:g}: {error}") from error
    return seen, task.validation_loss(model)


def _row(name: str, seed: int, n: int, settings: Settings, distance: float, moved: list[float], loss: float) -> Row:
    return {
        "optimizer": name, "seed": seed, "step": min(n * settings.every, settings.steps), "distance": distance,
        "relative": distance / moved[n] if n else 0.0, "final_loss": loss,
    }  # fmt: skip


def _claim(rows: list[Row], settings: Settings) -> Claim:
    """That Adam-mini is nearest at every measurement, on every seed."""
    nearest: dict[str, int] = {}
    steps = sorted({row["step"] for row in rows if row["step"]})
    for seed in settings.seeds:
        for step in steps:
            here = [r for r in rows if (r["seed"], r["step"]) == (seed, step) and r["optimizer"] != "AdamW"]
            name = min(here, key=lambda row: row["distance"])["optimizer"]
            nearest[name] = nearest.get(name, 0) + 1
    total = len(steps) * len(settings.seeds)
    ends = {
        name: statistics.median(r["relative"] for r in rows if (r["optimizer"], r["step"]) == (name, steps[-1]))
        for name in dict.fromkeys(row["optimizer"] for row in rows if row["optimizer"] != "AdamW")
    }
    shares = ", ".join(f"{name} {count} of {total}" for name, count in nearest.items())
    relative = ", ".join(f"{name} {end:.2f}" for name, end in ends.items())
    measured = f"nearest: {shares}; final distance over that of AdamW from the start, median of seeds: {relative}"
    return Claim("Adam-mini is nearest to AdamW at every measured step", nearest.get(MINI) == total, measured, PAPER)


def _nearer(rows: list[Row], others: tuple[str, ...]) -> Claim:
    """That Adam-mini ends nearer than each of the others, on every seed."""
    last = max(row["step"] for row in rows)
    ends = {(row["optimizer"], row["seed"]): row["distance"] for row in rows if row["step"] == last}
    wins = {o: sum(ends[MINI, s] < ends[o, s] for n, s in ends if n == MINI) for o in others}
    total = sum(name == MINI for name, _ in ends)
    measured = ", ".join(f"{name} on {count} of {total} seeds" for name, count in wins.items())
    return Claim(f"Adam-mini ends nearer than {', '.join(others)}", set(wins.values()) == {total}, measured, PAPER)


def _draw(rows: list[Row], figure: Figure) -> None:
    axes = figure.subplots()
    for name in dict.fromkeys(row["optimizer"] for row in rows if row["optimizer"] != "AdamW"):
        own = [row for row in rows if row["optimizer"] == name]
        steps = sorted({row["step"] for row in own})
        by_seed = [[r["distance"] for r in own if r["seed"] == seed] for seed in dict.fromkeys(r["seed"] for r in own)]
        lines_with_range(axes, by_seed, name, at=steps)
    axes.set(xlabel="step", ylabel="distance to AdamW's weights")
    axes.legend(fontsize=8)
