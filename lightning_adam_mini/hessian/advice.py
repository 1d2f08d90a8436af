"""Which block structure each matrix of a model needs, found from its Hessian and its gradients alone.

Neither types of modules nor names of parameters are read: every run of rows and of columns whose length divides the
dimension is tried, and the one that knows most about where the Hessian's energy is wins (`Score.information`). What the
partition of AdamMini can express is another matter: the caller gives those structures, and the best of them is advised.

The scores of a fused matrix are those of its largest part: in a GPT-2 at its first weights, values have ten times the
squared norm of queries and keys, and hide that these have heads. So where a structure of a few long runs knows mostly
that their norms differ, each run is scored as a matrix of its own. Where these parts have better structures of their
own than that of the whole, and these have more information than the runs, the mean over them decides what to ask for.
Heads are not such parts, because their norms are the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from lightning_adam_mini.blocks import Blocks, Kind
from lightning_adam_mini.hessian.block_structure import (
    DEFAULT_COLUMNS,
    LogGradientVariance,
    Score,
    ZeroHessianError,
    best_structure,
    candidate_structures,
    exact_scores,
    expected_share,
    sketched_scores,
    spread_from,
    spread_sums,
)
from lightning_adam_mini.hessian.exact import DEFAULT_DENSE_BUDGET, check_dense, dense_block
from lightning_adam_mini.hessian.operators import HessianOperator
from lightning_adam_mini.hessian.vectors import ParameterBlock, blocks_of

__all__ = [
    "KEEP",
    "MatrixAdvice",
    "MatrixPart",
    "ModelAdvice",
    "advise",
    "advise_from_parts",
    "advise_from_scores",
    "find_parts",
    "rate_parts",
    "score_parts",
]

KEEP = "keep"
"""Name of the block structure that a parameter has without an override."""
EXACT_UP_TO = 1024
"""Elements up to which the method `auto` computes the dense Hessian."""
MAX_PARTS = 8
"""More runs than this are not parts: fused matrices have two to four."""
_LEAST_COLUMNS = 8
"""Of a part."""


@dataclass(frozen=True, eq=False)
class MatrixPart:
    """A part of a fused matrix as a matrix of its own.

    Args:
        block: Its elements.
        structures: Its candidates, by name.
        scores: Of each.
    """

    block: ParameterBlock
    structures: Mapping[str, Blocks]
    scores: Mapping[str, Score]

    @property
    def best(self) -> str:
        """Name of the candidate with the most information; `whole` where none has more than about noise."""
        return best_structure(self.scores) or "whole"


@dataclass(frozen=True)
class PartsScore:
    """The information of a structure in nats, as the mean over parts, and its standard error."""

    information: float
    information_error: float


@dataclass(frozen=True, eq=False)
class MatrixAdvice:
    """The advice for one matrix.

    Args:
        parameter: Its name.
        shape: Its shape.
        scores: By the name of the structure: of all candidates, and of those that can be asked for.
        best: Name of the candidate with the most information, or of the runs that are the `parts`; `whole` where no
            structure has more information than about noise, and where the Hessian is zero.
        runner_up: The next one; with `parts`, that with the most information about the whole.
        is_clear: Whether the best is ahead of the next by more than two standard errors; always for exact scores and
            for `parts`.
        structure: What to ask AdamMini for: `keep` unless another one is better by more than two standard errors; None
            where nothing can be asked for.
        blocks: The blocks of that structure.
        reason: Why, in a sentence.
        spreads: By the name of the structure, of squared gradients; empty without gradients.
        parts: Of a fused matrix, if they decided the structure.
    """

    parameter: str
    shape: tuple[int, ...]
    scores: Mapping[str, Score]
    best: str
    runner_up: str
    is_clear: bool
    structure: str | None
    blocks: Blocks | None
    reason: str
    spreads: Mapping[str, LogGradientVariance] = field(default_factory=dict)
    parts: tuple[MatrixPart, ...] = ()

    @property
    def information(self) -> float:
        """Of the best structure, in nats; with `parts`, the mean over the best of each."""
        rated = rate_parts(self.parts) if self.parts else None
        return rated.information if rated else self.scores[self.best].information

    @property
    def state_bytes(self) -> int:
        """Bytes of the second moment with the advised structure; of a full one without advice."""
        return 4 * math.prod(self.shape) if self.blocks is None else self.blocks.num_bytes()


@dataclass(frozen=True, eq=False)
class ModelAdvice:
    """The advice for a model.

    Args:
        rows: One for each matrix.
    """

    rows: tuple[MatrixAdvice, ...]

    @property
    def overrides(self) -> dict[str, str]:
        """For `AdamMini(model, partition_overrides=...)`, in addition to the partition that the rows keep."""
        asked = {
            row.parameter: row.structure for row in self.rows if row.structure is not None and row.structure != KEEP
        }
        return {f"re:^{re.escape(name)}$": structure for name, structure in asked.items()}

    @property
    def state_bytes(self) -> int:
        """Bytes of the second moments of these matrices."""
        return sum(row.state_bytes for row in self.rows)

    @property
    def full_bytes(self) -> int:
        """Bytes of the same with a value for each element."""
        return sum(4 * math.prod(row.shape) for row in self.rows)


class ScoreFunction(Protocol):
    """Scores block structures of a principal block, one of a number of parts that are scored."""

    def __call__(self, block: ParameterBlock, structures: Mapping[str, Blocks], num_parts: int = 1) -> dict[str, Score]:
        """By the names of the structures."""


def advise(
    operator: HessianOperator,
    expressible: Mapping[str, Mapping[str, Blocks]],
    *,
    parameters: Iterable[str] | None = None,
    squares: Mapping[str, Tensor] | None = None,
    method: str = "auto",
    columns: int = DEFAULT_COLUMNS,
    seed: int = 0,
    budget_bytes: int = DEFAULT_DENSE_BUDGET,
    on_parameter: Callable[[str, int, int], None] | None = None,
) -> ModelAdvice:
    """Compare candidate block structures of every matrix, and of the parts of fused ones.

    Args:
        operator: The Hessian.
        expressible: By parameter, the structures that overrides of the partition can ask for, by their names (`head`,
            `row`, `whole`, `element`), and the one that it has without an override, `keep`.
        parameters: Names of those to look at; by default all of two dimensions or more.
        squares: Squared gradients, or means of them, by parameter; see `mean_square_gradients`.
        method: `exact` by dense Hessians, `sketch` by some of their columns, or `auto`: exact up to 1,024 elements.
        columns: Of the sketch.
        seed: Of the sketch.
        budget_bytes: For a dense Hessian, or the graphs of gradients that columns share.
        on_parameter: Called before each with its name, its number from 1 and the number of all.

    Raises:
        ValueError: An unknown method, no matrix, or a dense Hessian that does not fit.
    """
    if method not in ("auto", "exact", "sketch"):
        raise ValueError(f"method must be 'auto', 'exact' or 'sketch', not {method!r}")
    shapes = {name: tuple(shape) for name, shape in operator.layout.shapes.items()}
    names = [name for name, shape in shapes.items() if len(shape) > 1] if parameters is None else list(parameters)
    if not names:
        raise ValueError("the model has no trainable matrix: vectors have no rows or heads")
    sizes = {name: operator.block_size(ParameterBlock(name, name)) for name in names}
    dense = {
        name: size for name, size in sizes.items() if method == "exact" or (method == "auto" and size <= EXACT_UP_TO)
    }
    check_dense(dense, budget_bytes)
    rows = []
    for number, name in enumerate(names, 1):
        if on_parameter:
            on_parameter(name, number, len(names))
        own = {asked: b for asked, b in expressible.get(name, {}).items() if b.kind is not Kind.FACTORED}
        structures = candidate_structures(shapes[name])
        # What can be asked for may be no candidate, such as heads of a fused matrix next to rows.
        structures |= {f"asked {asked}": b for asked, b in own.items() if b not in structures.values()}
        spreads = {}
        if squares is not None:
            spreads = {key: spread_from(spread_sums(blocks, squares[name])) for key, blocks in structures.items()}
        if name in dense:
            score = _dense_scores(operator, name, budget_bytes)
        else:
            score = partial(_sketched_scores, operator, columns=columns, seed=seed, budget_bytes=budget_bytes)
        try:
            scores = score(ParameterBlock(name, name), structures)
        except ZeroHessianError:
            rows.append(_without_hessian(name, structures, own, spreads))
            continue
        row = advise_from_scores(name, structures, scores, own, spreads)
        if (runs := find_parts(structures, scores)) and (parts := score_parts(name, structures[runs], score)):
            row = advise_from_parts(row, runs, parts, structures, own)
        rows.append(row)
    return ModelAdvice(tuple(rows))


def _dense_scores(operator: HessianOperator, parameter: str, budget_bytes: int) -> ScoreFunction:
    """Scores of a parameter and of its parts by its dense Hessian."""
    matrix = dense_block(operator, ParameterBlock(parameter, parameter), budget_bytes=budget_bytes).matrix

    def score(block: ParameterBlock, structures: Mapping[str, Blocks], num_parts: int = 1) -> dict[str, Score]:
        return exact_scores(matrix if block.index is None else matrix[block.index][:, block.index], structures)

    return score


def _sketched_scores(
    operator: HessianOperator,
    block: ParameterBlock,
    structures: Mapping[str, Blocks],
    num_parts: int = 1,
    *,
    columns: int,
    seed: int,
    budget_bytes: int,
) -> dict[str, Score]:
    """The same by a sketch, in which all parts take about as many columns as the whole."""
    columns = max(columns // num_parts, min(columns, _LEAST_COLUMNS))
    return sketched_scores(operator, block, structures, columns=columns, seed=seed, budget_bytes=budget_bytes)


def advise_from_scores(
    parameter: str,
    structures: Mapping[str, Blocks],
    scores: Mapping[str, Score],
    expressible: Mapping[str, Blocks],
    spreads: Mapping[str, LogGradientVariance] | None = None,
) -> MatrixAdvice:
    """The advice for one matrix from the scores of its block structures.

    Args:
        parameter: Its name.
        structures: By name; equal ones have one name.
        scores: Of each.
        expressible: Structures that can be asked for, by what they are called there.
        spreads: Of squared gradients, for each of `structures`.
    """
    order = sorted(scores, key=lambda name: scores[name].information, reverse=True)
    informative = best_structure(scores)
    best = informative or "whole"
    runner_up = next(name for name in order if name != best) if len(order) > 1 else best
    lead = scores[best].information - scores[runner_up].information
    error = math.hypot(scores[best].information_error, scores[runner_up].information_error)
    names = {
        asked: next(name for name in structures if structures[name] == blocks) for asked, blocks in expressible.items()
    }
    asked = None
    if informative:
        asked = _best_to_ask({key: scores[name] for key, name in names.items()})
    elif "whole" in names:
        asked = KEEP if names.get(KEEP) == names["whole"] else "whole"
    is_clear = bool(informative) and lead >= 2 * error
    if informative:
        reason = _reason(best, scores, asked, None if asked is None else names[asked], is_clear=is_clear)
    else:
        reason = "no block structure has more information about the Hessian than about noise: one block"
    return MatrixAdvice(
        parameter,
        next(iter(structures.values())).shape,
        dict(scores),
        best,
        runner_up,
        is_clear,
        asked,
        None if asked is None else expressible[asked],
        reason,
        dict(spreads or {}),
    )


def _without_hessian(
    parameter: str,
    structures: Mapping[str, Blocks],
    expressible: Mapping[str, Blocks],
    spreads: Mapping[str, LogGradientVariance],
) -> MatrixAdvice:
    """The advice for a matrix whose Hessian is zero, such as the first factor of a fresh low-rank adapter: keep it."""
    shape, scores = next(iter(structures.values())).shape, {}
    for name, blocks in structures.items():
        share = expected_share(blocks)
        scores[name] = Score(share, share, blocks.num_values, math.prod(shape), share)
    asked = KEEP if KEEP in expressible else None
    reason = "its Hessian is zero here: the loss is linear in it, or does not depend on it; ask again after some steps"
    return MatrixAdvice(
        parameter, shape, scores, "whole", "whole", False, asked, expressible.get(KEEP), reason, dict(spreads)
    )


def find_parts(structures: Mapping[str, Blocks], scores: Mapping[str, Score]) -> str | None:
    """The most informative structure of a few long runs, if its information is mostly that the runs' norms differ.

    Args:
        structures: By name.
        scores: Of each.
    """
    return best_structure(
        {
            name: score
            for name, score in scores.items()
            if _is_into_parts(structures[name]) and score.information_beyond_norms < score.information / 2
        }
    )


def _is_into_parts(blocks: Blocks) -> bool:
    """Whether the blocks are long runs of rows or columns, and few."""
    return len(blocks.segments) == 1 and not blocks.has_row_blocks and 2 <= blocks.num_values <= MAX_PARTS


def score_parts(parameter: str, runs: Blocks, score: ScoreFunction) -> tuple[MatrixPart, ...]:
    """Score the blocks of a structure as matrices of their own; none where the Hessian of one is zero.

    Args:
        parameter: Its name.
        runs: From `find_parts`.
        score: Scores a part.
    """
    number = runs.num_values
    shape = tuple(size // number if axis == runs.axis else size for axis, size in enumerate(runs.shape))
    structures = candidate_structures(shape)
    try:
        return tuple(
            MatrixPart(block, structures, score(block, structures, number)) for block in blocks_of(parameter, runs)
        )
    except ZeroHessianError:
        return ()


def rate_parts(parts: Sequence[MatrixPart], blocks: Blocks | None = None) -> PartsScore | None:
    """The mean information over parts; None where the structure is none of the candidates within a part.

    Args:
        parts: Of one matrix.
        blocks: A structure of the whole matrix; by default the best one of each part.
    """
    scores = []
    for part in parts:
        name = part.best if blocks is None else _within(part, blocks)
        if name is None:
            return None
        scores.append(part.scores[name])
    information = sum(score.information for score in scores) / len(scores)
    return PartsScore(information, math.hypot(*(score.information_error for score in scores)) / len(scores))


def _within(part: MatrixPart, blocks: Blocks) -> str | None:
    """The candidate of a part that a structure of the whole matrix is within it."""
    assert part.block.index is not None
    numbers = blocks.block_index().flatten()[part.block.index].unique(return_inverse=True)[1]
    count = int(numbers.max()) + 1  # few candidates have as many blocks, and only these are compared
    candidates = [(name, own) for name, own in part.structures.items() if own.num_values == count]
    return next((name for name, own in candidates if torch.equal(own.block_index().flatten(), numbers)), None)


def advise_from_parts(
    row: MatrixAdvice,
    runs: str,
    parts: tuple[MatrixPart, ...],
    structures: Mapping[str, Blocks],
    expressible: Mapping[str, Blocks],
) -> MatrixAdvice:
    """The advice for a matrix by its parts; that for the whole where the parts have no better structures of their own.

    Args:
        row: The advice for the whole matrix.
        runs: Name of the structure whose blocks are the parts.
        parts: From `score_parts`.
        structures: Of the whole, by name.
        expressible: Structures that can be asked for, by what they are called there.
    """
    within, of_whole = rate_parts(parts), rate_parts(parts, structures[row.best])
    if within is None or within.information <= row.scores[runs].information_beyond_norms:
        return row
    if of_whole and not _is_better(within, of_whole):
        return row
    rated = {asked: found for asked, blocks in expressible.items() if (found := rate_parts(parts, blocks))}
    asked = _best_to_ask(rated)
    reason = (
        f"{runs}: its {len(parts)} parts have different norms, as those of a fused matrix do, and their own structures "
        f"have more information ({within.information:.2f} nats on average): {', '.join(part.best for part in parts)}"
    )
    if asked is None:
        reason += "; the partition cannot express a structure of this parameter"
    else:
        reason += f"; of what can be asked for, {_in_words(asked)} has the most ({rated[asked].information:.2f})"
    blocks = None if asked is None else expressible[asked]
    return replace(
        row, best=runs, runner_up=row.best, is_clear=True, structure=asked, blocks=blocks, reason=reason, parts=parts
    )


def _best_to_ask(rated: Mapping[str, Score] | Mapping[str, PartsScore]) -> str | None:
    """What to ask for: the structure with the most information, unless the present one is not clearly worse."""
    found = max(rated, key=lambda asked: rated[asked].information, default=None)
    if found is None or KEEP not in rated:
        return found
    return found if _is_better(rated[found], rated[KEEP]) else KEEP


def _is_better(first: Score | PartsScore, second: Score | PartsScore) -> bool:
    """Whether the first has more information by more than two standard errors."""
    error = math.hypot(first.information_error, second.information_error)
    return first.information - second.information > 2 * error


def _reason(best: str, scores: Mapping[str, Score], asked: str | None, name: str | None, *, is_clear: bool) -> str:
    score = scores[best]
    text = (
        f"{best}: {score.share:.0%} of the Hessian's squared norm is in {score.expected:.1%} of its entries "
        f"({score.information:.2f} nats)"
    )
    if not is_clear:
        text += ", not clearly ahead of the next"
    if asked is None or name is None:
        return f"{text}; the partition cannot express a structure of this parameter"
    if name != best:
        nats = f"{scores[name].information:.2f} nats"
        text += f"; no override expresses it, and {_in_words(asked)} is the best that one does ({nats})"
        if not best.endswith(" x 1") and best not in ("whole", "element"):
            text += "; where such runs are heads, declare their size by register_layout and ask for head blocks"
    return text


def _in_words(asked: str) -> str:
    return "its current structure" if asked == KEEP else asked
