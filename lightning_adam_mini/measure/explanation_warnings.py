"""What a user should look at before training with a partition, each in one sentence with its remedy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lightning_adam_mini.blocks import Kind
from lightning_adam_mini.measure.collapse import collapse_names
from lightning_adam_mini.partition import ParameterPartition, Role, Strategy, Structure, doubts

if TYPE_CHECKING:
    from lightning_adam_mini.measure.explanation import Totals

__all__ = ["find_warnings"]

TABLES = frozenset({Role.TOKEN_EMBEDDING, Role.POSITION_EMBEDDING, Role.OUTPUT_HEAD})


def find_warnings(
    strategy: Strategy,
    cuts: Sequence[ParameterPartition],
    totals: Totals,
    frozen: int,
    advise: Callable[[Sequence[str]], str],
    is_auto: bool,
) -> tuple[str, ...]:
    """Warnings about the trainable parameters of a model.

    Args:
        strategy: The strategy that cut them, where no override did.
        cuts: The trainable parameters.
        totals: Sums over them.
        frozen: Number of parameters that are left out.
        advise: Layouts, as text, that tell the order of fused matrices by their names.
        is_auto: Whether `auto` chose the strategy.
    """
    found = [
        _nothing_trained(cuts, frozen),
        _unknown(strategy, cuts, totals),
        *doubts(cuts, strategy, is_auto=is_auto),
        *_unknown_heads(strategy, cuts, advise),
        _collapsed(strategy, cuts),
        _larger_than_adamw(strategy, totals),
    ]
    return tuple(warning for warning in found if warning)


def _nothing_trained(cuts: Sequence[ParameterPartition], frozen: int) -> str:
    if cuts:
        return ""
    why = "every parameter is frozen" if frozen else "the model has no parameters"
    return f"{why}: there is nothing to train, and AdamMini refuses the model"


def _unknown(strategy: Strategy, cuts: Sequence[ParameterPartition], totals: Totals) -> str:
    """That a strategy which goes by roles met parameters without one."""
    told = Structure.HEAD in strategy.structures.values()  # `doubts` speaks of those
    unknown = [c for c in cuts if not c.role.known and not c.is_overridden and not (told and c.role.doubt)]
    if not unknown or not strategy.structures:
        return ""
    share = 100 * sum(math.prod(cut.blocks.shape) for cut in unknown) / max(totals.elements, 1)
    cut = strategy.structure(Role.OTHER)
    kept = "keep a full second moment" if cut is Structure.ELEMENT else f"are cut {cut}"
    return (
        f"no rule knows {_names(unknown)} ({share:.2g} % of the parameters), which {kept}; tell what they do with "
        f"partition_layouts, or cut them with partition_overrides={{{unknown[0].name!r}: 'row'}}"
    )


def _unknown_heads(
    strategy: Strategy, cuts: Sequence[ParameterPartition], advise: Callable[[Sequence[str]], str]
) -> list[str]:
    """That heads, or the order of a fused matrix, cannot be told, where the cut did not need them."""
    by_problem: dict[tuple[str, str, bool], list[ParameterPartition]] = {}
    for cut in cuts:
        if cut.role.problem and cut.blocks.kind is not Kind.ELEMENT:
            by_problem.setdefault((cut.role.problem, cut.structure, cut.is_overridden), []).append(cut)
    return [
        f"{_names(members)}: {problem}; "
        + ("your override" if overridden else f"{strategy.name!r}")
        + f" cuts by {how} instead of by head: tell the order with {advise([cut.name for cut in members])}"
        for (problem, how, overridden), members in by_problem.items()
    ]


def _collapsed(strategy: Strategy, cuts: Sequence[ParameterPartition]) -> str:
    """That one number a tensor, the rule for models that are no Transformers, met what belongs to Transformers."""
    if strategy.structures or strategy.otherwise is not Structure.WHOLE:
        return ""
    tables = [cut for cut in cuts if not cut.is_overridden and TABLES & set(cut.role.roles)]
    unknown = [cut for cut in cuts if not cut.is_overridden and not cut.role.known and len(cut.blocks.shape) > 1]
    if not tables and not unknown:
        return ""
    what = [f"the embeddings and heads {_names(tables)}"] if tables else []
    what += [f"{_names(unknown)}, which no rule knows"] if unknown else []
    key = tables[0].role.name if tables else unknown[0].name
    return (
        f"{strategy.name!r} keeps one number for a whole tensor, also for {', and for '.join(what)}; if this is a "
        f"Transformer, take partition='transformer', else consider partition_overrides={{{key!r}: 'row'}}"
    )


def _larger_than_adamw(strategy: Strategy, totals: Totals) -> str:
    if totals.state_bytes <= totals.adamw_state_bytes:
        return ""
    return (
        f"{strategy.name!r} keeps more than AdamW here: a second moment is float32 or wider, whatever the parameters "
        "are, and few are shared"
    )


def _names(cuts: Sequence[ParameterPartition]) -> str:
    return collapse_names(cut.name for cut in cuts)
