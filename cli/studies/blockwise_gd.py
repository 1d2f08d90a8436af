"""Block-wise gradient descent and BAGM against Adam-mini and AdamW, each at its own best learning rate.

All but AdamW and SGD have one step size a block; blocks are whole tensors, except in Adam-mini's own partition.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_adam_mini.factory import AdamMini, AdamW
from lightning_adam_mini.factory.base import TensorwiseOptimizer

from .common.outcome import Claim, Outcome, Row, mean_and_spread
from .common.study import check_above
from .common.training import TextSettings, TextTask, best_rate, final_loss, gradient_sizes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BAGM", "Settings", "run"]

log = logging.getLogger(__name__)

SGD, BLOCKWISE, BLOCK_BAGM = "SGD, one rate", "GD, a rate a block", "BAGM"
WHOLE, MINI, ADAMW = "Adam-mini, a block a tensor", "Adam-mini", "AdamW"
MOMENTUM = 0.9
TUNING = 2
"""Seeds that pick learning rates: on one alone, a rate is picked at which the next run diverges."""
Build = Callable[[nn.Module, float], Optimizer]


@dataclass(frozen=True)
class Settings(TextSettings):
    """Sizes of the study. The mean of the first two seeds picks learning rates; the others are reported.

    Args:
        rates: Learning rates of all but SGD with one rate. Block-wise GD divides them by the size of a block's
            gradient; BAGM, whose momentum sums, takes a tenth of them.
        sgd_rates: As many learning rates of SGD with one rate.
        probe_rate: Learning rate of the AdamW run that measures the sizes of gradients.
    """

    rates: list[float]
    sgd_rates: list[float]
    probe_rate: float

    def __post_init__(self) -> None:
        """Check the seeds and rates."""
        super().__post_init__()
        check_above(self, 0, "rates", "sgd_rates", "probe_rate")
        if len(self.seeds) < TUNING + 2:
            raise ValueError("seeds must be at least four: two pick learning rates, the others give a standard error")
        if len(self.rates) != len(self.sgd_rates):
            raise ValueError("rates and sgd_rates must be as many, so that no optimizer is tuned more")


def run(settings: Settings) -> Outcome:
    """Validation loss of every method on every seed that picked no learning rate."""
    task = TextTask(settings)
    sizes = gradient_sizes(task, settings, settings.seeds[0], settings.probe_rate)
    rows: list[Row] = []
    for name, build in _builders(sizes).items():
        rates = settings.sgd_rates if name == SGD else settings.rates
        tried = {
            rate: statistics.fmean(_loss(task, settings, seed, build, rate) for seed in settings.seeds[:TUNING])
            for rate in rates
        }
        rate, is_inside = best_rate(tried)
        for seed in settings.seeds[TUNING:]:
            loss = _loss(task, settings, seed, build, rate)
            rows.append({"method": name, "rate": rate, "rate_is_inside": is_inside, "seed": seed, "loss": loss})
        log.info("%s: rate %g, loss %.4f", name, rate, rows[-1]["loss"])
    summary = []
    for name in _builders(sizes):
        own = [row for row in rows if row["method"] == name]
        mean, deviation = mean_and_spread([row["loss"] for row in own])
        summary.append(
            {**{key: own[0][key] for key in ("method", "rate", "rate_is_inside")}, "loss": mean, "spread": deviation}
        )
    claims = [
        _below(rows, BLOCKWISE, SGD, "Adam-mini paper, Section 2.1"),
        _below(rows, BLOCK_BAGM, SGD, ""),
        _below(rows, MINI, SGD, ""),
        _below(rows, WHOLE, BLOCK_BAGM, "Adam-mini paper, Appendix C"),
        _below(rows, MINI, BLOCK_BAGM, "Adam-mini paper, Appendix C"),
        _below(rows, MINI, WHOLE, "Adam-mini paper, Figure 4d"),
        _below(rows, BLOCKWISE, ADAMW, "Adam-mini paper, Section 2.1"),
    ]
    return Outcome(rows, claims, partial(_draw, summary), summary=summary, size=(8, 3.5))


class BAGM(TensorwiseOptimizer):
    r"""Block-wise adaptive gradient with momentum; each parameter is one block.

    .. math::
        u \leftarrow \beta_2 u + (1-\beta_2) \operatorname{mean}(g^2), \qquad
        m' \leftarrow \beta_1 m - \eta \sqrt{1-\beta_2^t} \frac{g}{\sqrt u + \epsilon}, \qquad
        p \leftarrow p - \beta_1 m + (1 + \beta_1) m'

    Gradients are taken at weights that look ahead, `p + beta1 m` (Zheng and Kwok 2019, "Blockwise Adaptivity: Faster
    Training and Better Generalization in Deep Learning", with the details of MXNet's implementation). Unlike in
    Adam-mini, the momentum is of normalised gradients, has no bias correction, and sums, so that a learning rate moves
    weights `1 / (1 - beta1)` times as far.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        betas: Decay rates of the momentum and of the squared gradient.
        eps: Added to the root of the second moment.
        weight_decay: Coefficient of an L2 term of the gradient.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def update_(self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """See `TensorwiseOptimizer.update_`."""
        beta1, beta2 = group["betas"]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(param)
            state["exp_avg_sq"] = param.new_zeros(())
        momentum, mean_square = state["momentum"], state["exp_avg_sq"]
        grad = grad.add(param, alpha=group["weight_decay"])
        mean_square.lerp_(grad.square().mean(), 1 - beta2)
        lr = group["lr"] * (1 - beta2 ** float(state["step"])) ** 0.5
        param.sub_(momentum, alpha=beta1)
        momentum.mul_(beta1).sub_(grad * (lr / (mean_square.sqrt() + group["eps"])))
        param.add_(momentum, alpha=1 + beta1)


def _builders(sizes: dict[str, float]) -> dict[str, Build]:
    """How each optimizer is built from a model and a learning rate. Momenta are averages, so that rates compare."""

    def blockwise(model: nn.Module, rate: float) -> Optimizer:
        groups = [{"params": [p], "lr": rate / sizes[name]} for name, p in model.named_parameters()]
        return torch.optim.SGD(groups, momentum=MOMENTUM, dampening=MOMENTUM)

    return {
        SGD: lambda model, rate: torch.optim.SGD(model.parameters(), lr=rate, momentum=MOMENTUM, dampening=MOMENTUM),
        BLOCKWISE: blockwise,
        BLOCK_BAGM: lambda model, rate: BAGM(model.parameters(), lr=rate * (1 - MOMENTUM), betas=(MOMENTUM, 0.95)),
        WHOLE: lambda model, rate: AdamMini(lr=rate, weight_decay=0.0, partition="default").build(model),
        MINI: lambda model, rate: AdamMini(lr=rate, weight_decay=0.0).build(model),
        ADAMW: lambda model, rate: AdamW(lr=rate, weight_decay=0.0).build(model),
    }


def _loss(task: TextTask, settings: Settings, seed: int, build: Build, rate: float) -> float:
    return final_loss(task, settings, seed, lambda model: [build(model, rate)])


def _below(rows: list[Row], method: str, other: str, source: str) -> Claim:
    """That the mean loss is lower, by more than twice the standard error of the differences of the same seeds."""
    ours, theirs = ([row["loss"] for row in rows if row["method"] == name] for name in (method, other))
    mean, deviation = mean_and_spread([one - two for one, two in zip(ours, theirs, strict=True)])
    error = deviation / math.sqrt(len(ours))
    measured = (
        f"{statistics.fmean(ours):.3f} against {statistics.fmean(theirs):.3f}, difference {mean:+.3f} with standard "
        f"error {error:.3f} over {len(ours)} seeds"
    )
    return Claim(f"{method!r} ends below {other!r}", mean < -2 * error, measured, source)


def _draw(summary: list[Row], figure: Figure) -> None:
    axes = figure.subplots()
    names = [f"{line['method']}\n(rate {line['rate']:g})" for line in summary]
    losses, spreads = ([line[column] for line in summary] for column in ("loss", "spread"))
    axes.errorbar(losses, names, xerr=spreads, fmt="o", capsize=3)
    for name, loss in zip(names, losses, strict=True):
        axes.annotate(f"{loss:.3f}", (loss, name), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8)
    axes.invert_yaxis()
    axes.margins(y=0.15)
    axes.set_xlabel("validation loss, nats a byte; mean and standard deviation of seeds")
