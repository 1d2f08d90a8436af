"""Parts of a fused matrix, each looked at by itself.

Scores of a fused matrix are those of its largest part: in a GPT-2 at its first weights, values have ten times the
squared norm of queries and keys, and hide that these have heads. So where the best cut of a matrix is into a few long
runs, each of them is scored as a matrix of its own. Where they tell more by themselves than the cut into them does,
beyond that some of them have larger entries, the matrix is fused, and what is asked of all of it is the mean over its
parts. Heads are no such parts: they are as large as each other, and little is left to tell within them.

A principal block of the Hessian does not change when the rest of the matrix does, so that parts are compared at one
scale each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lightning_adam_mini.blocks import Blocks
from lightning_adam_mini.hessian.block_diagonality import Score, ZeroHessianError, candidate_cuts
from lightning_adam_mini.hessian.blocks_of import ParameterBlock, blocks_of

__all__ = ["MAX_PARTS", "Part", "Rated", "ScoreFunction", "rate_in_parts", "score_parts"]

MAX_PARTS = 8
"""Runs of more than so many are no parts: fused matrices have two to four."""


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a matrix as one of its own.

    Args:
        block: Its elements.
        shape: Its shape.
        scores: Of its candidate cuts, by name.
    """

    block: ParameterBlock
    shape: tuple[int, ...]
    scores: Mapping[str, Score]

    @property
    def best(self) -> str:
        """Name of the candidate with the most information; `whole` where none tells more than noise would."""
        told = {name: score.information for name, score in self.scores.items() if score.information > score.noise}
        return max(told, key=told.__getitem__, default="whole")


@dataclass(frozen=True)
class Rated:
    """What a cut tells, in nats, and its standard error."""

    information: float
    information_error: float


class ScoreFunction(Protocol):
    """Gives scores of cuts of a principal block, one of a number of parts that are scored."""

    def __call__(self, block: ParameterBlock, cuts: Mapping[str, Blocks], num_parts: int = 1) -> dict[str, Score]:
        """By the names of the cuts."""


def score_parts(parameter: str, cut: Blocks, score: ScoreFunction) -> tuple[Part, ...]:
    """Score the blocks of a cut as matrices of their own; none where they are single rows or columns, or too many.

    Args:
        parameter: Its name.
        cut: Into runs of rows or of columns; any other has no parts.
        score: Gives the scores of a part.
    """
    number = cut.num_values
    if cut.axis is None or len(cut.segments) != 1 or cut.cuts_rows or not 2 <= number <= MAX_PARTS:
        return ()
    shape = tuple(size // number if axis == cut.axis else size for axis, size in enumerate(cut.shape))
    cuts = candidate_cuts(shape)
    try:
        return tuple(Part(block, shape, score(block, cuts, number)) for block in blocks_of(parameter, cut))
    except ZeroHessianError:
        return ()


def rate_in_parts(parts: Sequence[Part], cut: Blocks | None = None) -> Rated | None:
    """What a cut tells within parts, in the mean over them; None where it is none of the candidates of a part.

    Args:
        parts: Of one matrix.
        cut: Of the whole matrix; by default the best one of each part.
    """
    scores = []
    for part in parts:
        name = part.best if cut is None else _within(part, cut)
        if name is None:
            return None
        scores.append(part.scores[name])
    information = sum(score.information for score in scores) / len(scores)
    return Rated(information, math.hypot(*(score.information_error for score in scores)) / len(scores))


def _within(part: Part, cut: Blocks) -> str | None:
    """The candidate of a part that a cut of the whole matrix is within it."""
    assert part.block.index is not None
    numbers = cut.block_index().flatten()[part.block.index].unique(return_inverse=True)[1]
    candidates = candidate_cuts(part.shape).items()
    return next((name for name, blocks in candidates if torch.equal(blocks.block_index().flatten(), numbers)), None)
