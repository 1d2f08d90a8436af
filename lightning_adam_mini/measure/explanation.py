"""What the optimizer would do with a model, before it is built: roles, blocks, bytes, and what to look at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_adam_mini.measure.explanation_table import render
from lightning_adam_mini.measure.explanation_warnings import find_warnings
from lightning_adam_mini.measure.memory import adamw_state_bytes
from lightning_adam_mini.optim.params import check_parameter
from lightning_adam_mini.optim.quantized import check_exp_avg_dtype
from lightning_adam_mini.optim.state import first_moment_bytes, second_moment_dtype
from lightning_adam_mini.partition import (
    ModuleLayout,
    ParameterPartition,
    Strategy,
    advise_layouts,
    partition_module,
    resolve_strategy,
)

__all__ = ["ExplainedParameter", "Explanation", "explain"]

STEP_BYTES = 4


@dataclass(frozen=True)
class ExplainedParameter:
    """One trainable parameter: what it does, how it is cut, and what the optimizer keeps for it.

    Args:
        name: Its name in `model.named_parameters()`.
        shape: Its shape.
        dtype: Its dtype, such as `float32`.
        role: What it does; for a fused parameter the roles joined by `+`.
        why: The rule or override that decided, and the other names of a shared parameter.
        structure: Its block structure.
        blocks: Numbers that are kept of its second moment: one a block, or one a row and one a column.
        state_bytes: Bytes of its state: the first moment, the second moment and a step of 4 bytes.
        adamw_state_bytes: Bytes that torch's AdamW keeps for it.
        known: Whether a rule told its role.
        verified: What a forward pass says of it, where one was asked: `confirmed`, `contradicted` or `not seen`.
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
        blocks: Numbers that are kept of the second moment.
        state_bytes: Bytes of the optimizer's state.
        adamw_state_bytes: Bytes of AdamW's.
        saving_percent: Share of AdamW's bytes that is saved, in percent; negative where more is kept.
        second_moment_removed_percent: Share of the second moment's numbers that is not kept, in percent.
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
        partition: Name of the strategy; for `auto` the one that it takes.
        rows: The trainable parameters, in the order of the model.
        warnings: What may not be as the user means it, each with its remedy.
        frozen_tensors: Number of parameters without a gradient, which are left out.
        frozen_elements: Number of their elements.
    """

    partition: str
    rows: tuple[ExplainedParameter, ...]
    warnings: tuple[str, ...] = ()
    frozen_tensors: int = 0
    frozen_elements: int = 0

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
        """All of it in what JSON can hold."""
        return {
            "partition": self.partition,
            "rows": [{**asdict(row), "shape": list(row.shape)} for row in self.rows],
            "roles": {role: asdict(totals) for role, totals in self.role_totals.items()},
            "totals": asdict(self.totals),
            "frozen": {"tensors": self.frozen_tensors, "elements": self.frozen_elements},
            "warnings": list(self.warnings),
        }

    def table(self, *, full: bool = False) -> str:
        """Rows, sums by role, sums against AdamW, and warnings last; 1 GB is 1e9 bytes.

        Args:
            full: One row for each parameter, and not one for equal layers.
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
    """Tell how `AdamMini(model)` would cut each parameter, and what it would keep. Nothing is allocated.

    Args:
        model: The model, on any device; on `torch.device("meta")` one of any size takes no memory.
        partition: As for `AdamMini`.
        partition_overrides: As for `AdamMini`.
        partition_layouts: As for `AdamMini`.
        exp_avg_dtype: As for `AdamMini`.

    Returns:
        The explanation; its bytes are those that the optimizer will hold.

    Raises:
        ValueError: `model` is no module; or what `AdamMini` would raise: an unknown partition, cut or layout, an
            override that matches nothing, or a parameter that cannot be cut as asked.

    Example:
        >>> print(explain(nn.Linear(4, 2)).totals.blocks)
        2
    """
    _check(model, exp_avg_dtype)
    strategy = resolve_strategy(partition, model, partition_layouts)
    cuts = partition_module(model, strategy, partition_overrides, partition_layouts)
    named = dict(model.named_parameters())
    trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    frozen = [parameter for name, parameter in named.items() if name not in trained]
    also = _other_names(model)
    rows = []
    for name, parameter in trained.items():
        check_parameter(name, parameter)
        rows.append(_row(parameter, cuts[name], also.get(name, []), exp_avg_dtype))
    return Explanation(
        partition=strategy.name,
        rows=tuple(rows),
        warnings=find_warnings(
            strategy,
            [cuts[name] for name in trained],
            Totals.of(rows),
            len(frozen),
            lambda names: str(advise_layouts(model, partition_layouts or {}, names)) or "partition_layouts",
            is_auto=partition == "auto",
        ),
        frozen_tensors=len(frozen),
        frozen_elements=sum(parameter.numel() for parameter in frozen),
    )


def _check(model: object, exp_avg_dtype: torch.dtype | None) -> None:
    """Check what has no place in the messages of a parameter.

    Raises:
        ValueError: The model is no module, or the dtype none that first moments can have.
    """
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise ValueError(f"explain takes a model, an instance of nn.Module as in explain(nn.Linear(4, 2)), not {given}")
    check_exp_avg_dtype(exp_avg_dtype)


def _row(
    parameter: Tensor, cut: ParameterPartition, other_names: list[str], exp_avg_dtype: torch.dtype | None
) -> ExplainedParameter:
    exp_avg_bytes = first_moment_bytes(parameter.shape, parameter.dtype, exp_avg_dtype)
    return ExplainedParameter(
        name=cut.name,
        shape=tuple(parameter.shape),
        dtype=str(parameter.dtype).removeprefix("torch."),
        role=cut.role.name,
        why=f"{cut.why}; also {', '.join(other_names)}" if other_names else cut.why,
        structure=cut.structure,
        blocks=cut.blocks.num_values,
        state_bytes=STEP_BYTES + exp_avg_bytes + cut.blocks.num_bytes(second_moment_dtype(parameter)),
        adamw_state_bytes=adamw_state_bytes([parameter]),
        known=cut.role.known,
    )


def _other_names(model: nn.Module) -> dict[str, list[str]]:
    """The further names of parameters that are used more than once, by their first."""
    first: dict[Tensor, str] = {}
    others: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(parameter, name)
        if known != name:
            others.setdefault(known, []).append(name)
    return others
