"""What `AdamMini` would do with a model, before it is built: roles, blocks, bytes and warnings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_adam_mini.blocks import Kind
from lightning_adam_mini.measure.explanation_table import collapse_names, render
from lightning_adam_mini.measure.memory import adam_mini_state_bytes, adamw_state_bytes
from lightning_adam_mini.optim.params import check_parameter
from lightning_adam_mini.optim.quantized import check_exp_avg_dtype
from lightning_adam_mini.partition import (
    PAPERS,
    RECOMMENDED,
    ModuleLayout,
    ParameterPartition,
    Role,
    Strategy,
    Structure,
    advise_layouts,
    doubts,
    partition_module,
    resolve_strategy,
)

__all__ = ["ExplainedParameter", "Explanation", "explain", "find_warnings"]


@dataclass(frozen=True)
class ExplainedParameter:
    """One trainable parameter: its role, its blocks, and what the optimizer keeps for it.

    Args:
        name: Its name in `model.named_parameters()`.
        shape: Its shape.
        dtype: Its dtype, such as `float32`.
        role: What it does; for a fused parameter the roles joined by `+`.
        why: The rule or override that decided, and the other names of a shared parameter.
        structure: Its block structure.
        blocks: Numbers of its second moment: one a block, or one a row and one a column.
        state_bytes: Bytes of its state: the first moment, the second moment and a step of 4 bytes.
        adamw_state_bytes: Bytes that torch's AdamW keeps for it.
        known: Whether a rule gave its role.
        verified: The verdict of a forward pass, if there was one: `confirmed`, `contradicted` or `not seen`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: str
    why: str
    structure: str
    blocks: int
    state_bytes: int
    adamw_state_bytes: int
    known: bool
    verified: str | None = None

    @property
    def elements(self) -> int:
        """Number of its elements."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Totals:
    """Sums over all trainable parameters.

    Args:
        tensors: Number of parameters as the model lists them.
        elements: Number of their elements: the size of the model.
        blocks: Numbers of the second moment.
        state_bytes: Bytes of the optimizer's state.
        adamw_state_bytes: Bytes of AdamW's state.
        saving_percent: Share of AdamW's bytes that is saved, in percent; negative if Adam-mini keeps more.
        second_moment_removed_percent: Share of AdamW's second moments that Adam-mini does not keep, in percent.
    """

    tensors: int
    elements: int
    blocks: int
    state_bytes: int
    adamw_state_bytes: int
    saving_percent: float
    second_moment_removed_percent: float

    @classmethod
    def of(cls, rows: Iterable[ExplainedParameter]) -> Totals:
        """The sums over some rows."""
        rows = list(rows)
        elements, blocks = sum(row.elements for row in rows), sum(row.blocks for row in rows)
        state, adamw = sum(row.state_bytes for row in rows), sum(row.adamw_state_bytes for row in rows)
        saving, removed = 100 * (1 - state / max(adamw, 1)), 100 * (1 - blocks / max(elements, 1))
        return cls(len(rows), elements, blocks, state, adamw, saving if rows else 0.0, removed if elements else 0.0)


@dataclass(frozen=True)
class Explanation:
    """What `AdamMini` would do with a model. Printed, it is a table with equal layers as one row.

    Args:
        partition: Name of the strategy; for `auto` the one that it selects.
        rows: The trainable parameters, in the order of the model.
        warnings: What the user may not intend, each in one sentence with its remedy.
        frozen_tensors: Number of parameters without a gradient, which are left out.
        frozen_elements: Number of their elements.
        recommended: Where the partition is one of the papers', what the one that we recommend would keep.
    """

    partition: str
    rows: tuple[ExplainedParameter, ...]
    warnings: tuple[str, ...] = ()
    frozen_tensors: int = 0
    frozen_elements: int = 0
    recommended: Totals | None = None

    @property
    def totals(self) -> Totals:
        """Sums over all rows."""
        return Totals.of(self.rows)

    @property
    def role_totals(self) -> dict[str, Totals]:
        """Sums by role, in the order of the model."""
        by_role: dict[str, list[ExplainedParameter]] = {}
        for row in self.rows:
            by_role.setdefault(row.role, []).append(row)
        return {role: Totals.of(rows) for role, rows in by_role.items()}

    def to_dict(self) -> dict[str, Any]:
        """The explanation as data for JSON."""
        return {
            "partition": self.partition,
            "rows": [{**asdict(row), "shape": list(row.shape)} for row in self.rows],
            "roles": {role: asdict(totals) for role, totals in self.role_totals.items()},
            "totals": asdict(self.totals),
            "recommended": self.recommended and {"partition": RECOMMENDED.name, **asdict(self.recommended)},
            "frozen": {"tensors": self.frozen_tensors, "elements": self.frozen_elements},
            "warnings": list(self.warnings),
        }

    def table(self, *, full: bool = False) -> str:
        """Rows, sums by role, sums against AdamW, and warnings at the end; 1 GB is 1e9 bytes.

        Args:
            full: Print one row for each parameter instead of one for equal layers.
        """
        return render(self, full=full)

    def __str__(self) -> str:
        return self.table()


def explain(
    model: nn.Module,
    partition: str | Strategy = "auto",
    partition_overrides: Mapping[str, str] | None = None,
    *,
    partition_layouts: Mapping[str, str | ModuleLayout] | None = None,
    exp_avg_dtype: torch.dtype | None = None,
) -> Explanation:
    """Report how `AdamMini(model)` would partition each parameter, and what it would keep. Nothing is allocated.

    Args:
        model: The model, on any device; on `torch.device("meta")` it takes no memory, whatever its size.
        partition: As for `AdamMini`.
        partition_overrides: As for `AdamMini`.
        partition_layouts: As for `AdamMini`.
        exp_avg_dtype: As for `AdamMini`.

    Returns:
        The explanation; its bytes are those that the optimizer will hold.

    Raises:
        ValueError: `model` is no module; or what `AdamMini` would raise: an unknown partition, block structure or
            layout, an override that matches nothing, or a parameter that cannot have the blocks that were asked for.

    Example:
        >>> print(explain(nn.Linear(4, 2)).totals.blocks)
        2
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"explain takes a model, an instance of nn.Module as in explain(nn.Linear(4, 2)), not {_described(model)}"
        )
    check_exp_avg_dtype(exp_avg_dtype)
    strategy = resolve_strategy(partition, model, partition_layouts)
    partitions = partition_module(model, strategy, partition_overrides, partition_layouts)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    other_names = _other_names(model)
    rows, recommended = [], []
    for name, parameter in trained.items():
        check_parameter(name, parameter)
        others = other_names.get(name, [])
        rows.append(_row(parameter, partitions[name], others, exp_avg_dtype))
        if strategy.name in PAPERS:
            recommended.append(_row(parameter, partitions[name].under(RECOMMENDED), others, exp_avg_dtype))
    return Explanation(
        partition=strategy.name,
        rows=tuple(rows),
        warnings=find_warnings(
            strategy,
            [partitions[name] for name in trained],
            Totals.of(rows),
            len(frozen),
            lambda names: str(advise_layouts(model, partition_layouts or {}, names)) or "partition_layouts",
            is_auto=partition == "auto",
        ),
        frozen_tensors=len(frozen),
        frozen_elements=sum(parameter.numel() for parameter in frozen),
        recommended=Totals.of(recommended) if strategy.name in PAPERS else None,
    )


def _described(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def _row(
    parameter: Tensor, found: ParameterPartition, other_names: list[str], exp_avg_dtype: torch.dtype | None
) -> ExplainedParameter:
    return ExplainedParameter(
        name=found.name,
        shape=tuple(parameter.shape),
        dtype=str(parameter.dtype).removeprefix("torch."),
        role=found.role.name,
        why=f"{found.why}; also {', '.join(other_names)}" if other_names else found.why,
        structure=found.structure,
        blocks=found.blocks.num_values,
        state_bytes=adam_mini_state_bytes(parameter, found.blocks, exp_avg_dtype),
        adamw_state_bytes=adamw_state_bytes([parameter]),
        known=found.role.known,
    )


def _other_names(model: nn.Module) -> dict[str, list[str]]:
    """The further names of parameters that are used more than once, by their first name."""
    first: dict[Tensor, str] = {}
    others: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(parameter, name)
        if known != name:
            others.setdefault(known, []).append(name)
    return others


TABLES = frozenset({Role.TOKEN_EMBEDDING, Role.POSITION_EMBEDDING, Role.OUTPUT_HEAD})


def find_warnings(
    strategy: Strategy,
    trained: Sequence[ParameterPartition],
    totals: Totals,
    num_frozen: int,
    advise: Callable[[Sequence[str]], str],
    is_auto: bool,
) -> tuple[str, ...]:
    """Warnings about the trainable parameters of a model.

    Args:
        strategy: The strategy that decided where no override did.
        trained: The trainable parameters.
        totals: Sums over them.
        num_frozen: Number of frozen parameters.
        advise: From names of fused matrices to layouts, as text, that give their order.
        is_auto: Whether `auto` selected the strategy.
    """
    found = [
        _nothing_trained(trained, num_frozen),
        _unknown(strategy, trained, totals),
        *doubts(trained, strategy, is_auto=is_auto),
        *_unknown_heads(strategy, trained, advise),
        _one_number_a_table(strategy, trained),
        _larger_than_adamw(strategy, totals),
    ]
    return tuple(warning for warning in found if warning)


def _nothing_trained(trained: Sequence[ParameterPartition], num_frozen: int) -> str:
    if trained:
        return ""
    why = "every parameter is frozen" if num_frozen else "the model has no parameters"
    return f"{why}: there is nothing to train, and AdamMini refuses the model"


def _unknown(strategy: Strategy, trained: Sequence[ParameterPartition], totals: Totals) -> str:
    """Parameters without a role, where the strategy decides by role."""
    by_head = Structure.HEAD in strategy.structures.values()  # then `doubts` names those with a doubt
    unknown = [p for p in trained if not p.role.known and not p.is_overridden and not (by_head and p.role.doubt)]
    if not unknown or not strategy.structures:
        return ""
    share = 100 * sum(math.prod(p.blocks.shape) for p in unknown) / max(totals.elements, 1)
    structure = strategy.structure(Role.OTHER)
    full = structure is Structure.ELEMENT
    result = "keep a full second moment" if full else f"get the block structure '{structure}'"
    return (
        f"no rule knows {_names(unknown)} ({share:.2g} % of the parameters), which {result}; describe them with "
        f"partition_layouts, or choose their blocks with partition_overrides={{{unknown[0].name!r}: 'row'}}"
    )


def _unknown_heads(
    strategy: Strategy, trained: Sequence[ParameterPartition], advise: Callable[[Sequence[str]], str]
) -> list[str]:
    """Parameters whose heads, or order if fused, are unknown, where their blocks do not depend on them."""
    by_problem: dict[tuple[str, str, bool], list[ParameterPartition]] = {}
    for p in trained:
        if p.role.problem and p.blocks.kind is not Kind.ELEMENT:
            by_problem.setdefault((p.role.problem, p.structure, p.is_overridden), []).append(p)
    return [
        f"{_names(members)}: {problem}; {'your override' if overridden else repr(strategy.name)} uses the block "
        f"structure '{structure}' instead of heads: give the order with {advise([p.name for p in members])}"
        for (problem, structure, overridden), members in by_problem.items()
    ]


def _one_number_a_table(strategy: Strategy, trained: Sequence[ParameterPartition]) -> str:
    """Embeddings, heads and unknown matrices with one number each, by the rule for models that are no Transformers."""
    if strategy.structures or strategy.otherwise is not Structure.WHOLE:
        return ""
    tables = [p for p in trained if not p.is_overridden and TABLES & set(p.role.roles)]
    unknown = [p for p in trained if not p.is_overridden and not p.role.known and len(p.blocks.shape) > 1]
    if not tables and not unknown:
        return ""
    what = [f"the embeddings and heads {_names(tables)}"] if tables else []
    what += [f"{_names(unknown)}, which no rule knows"] if unknown else []
    key = tables[0].role.name if tables else unknown[0].name
    return (
        f"{strategy.name!r} keeps one number for a whole tensor, also for {', and for '.join(what)}; if this is a "
        f"Transformer, use partition='transformer', else consider partition_overrides={{{key!r}: 'row'}}"
    )


def _larger_than_adamw(strategy: Strategy, totals: Totals) -> str:
    if totals.state_bytes <= totals.adamw_state_bytes:
        return ""
    return (
        f"{strategy.name!r} keeps more than AdamW here: its second moments are float32 or wider, whatever the dtype of "
        "the parameters, and few elements share one"
    )


def _names(partitions: Sequence[ParameterPartition]) -> str:
    return collapse_names(p.name for p in partitions)
