"""Which cut each matrix of a model asks for, found from its Hessian and its gradients alone.

Neither types of modules nor names of parameters are read: every run of rows and of columns whose length divides the
dimension is tried, and the one that tells most about where the Hessian's energy lies is taken (`Score.information`).
What the partition of AdamMini can express is another matter: the caller gives those cuts, and the best among them is
recommended.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from lightning_adam_mini.blocks import Blocks, Kind
from lightning_adam_mini.hessian.block_structure import Score, ZeroHessianError, candidate_cuts, exact_scores
from lightning_adam_mini.hessian.blocks_of import ParameterBlock
from lightning_adam_mini.hessian.cut_advice import (
    KEEP,
    CutAdvice,
    advise_from_scores,
    advise_in_parts,
    without_hessian,
)
from lightning_adam_mini.hessian.exact import DEFAULT_DENSE_BUDGET, check_dense, dense_block
from lightning_adam_mini.hessian.fused_parts import ScoreFunction, find_parts, score_parts
from lightning_adam_mini.hessian.gradient_spread import spread_from, spread_sums
from lightning_adam_mini.hessian.operators import HessianOperator
from lightning_adam_mini.hessian.sketched_diagonality import DEFAULT_COLUMNS, sketched_scores

__all__ = ["Advice", "advise"]

EXACT_UP_TO = 1024
"""Elements up to which the dense Hessian is computed where the method is left open."""
_LEAST_COLUMNS = 8
"""Of a part."""


@dataclass(frozen=True, eq=False)
class Advice:
    """The advice for a model.

    Args:
        rows: One for each matrix.
    """

    rows: tuple[CutAdvice, ...]

    @property
    def overrides(self) -> dict[str, str]:
        """What `AdamMini(model, partition_overrides=...)` takes, beside the partition that the rows keep."""
        asked = {
            row.parameter: row.structure for row in self.rows if row.structure is not None and row.structure != KEEP
        }
        return {f"re:^{re.escape(name)}$": cut for name, cut in asked.items()}

    @property
    def state_bytes(self) -> int:
        """Bytes of the second moments of these matrices."""
        return sum(row.state_bytes for row in self.rows)

    @property
    def full_bytes(self) -> int:
        """Bytes of theirs with a value for each element."""
        return sum(4 * math.prod(row.shape) for row in self.rows)


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
) -> Advice:
    """Compare candidate cuts of every matrix, and of the parts of fused ones.

    Args:
        operator: The Hessian.
        expressible: By parameter, the cuts that overrides of the partition can ask for, by their names (`head`, `row`,
            `whole`, `element`), and the one that it has without any, `keep`.
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
        raise ValueError("the model has no trainable matrix: vectors have no rows or heads to cut by")
    sizes = {name: operator.block_size(ParameterBlock(name, name)) for name in names}
    dense = {name for name in names if method == "exact" or (method == "auto" and sizes[name] <= EXACT_UP_TO)}
    check_dense([(name, sizes[name]) for name in dense], budget_bytes)
    rows = []
    for number, name in enumerate(names, 1):
        if on_parameter:
            on_parameter(name, number, len(names))
        own = _with_blocks(expressible.get(name, {}))
        cuts = _all_cuts(shapes[name], own)
        spreads = {}
        if squares is not None:
            spreads = {cut: spread_from(spread_sums(blocks, squares[name])) for cut, blocks in cuts.items()}
        if name in dense:
            score = _dense_scores(operator, name, budget_bytes)
        else:
            score = partial(_sketched_scores, operator, columns=columns, seed=seed, budget_bytes=budget_bytes)
        try:
            scores = score(ParameterBlock(name, name), cuts)
        except ZeroHessianError:
            rows.append(without_hessian(name, cuts, own, spreads))
            continue
        row = advise_from_scores(name, cuts, scores, own, spreads)
        if (into_parts := find_parts(cuts, scores)) and (parts := score_parts(name, cuts[into_parts], score)):
            row = advise_in_parts(row, into_parts, parts, cuts, own)
        rows.append(row)
    return Advice(tuple(rows))


def _dense_scores(operator: HessianOperator, parameter: str, budget_bytes: int) -> ScoreFunction:
    """Scores of a parameter and of its parts by its dense Hessian."""
    matrix = dense_block(operator, ParameterBlock(parameter, parameter), budget_bytes=budget_bytes).matrix

    def score(block: ParameterBlock, cuts: Mapping[str, Blocks], num_parts: int = 1) -> dict[str, Score]:
        return exact_scores(matrix if block.index is None else matrix[block.index][:, block.index], cuts)

    return score


def _sketched_scores(
    operator: HessianOperator,
    block: ParameterBlock,
    cuts: Mapping[str, Blocks],
    num_parts: int = 1,
    *,
    columns: int,
    seed: int,
    budget_bytes: int,
) -> dict[str, Score]:
    """The same by a sketch, in which all parts take about as many columns as the whole."""
    columns = max(columns // num_parts, min(columns, _LEAST_COLUMNS))
    return sketched_scores(operator, block, cuts, columns=columns, seed=seed, budget_bytes=budget_bytes)


def _all_cuts(shape: tuple[int, ...], expressible: Mapping[str, Blocks]) -> dict[str, Blocks]:
    """Candidates, and what can be asked for that is none of them, such as heads of a fused matrix beside rows."""
    cuts = candidate_cuts(shape)
    for name, blocks in expressible.items():
        if blocks not in cuts.values():
            cuts[f"asked {name}"] = blocks
    return cuts


def _with_blocks(expressible: Mapping[str, Blocks]) -> dict[str, Blocks]:
    return {name: blocks for name, blocks in expressible.items() if blocks.kind is not Kind.FACTORED}
