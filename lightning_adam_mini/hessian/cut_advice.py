"""Which cut one matrix asks for, from the scores of all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lightning_adam_mini.blocks import Blocks
from lightning_adam_mini.hessian.block_structure import Score, best_cut, expected_share
from lightning_adam_mini.hessian.fused_parts import Part, Rated, rate_in_parts
from lightning_adam_mini.hessian.gradient_spread import Spread

__all__ = ["KEEP", "CutAdvice", "advise_from_scores", "advise_in_parts", "without_hessian"]

KEEP = "keep"
"""Name of the cut that a parameter has without an override."""


@dataclass(frozen=True, eq=False)
class CutAdvice:
    """The advice for one matrix.

    Args:
        parameter: Its name.
        shape: Its shape.
        scores: By the name of the cut: of all candidates, and of those that can be asked for.
        best: Name of the candidate with the most information, or of the cut into `parts`; `whole` where no cut tells
            more than noise would, and where the Hessian is zero.
        runner_up: The next one, or that with the most information of the whole where there are `parts`.
        is_clear: Whether the best is ahead of the next by more than two standard errors; always for exact scores and
            for `parts`.
        structure: What to ask AdamMini for: `keep` where no other is better by more than two standard errors; None
            where nothing can be asked for.
        blocks: The cut that this is.
        reason: Why, in a sentence.
        spreads: By the name of the cut, of squared gradients; empty without gradients.
        parts: Of a fused matrix, which `cut` was chosen by; see `fused_parts`.
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
    spreads: Mapping[str, Spread] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()

    @property
    def information(self) -> float:
        """What the best cut tells, in nats; with `parts`, the mean over the best of each."""
        rated = rate_in_parts(self.parts) if self.parts else None
        return rated.information if rated else self.scores[self.best].information

    @property
    def state_bytes(self) -> int:
        """Bytes of the second moment under the advised cut; of a full one where there is none."""
        return 4 * math.prod(self.shape) if self.blocks is None else self.blocks.num_bytes()


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
    told = best_cut(scores)
    best = told or "whole"
    runner_up = next(name for name in order if name != best) if len(order) > 1 else best
    lead = scores[best].information - scores[runner_up].information
    error = math.hypot(scores[best].information_error, scores[runner_up].information_error)
    named = {asked: next(name for name in cuts if cuts[name] == blocks) for asked, blocks in expressible.items()}
    cut = _asked({asked: scores[name] for asked, name in named.items()}) if told else None
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


def advise_in_parts(
    row: CutAdvice,
    into_parts: str,
    parts: tuple[Part, ...],
    cuts: Mapping[str, Blocks],
    expressible: Mapping[str, Blocks],
) -> CutAdvice:
    """The advice for a matrix by its parts; that for the whole where the parts have no better cuts of their own.

    Args:
        row: The advice for the whole matrix.
        into_parts: Name of the cut into the parts.
        parts: From `score_parts`.
        cuts: Of the whole, by name.
        expressible: Cuts that can be asked for, by what they are called there.
    """
    within, of_whole = rate_in_parts(parts), rate_in_parts(parts, cuts[row.best])
    told = row.scores[into_parts].information_beyond_norms
    if within is None or within.information <= told:
        return row
    if of_whole and within.information - of_whole.information <= 2 * math.hypot(
        within.information_error, of_whole.information_error
    ):
        return row
    rated = {asked: found for asked, blocks in expressible.items() if (found := rate_in_parts(parts, blocks))}
    cut = _asked(rated)
    reason = (
        f"{into_parts}: its {len(parts)} parts have unlike norms, as those of a fused matrix do, and tell more by "
        f"themselves ({within.information:.2f} nats in the mean): {', '.join(part.best for part in parts)}"
    )
    if cut is None:
        reason += "; the partition can express no cut of this parameter"
    else:
        reason += f"; {_in_words(cut)} tells the most of what can be asked for ({rated[cut].information:.2f})"
    blocks = None if cut is None else expressible[cut]
    return replace(
        row,
        best=into_parts,
        runner_up=row.best,
        is_clear=True,
        structure=cut,
        blocks=blocks,
        reason=reason,
        parts=parts,
    )


def _asked(rated: Mapping[str, Score] | Mapping[str, Rated]) -> str | None:
    """What to ask for: the cut with the most information, unless what is there is not clearly worse."""
    found = max(rated, key=lambda asked: rated[asked].information, default=None)
    if found is None or KEEP not in rated:
        return found
    best, kept = rated[found], rated[KEEP]
    error = math.hypot(best.information_error, kept.information_error)
    return found if best.information - kept.information > 2 * error else KEEP


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
        nats = f"{scores[name].information:.2f} nats"
        text += f"; no override expresses it, and {_in_words(cut)} is the best that one does ({nats})"
        if not best.endswith(" x 1") and best not in ("whole", "element"):
            text += "; where such runs are heads, tell their size by register_layout and cut by head"
    return text


def _in_words(cut: str) -> str:
    return "the cut that it has" if cut == KEEP else cut


def without_hessian(
    parameter: str, cuts: Mapping[str, Blocks], expressible: Mapping[str, Blocks], spreads: Mapping[str, Spread]
) -> CutAdvice:
    """The advice for a matrix whose Hessian is zero, such as the first factor of a fresh low-rank adapter: as it is.

    Args:
        parameter: Its name.
        cuts: By name.
        expressible: Cuts that can be asked for, by what they are called there.
        spreads: Of squared gradients, for each of `cuts`; or none.
    """
    shares = {name: expected_share(blocks) for name, blocks in cuts.items()}
    shape = next(iter(cuts.values())).shape
    scores = {name: Score(s, s, cuts[name].num_values, math.prod(shape), s) for name, s in shares.items()}
    cut = KEEP if KEEP in expressible else None
    reason = "its Hessian is zero here: the loss is linear in it, or does not depend on it; ask again after some steps"
    return CutAdvice(
        parameter, shape, scores, "whole", "whole", False, cut, expressible.get(KEEP), reason, dict(spreads)
    )
