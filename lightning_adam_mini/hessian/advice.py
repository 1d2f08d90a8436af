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
from dataclasses import dataclass, field

from torch import Tensor

from lightning_adam_mini.blocks import Blocks, Kind
from lightning_adam_mini.hessian.block_diagonality import Score, candidate_cuts, exact_scores
from lightning_adam_mini.hessian.blocks_of import ParameterBlock
from lightning_adam_mini.hessian.exact import DEFAULT_DENSE_BUDGET, check_dense, dense_block
from lightning_adam_mini.hessian.gradient_spread import Spread, spread_from, spread_sums
from lightning_adam_mini.hessian.operators import HessianOperator
from lightning_adam_mini.hessian.sketched_diagonality import DEFAULT_COLUMNS, sketched_scores

__all__ = ["KEEP", "Advice", "CutAdvice", "advise", "advise_from_scores"]

KEEP = "keep"
"""Name of the cut that a parameter has without an override."""
EXACT_UP_TO = 1024
"""Elements up to which the dense Hessian is computed where the method is left open."""


@dataclass(frozen=True, eq=False)
class CutAdvice:
    """The advice for one matrix.

    Args:
        parameter: Its name.
        shape: Its shape.
        scores: By the name of the cut: of all candidates, and of those that can be asked for.
        best: Name of the candidate with the most information; `whole` where no cut tells more than noise would.
        runner_up: The next one.
        is_clear: Whether the best is ahead of the next by more than two standard errors; always for exact scores.
        cut: What to ask AdamMini for: `keep` where no other is better by more than two standard errors; None where
            nothing can be asked for.
        blocks: The cut that this is.
        spreads: By the name of the cut, of squared gradients; empty without gradients.
        reason: Why, in a sentence.
    """

    parameter: str
    shape: tuple[int, ...]
    scores: Mapping[str, Score]
    best: str
    runner_up: str
    is_clear: bool
    cut: str | None
    blocks: Blocks | None
    reason: str
    spreads: Mapping[str, Spread] = field(default_factory=dict)

    @property
    def state_bytes(self) -> int:
        """Bytes of the second moment under the advised cut; of a full one where there is none."""
        return 4 * math.prod(self.shape) if self.blocks is None else self.blocks.num_bytes()


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
        asked = {row.parameter: row.cut for row in self.rows if row.cut is not None and row.cut != KEEP}
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
    probes: int = DEFAULT_COLUMNS,
    seed: int = 0,
    budget_bytes: int = DEFAULT_DENSE_BUDGET,
    on_parameter: Callable[[str, int, int], None] | None = None,
) -> Advice:
    """Compare candidate cuts of every matrix.

    Args:
        operator: The Hessian.
        expressible: By parameter, the cuts that overrides of the partition can ask for, by their names (`head`, `row`,
            `whole`, `element`), and the one that it has without any, `keep`.
        parameters: Names of those to look at; by default all of two dimensions or more.
        squares: Squared gradients, or means of them, by parameter; see `mean_square_gradients`.
        method: `exact` by dense Hessians, `sketch` by random signs, or `auto`: exact up to 1,024 elements.
        probes: Of the sketch.
        seed: Of the sketch.
        budget_bytes: For a dense Hessian.
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
        if name in dense:
            matrix = dense_block(operator, ParameterBlock(name, name), budget_bytes=budget_bytes).matrix
            scores = exact_scores(matrix, cuts)
            del matrix
        else:
            scores = sketched_scores(operator, name, cuts, columns=probes, seed=seed)
        spreads = {}
        if squares is not None:
            spreads = {cut: spread_from(spread_sums(blocks, squares[name])) for cut, blocks in cuts.items()}
        rows.append(advise_from_scores(name, cuts, scores, own, spreads))
    return Advice(tuple(rows))


def advise_from_scores(
    parameter: str,
    cuts: Mapping[str, Blocks],
    scores: Mapping[str, Score],
    expressible: Mapping[str, Blocks],
    spreads: Mapping[str, Spread] | None = None,
) -> CutAdvice:
    """The advice for one matrix from scores of its cuts.

    Args:
        parameter: Its name.
        cuts: By name; equal cuts have one name.
        scores: Of each.
        expressible: Cuts that can be asked for, by what they are called there.
        spreads: Of squared gradients, for each of `cuts`.
    """
    order = sorted(scores, key=lambda name: scores[name].information, reverse=True)
    told = [name for name in order if scores[name].information > scores[name].noise]
    best = told[0] if told else "whole"
    runner_up = next(name for name in order if name != best) if len(order) > 1 else best
    lead = scores[best].information - scores[runner_up].information
    error = math.hypot(scores[best].information_error, scores[runner_up].information_error)
    named = {asked: next(name for name in cuts if cuts[name] == blocks) for asked, blocks in expressible.items()}
    cut = _asked(named, scores) if told else None
    if not told and "whole" in named:
        cut = KEEP if named.get(KEEP) == named["whole"] else "whole"
    shape = next(iter(cuts.values())).shape
    is_clear = bool(told) and lead >= 2 * error
    reason = _reason(best, scores, cut, None if cut is None else named[cut], told=bool(told), is_clear=is_clear)
    return CutAdvice(
        parameter,
        shape,
        dict(scores),
        best,
        runner_up,
        is_clear,
        cut,
        None if cut is None else expressible[cut],
        reason,
        dict(spreads or {}),
    )


def _asked(named: Mapping[str, str], scores: Mapping[str, Score]) -> str | None:
    """What to ask for: the cut with the most information, unless what is there is not clearly worse."""
    found = max(named, key=lambda asked: scores[named[asked]].information, default=None)
    if found is None or KEEP not in named:
        return found
    best, kept = scores[named[found]], scores[named[KEEP]]
    error = math.hypot(best.information_error, kept.information_error)
    return found if best.information - kept.information > 2 * error else KEEP


def _all_cuts(shape: tuple[int, ...], expressible: Mapping[str, Blocks]) -> dict[str, Blocks]:
    """Candidates, and what can be asked for that is none of them, such as heads of a fused matrix beside rows."""
    cuts = candidate_cuts(shape)
    for name, blocks in expressible.items():
        if blocks not in cuts.values():
            cuts[f"asked {name}"] = blocks
    return cuts


def _with_blocks(expressible: Mapping[str, Blocks]) -> dict[str, Blocks]:
    return {name: blocks for name, blocks in expressible.items() if blocks.kind is not Kind.ROW_COLUMN}


def _reason(
    best: str, scores: Mapping[str, Score], cut: str | None, name: str | None, *, told: bool, is_clear: bool
) -> str:
    score = scores[best]
    if not told:
        return "no cut tells more about the Hessian than it would about noise: one block"
    text = (
        f"{best}: {score.share:.0%} of the Hessian's squared norm lies in {score.expected:.1%} of its entries "
        f"({score.information:.2f} nats)"
    )
    if not is_clear:
        text += ", not clearly ahead of the next"
    if cut is None or name is None:
        return f"{text}; the partition can express no cut of this parameter"
    if name != best:
        kept = "the cut that it has" if cut == KEEP else f"{cut}"
        text += (
            f"; no override expresses it, and {kept} is the best that one does ({scores[name].information:.2f} nats)"
        )
        if not best.endswith(" x 1") and best not in ("whole", "element"):
            text += "; where such runs are heads, tell their size by register_layout and cut by head"
    return text
