"""Dense Hessians of the matrices of a small GPT-2, and which cut each asks for (Adam-mini, Zhang et al. 2024, Fig. 4).

A random sequence of bits is the text, all of whose windows are the batch. Queries and keys, values, outputs of
attention and both matrices of the MLP are scored under every cut that the paper compares: by head, by output neuron, by
input.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_adam_mini.blocks import Blocks
from lightning_adam_mini.hessian import HessianOperator
from lightning_adam_mini.hessian.block_structure import exact_scores
from lightning_adam_mini.hessian.exact import check_dense, dense_block

from ..hessian.matrix_pictures import show_matrix, shrunk
from .bit_task import KINDS, BitSizes, Matrix, build, loss_of, matrices, windows
from .checks import check_above
from .common.outcome import Claim, Outcome, Row, medians
from .training import Training, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Settings", "run"]

log = logging.getLogger(__name__)

PAPER = "Adam-mini paper, exact Hessians of a Transformer"
BY_HEAD = ("query", "key")
CUTS = ("head", "neuron", "input")
BUDGET = 2**32


@dataclass(frozen=True)
class Settings(BitSizes):
    """Sizes of the study.

    Args:
        seeds: Of weights and bits.
        moments: Steps of AdamW before the Hessian is taken, ascending; 0 is the start.
        rate: Peak learning rate.
    """

    seeds: list[int]
    moments: list[int]
    rate: float

    def __post_init__(self) -> None:
        """Check what can be before the work."""
        super().__post_init__()
        check_above(self, 0, "rate")
        if min(self.moments) < 0 or self.moments != sorted(self.moments):
            raise ValueError(f"moments must be ascending numbers of steps from 0 on, not {self.moments}")
        check_dense([("the MLP's matrix", 4 * self.width**2)], BUDGET)


def run(settings: Settings) -> Outcome:
    """Scores of cuts of every matrix, at each moment and for each seed."""
    rows: list[Row] = []
    pictures: dict[tuple[int, str], Tensor] = {}
    for seed in settings.seeds:
        rows += _measured(settings, seed, pictures if seed == settings.seeds[0] else {})
    summary = medians(rows, ("steps", "kind", "cut"), ("share", "expected", "contrast", "information"))
    claims = [claim for steps in settings.moments for kind in KINDS for claim in _claims(rows, steps, kind)]
    draw = partial(_draw, pictures, _middle(settings))
    return Outcome(rows, claims, draw, size=(13, 2.6 * len(settings.moments)), summary=summary)


def _measured(settings: Settings, seed: int, pictures: dict[tuple[int, str], Tensor]) -> list[Row]:
    """Scores at each moment of one training; pictures are of the middle layer."""
    model, batch = build(settings, seed), windows(settings, seed)
    rows: list[Row] = []

    def measure(steps: int) -> None:
        if steps not in settings.moments:
            return
        with torch.no_grad():
            log.info("seed %d, %d steps: loss %.3f nats a bit", seed, steps, float(loss_of(model, batch)))
        operator = HessianOperator(model, loss_of, [batch], dtype=torch.float64)
        for matrix in matrices(model, settings):
            dense = dense_block(operator, matrix.block, budget_bytes=BUDGET).matrix
            rows.extend(_rows(matrix, dense, settings, seed, steps))
            if matrix.layer == _middle(settings):
                pictures[steps, matrix.kind] = shrunk(dense)

    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, betas=(0.9, 0.95), weight_decay=0.1)
    training = Training(max(settings.moments), clip=None)
    train(model, [optimizer], lambda _: loss_of(model, batch), training, measure)
    return rows


def _middle(settings: Settings) -> int:
    return (settings.layers + 1) // 2


def _cuts(shape: tuple[int, int], settings: Settings) -> dict[str, Blocks]:
    rows = settings.width // settings.heads
    return {
        "head": Blocks.rows(shape, block_size=rows),
        "neuron": Blocks.rows(shape, block_size=1),
        "input": Blocks.rows(shape, axis=1, block_size=1),
    }


def _rows(matrix: Matrix, dense: Tensor, settings: Settings, seed: int, steps: int) -> list[Row]:
    scores = exact_scores(dense, _cuts(matrix.shape, settings))
    return [
        {
            "seed": seed, "steps": steps, "layer": matrix.layer, "kind": matrix.kind, "cut": cut,
            "share": score.share, "expected": score.expected, "contrast": score.contrast,
            "information": score.information,
        }
        for cut, score in scores.items()
    ]  # fmt: skip


def _claims(rows: Sequence[Row], steps: int, kind: str) -> list[Claim]:
    """Queries and keys by head, all others by neuron: that cut tells most, in most matrices."""
    own = [row for row in rows if (row["steps"], row["kind"]) == (steps, kind)]
    told = {
        key: {row["cut"]: row["information"] for row in own if (row["seed"], row["layer"]) == key}
        for key in dict.fromkeys((row["seed"], row["layer"]) for row in own)
    }
    cut = "head" if kind in BY_HEAD else "neuron"
    wins = sum(max(scores, key=lambda name: scores[name]) == cut for scores in told.values())
    shares = {name: [row["share"] for row in own if row["cut"] == name] for name in CUTS}
    expected = {row["cut"]: row["expected"] for row in own}
    measured = f"{wins} of {len(told)} matrices; median share of the squared norm " + ", ".join(
        f"{name} {statistics.median(shares[name]):.2f} (by chance {expected[name]:.2f})" for name in CUTS
    )
    claims = [
        Claim(f"{steps} steps, {kind}: the cut by {cut} tells most of three in over half of the matrices",
              wins > len(told) / 2, measured, PAPER),
    ]  # fmt: skip
    if kind in BY_HEAD:
        least = min(shares["head"])
        claims.append(
            Claim(
                f"{steps} steps, {kind}: heads hold over half of what chance would leave out, in every layer",
                least > (1 + expected["head"]) / 2,
                f"least share {least:.2f}, by chance {expected['head']:.2f}",
                PAPER,
            )
        )
    return claims


def _draw(pictures: Mapping[tuple[int, str], Tensor], layer: int, figure: Figure) -> None:
    moments = list(dict.fromkeys(steps for steps, _ in pictures))
    panels = figure.subplots(len(moments), len(KINDS), squeeze=False)
    for number, steps in enumerate(moments):
        for axes, kind in zip(panels[number], KINDS, strict=True):
            show_matrix(axes, pictures[steps, kind], f"{kind}, layer {layer}, {steps} steps")
