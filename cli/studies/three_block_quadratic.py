"""A quadratic of three dense blocks: one rate, a rate a block, Adam and Adam-mini (Zhang et al. 2024, Fig. 3)."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from lightning_adam_mini import AdamMini
from lightning_adam_mini.schedule import Schedule

from .common.outcome import Claim, Outcome, Row, lines_with_range, medians
from .common.quadratics import (
    BlockQuadratic,
    ScaledDescent,
    adam_mini_scale,
    adam_scale,
    blockwise_scale,
    check_condition,
    random_quadratic,
)
from .common.study import check_above, check_least

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Settings", "run"]

GD, BLOCKWISE, ADAM, MINI = "GD, one rate", "GD, a rate a block", "Adam, frozen v", "Adam-mini, frozen v"
ADAM_MINI, ADAMW = "AdamMini", "torch AdamW"
WORST_CASE, BEST = "2/(L+mu)", "best tried"
PAPER = "Adam-mini paper, Figure 3"


@dataclass(frozen=True)
class Settings:
    """Sizes of the study.

    Args:
        seeds: Of eigenvalues, rotations and the start.
        block_size: Eigenvalues in a block.
        eigenvalues: What those of each block are drawn from, independently.
        iterations: Of every method.
        betas: Of `AdamMini` and torch's AdamW.
        rates: Peaks of a cosine to 0 that both try; the best is kept for each seed.
    """

    seeds: list[int]
    block_size: int
    eigenvalues: list[list[float]]
    iterations: int
    betas: tuple[float, float]
    rates: list[float]

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_least(self, 1, "block_size", "iterations")
        check_above(self, 0, "rates")
        every = [value for values in self.eigenvalues for value in values]
        if min(every) <= 0:
            raise ValueError("eigenvalues must be positive: otherwise the loss has no minimum")
        check_condition("eigenvalues", max(every) / min(every))
        if not 0 <= min(self.betas) <= max(self.betas) < 1:
            raise ValueError(f"betas must lie from 0 to below 1, not {self.betas}")


def run(settings: Settings) -> Outcome:
    """Losses of all methods on the whole quadratic, and of gradient descent and Adam on each block alone."""
    rows: list[Row] = []
    curves: dict[tuple[str, str], list[Tensor]] = {}
    for seed in settings.seeds:
        problem = _draw_problem(settings, seed)
        for method, rule, rate, losses in [*_closed_form(problem, settings), *_trained(problem, settings)]:
            rows.append(_row(seed, "whole", method, rule, rate, losses))
            if rule == WORST_CASE or method in (GD, ADAM_MINI, ADAMW):  # the others' best rates are the same
                curves.setdefault(("whole", f"{method}, {rule}"), []).append(losses)
        for number, block in enumerate(problem.blocks(), 1):
            for method, scale in ((GD, None), (ADAM, adam_scale(block))):
                descent = ScaledDescent(block, scale)
                losses = descent.losses(descent.worst_case_rate, settings.iterations)
                rows.append(_row(seed, f"block {number}", method, WORST_CASE, descent.worst_case_rate, losses))
                curves.setdefault((f"block {number}", method), []).append(losses)
    blocks = [f"block {number}" for number in range(1, len(settings.eigenvalues) + 1)]
    claims = [
        _below(rows, "whole", WORST_CASE, BLOCKWISE, ADAM, PAPER + "b"),
        _below(rows, "whole", WORST_CASE, ADAM, GD, PAPER + "b"),
        _below(rows, "whole", BEST, ADAM, GD, ""),
        *(_below(rows, block, WORST_CASE, GD, ADAM, PAPER + "d") for block in blocks),
        _below(rows, "whole", WORST_CASE, MINI, ADAM, ""),
        _below(rows, "whole", BEST, ADAM_MINI, ADAMW, ""),
    ]
    summary = medians(rows, ("problem", "method", "rate_rule"), ("rate", "first_loss", "loss_at_20", "final_loss"))
    return Outcome(rows, claims, partial(_draw, curves), size=(16, 4.2), summary=summary)


def _draw_problem(settings: Settings, seed: int) -> BlockQuadratic:
    generator = Generator().manual_seed(seed)
    choices = [torch.tensor(values, dtype=torch.float64) for values in settings.eigenvalues]
    picks = [torch.randint(len(c), (settings.block_size,), generator=generator) for c in choices]
    return random_quadratic([c[pick].tolist() for c, pick in zip(choices, picks, strict=True)], generator)


def _closed_form(problem: BlockQuadratic, settings: Settings) -> list[tuple[str, str, float, Tensor]]:
    """Method, rule of its rate, rate and losses, for all methods with a fixed diagonal scale."""
    found = []
    scales = {GD: None, ADAM: adam_scale(problem), MINI: adam_mini_scale(problem), BLOCKWISE: blockwise_scale(problem)}
    for method, scale in scales.items():
        descent = ScaledDescent(problem, scale)
        worst_case = 1.0 if method == BLOCKWISE else descent.worst_case_rate
        for rule, rate in ((WORST_CASE, worst_case), (BEST, descent.best_rate(settings.iterations))):
            found.append((method, rule, rate, descent.losses(rate, settings.iterations)))
    return found


def _trained(problem: BlockQuadratic, settings: Settings) -> list[tuple[str, str, float, Tensor]]:
    """The same for real optimizers, whose second moments follow the gradients, at the rate of the least final loss."""
    found = []
    for method in (ADAM_MINI, ADAMW):
        tried = {rate: _train(method, problem, rate, settings) for rate in settings.rates}
        best = min(tried, key=lambda rate: float(tried[rate][-1]))
        found.append((method, BEST, best, tried[best]))
    return found


def _train(method: str, problem: BlockQuadratic, rate: float, settings: Settings) -> Tensor:
    """The loss before the first step and after each, `(iterations + 1,)`, infinite where it is not finite."""
    module = nn.ParameterList(problem.start.clone().split(problem.sizes))
    optimizer: Optimizer
    if method == ADAM_MINI:
        optimizer = AdamMini(module, lr=rate, betas=settings.betas, weight_decay=0.0, partition="default")
    else:
        optimizer = torch.optim.AdamW(module.parameters(), lr=rate, betas=settings.betas, weight_decay=0.0)
    scheduler = Schedule(shape="cosine", warmup=0, floor=0.0).build(optimizer, settings.iterations)
    hessians = [block.hessian for block in problem.blocks()]
    losses = []
    for step in range(settings.iterations + 1):
        with torch.no_grad():
            for parameter, hessian in zip(module, hessians, strict=True):
                parameter.grad = hessian @ parameter
            losses.append(sum((p @ p.grad for p in module), torch.zeros(())) / 2)
        if step < settings.iterations:
            optimizer.step()
            scheduler.step()
    return torch.stack(losses).nan_to_num(nan=torch.inf, posinf=torch.inf)


def _row(seed: int, problem: str, method: str, rule: str, rate: float, losses: Tensor) -> Row:
    early = losses[min(20, len(losses) - 1)]
    return {
        "seed": seed, "problem": problem, "method": method, "rate_rule": rule, "rate": rate,
        "first_loss": float(losses[0]), "loss_at_20": float(early), "final_loss": float(losses[-1]),
    }  # fmt: skip


def _below(rows: list[Row], problem: str, rule: str, method: str, other: str, source: str) -> Claim:
    """That a method ends below another one, by the medians over the seeds."""
    ours, theirs = (
        [
            row["final_loss"]
            for row in rows
            if (row["problem"], row["method"], row["rate_rule"]) == (problem, name, rule)
        ]
        for name in (method, other)
    )
    wins = sum(one < two for one, two in zip(ours, theirs, strict=True))
    measured = (
        f"median {statistics.median(ours):.2g} ({min(ours):.2g} to {max(ours):.2g}) against "
        f"{statistics.median(theirs):.2g} ({min(theirs):.2g} to {max(theirs):.2g}); "
        f"lower on {wins} of {len(ours)} seeds"
    )
    text = f"{problem}, rate {rule}: {method!r} ends below {other!r}"
    return Claim(text, statistics.median(ours) < statistics.median(theirs), measured, source)


def _draw(curves: dict[tuple[str, str], list[Tensor]], figure: Figure) -> None:
    problems = list(dict.fromkeys(problem for problem, _ in curves))
    panels = figure.subplots(1, len(problems), width_ratios=[2.2, *([1] * (len(problems) - 1))])
    for axes, problem in zip(panels, problems, strict=True):
        for (place, label), losses in curves.items():
            if place == problem:
                shown = [one.clamp_min(1e-14).tolist() for one in losses]
                lines_with_range(axes, shown, label, band=problem != "whole", alpha=0.8)
        axes.set(yscale="log", title=problem, xlabel="iteration", ylabel="loss (floor 1e-14)")
        axes.legend(fontsize=7, loc="center right")
