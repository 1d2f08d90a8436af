"""Parts of a matrix whose norms are unlike, such as those of a fused one, each looked at by itself.

Scores of a fused matrix are those of its largest part: in a GPT-2 at its first weights, values have ten times the
squared norm of queries and keys, and hide that these have heads. So where a cut into a few long runs tells mostly that
their norms are unlike, each run is scored as a matrix of its own. Where they have better cuts of their own than that of
the whole, and these tell more than the cut into the runs, the mean over them says what to ask of all. Heads are no such
parts, for their norms are alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lightning_adam_mini.blocks import Blocks
from lightning_adam_mini.hessian.block_structure import Score, ZeroHessianError, best_cut, candidate_cuts
from lightning_adam_mini.hessian.blocks_of import ParameterBlock, blocks_of

__all__ = ["MAX_PARTS", "Part", "Rated", "ScoreFunction", "find_parts", "rate_in_parts", "score_parts"]

MAX_PARTS = 8
"""Runs of more than so many are no parts: fused matrices have two to four."""


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a matrix as one of its own.

    Args:
        block: Its elements.
        cuts: Its candidates, by name.
        scores: Of each.
    """

    block: ParameterBlock
    cuts: Mapping[str, Blocks]
    scores: Mapping[str, Score]

    @property
    def best(self) -> str:
        """Name of the candidate with the most information; `whole` where none tells more than noise would."""
        return best_cut(self.scores) or "whole"


@dataclass(frozen=True)
class Rated:
    """What a cut tells, in nats, and its standard error."""

    information: float
    information_error: float


class ScoreFunction(Protocol):
    """Gives scores of cuts of a principal block, one of a number of parts that are scored."""

    def __call__(self, block: ParameterBlock, cuts: Mapping[str, Blocks], num_parts: int = 1) -> dict[str, Score]:
        """By the names of the cuts."""


def find_parts(cuts: Mapping[str, Blocks], scores: Mapping[str, Score]) -> str | None:
    """The cut into a few runs that tells the most, and more by the unlike norms of the runs than by anything else.

    Args:
        cuts: By name.
        scores: Of each.
    """
    found = {
        name: score
        for name, score in scores.items()
        if _is_into_parts(cuts[name]) and score.information_beyond_norms < score.information / 2
    }
    return best_cut(found)


def _is_into_parts(cut: Blocks) -> bool:
    """Whether the blocks are long runs of rows or columns, and few."""
    return len(cut.segments) == 1 and not cut.cuts_rows and 2 <= cut.num_values <= MAX_PARTS


def score_parts(parameter: str, cut: Blocks, score: ScoreFunction) -> tuple[Part, ...]:
    """Score the blocks of a cut as matrices of their own; none where the Hessian of one is zero.

    Args:
        parameter: Its name.
        cut: From `find_parts`.
        score: Gives the scores of a part.
    """
    number = cut.num_values
    shape = tuple(size // number if axis == cut.axis else size for axis, size in enumerate(cut.shape))
    cuts = candidate_cuts(shape)
    try:
        return tuple(Part(block, cuts, score(block, cuts, number)) for block in blocks_of(parameter, cut))
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
    count = int(numbers.max()) + 1  # few candidates have as many, and only these are compared
    candidates = (name for name, blocks in part.cuts.items() if blocks.num_values == count)
    return next((name for name in candidates if torch.equal(part.cuts[name].block_index().flatten(), numbers)), None)
