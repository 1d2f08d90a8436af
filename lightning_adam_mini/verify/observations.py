"""What a forward pass shows of a parameter: the verdict on its blocks, and the layout that would be right."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from enum import StrEnum
from itertools import groupby

import torch
from torch import Tensor, nn

from lightning_adam_mini.blocks import Kind
from lightning_adam_mini.partition import ModuleLayout, ParameterPartition, Role, Rows, Span, Structure
from lightning_adam_mini.verify.tracing import Heads, Operand, Outputs

__all__ = ["Observation", "Status", "VerifiedParameter", "as_python", "judge", "layout_of", "rows_of"]

NONE, SEVERAL = -1, -2
"""In place of the number of a head: the output feeds none, or more than one."""

_OPERANDS = {Role.QUERY: Operand.QUERY, Role.KEY: Operand.KEY, Role.VALUE: Operand.VALUE}
_NOT_ALONE = frozenset({Role.QUERY, Role.KEY, Role.EXPERT, Role.LORA})
"""Roles that may feed a head; the partition says that other parameters do not."""
_TABLES = frozenset({Role.TOKEN_EMBEDDING, Role.POSITION_EMBEDDING})


class Status(StrEnum):
    """The verdict of the forward pass on a parameter."""

    CONFIRMED = "confirmed"
    CONTRADICTED = "contradicted"
    NOT_SEEN = "not seen"


@dataclass(frozen=True)
class VerifiedParameter:
    """The verdict on one parameter.

    Args:
        name: Its name in `model.named_parameters()`.
        status: Whether the forward pass agrees with its blocks.
        reason: The observation.
    """

    name: str
    status: Status
    reason: str


@dataclass(frozen=True)
class Observation:
    """What the forward pass shows of one parameter.

    Args:
        shape: Its shape.
        axes: Dimensions that are outputs; None if no product multiplies it with an activation.
        is_lookup: Whether its rows are looked up.
        heads: For each operand of attention that it feeds, the number of the head of each output, or `NONE` or
            `SEVERAL`, in a tensor of `shape` with size one on the other dimensions.
        problem: Why the observation is inconclusive.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...] | None = None
    is_lookup: bool = False
    heads: Mapping[Operand, Tensor] = field(default_factory=dict)
    problem: str = ""

    @classmethod
    def of(cls, shape: tuple[int, ...], outputs: Sequence[Outputs], heads: Sequence[Heads]) -> Observation:
        """Combine the observations of several products and attention calls."""
        lookups = {seen.axes for seen in outputs if seen.is_lookup}
        of_products = {seen.axes for seen in outputs if not seen.is_lookup} or lookups
        if not of_products:
            return cls(shape)
        if len(of_products) > 1:
            return cls(shape, problem="its products sum over different dimensions")
        by_operand: dict[Operand, Tensor] = {}
        for found in heads:
            numbers = _numbers(found.masks)
            known = by_operand.get(found.operand)
            merged = numbers if known is None else _merged(known, numbers)
            if merged is None:
                problem = f"attention calls take different heads of the {found.operand} from the same rows"
                return cls(shape, problem=problem)
            by_operand[found.operand] = merged
        return cls(shape, next(iter(of_products)), bool(lookups), by_operand)

    def of_role(self, role: Role) -> Tensor | None:
        """The heads of each output, as a query, key or value."""
        operand = _OPERANDS[role]
        own = self.heads.get(operand)
        return self.heads.get(Operand.SCORE) if own is None and operand is not Operand.VALUE else own

    @property
    def feeds(self) -> str:
        """The operands that it feeds, in words."""
        return " and ".join(
            _counted(int(numbers.max()) + 1, f"{operand} head")
            for operand, numbers in self.heads.items()
            if numbers.max() >= 0
        )


def judge(
    found: ParameterPartition,
    seen: Observation,
    *,
    problem: str = "",
    checks_heads: bool = True,
    is_only_source: bool = True,
) -> VerifiedParameter:
    """The verdict on one parameter.

    Args:
        found: Its partition, element-wise if the partition refuses it.
        seen: The observation of the forward pass.
        problem: Why the partition refuses it; empty if it does not.
        checks_heads: Whether the partition has head blocks for queries, and no override decided here.
        is_only_source: Whether it belongs to the module that attends with it, and no other parameter with the right
            role feeds the same heads.
    """
    status, reason = _verdict(found, seen, problem, checks_heads, is_only_source)
    return VerifiedParameter(found.name, status, reason)


def _verdict(
    found: ParameterPartition, seen: Observation, problem: str, checks_heads: bool, is_only_source: bool
) -> tuple[Status, str]:
    blocks, roles = found.blocks, set(found.role.roles)
    if problem:
        feeds = f"; it feeds {seen.feeds}" if seen.feeds else ""
        return Status.CONTRADICTED, f"the partition refuses it: {problem}{feeds}"
    if blocks.kind is Kind.ELEMENT:
        feeds = f", though it feeds {seen.feeds}" if seen.feeds and checks_heads else ""
        return Status.CONFIRMED, f"it has element-wise blocks{feeds}"
    if seen.problem:
        return Status.NOT_SEEN, seen.problem
    if seen.axes is None:
        kind = "a vector" if sum(size > 1 for size in seen.shape) < 2 else "it"
        return Status.NOT_SEEN, f"no product multiplies {kind} with an activation"
    if checks_heads and is_only_source and not roles & _NOT_ALONE and (reason := _unnamed_heads(found, seen)):
        return Status.CONTRADICTED, reason
    if blocks.axis is None:
        return Status.NOT_SEEN, "it is one block, whatever its rows do"
    if found.structure == Structure.COLUMN:
        if seen.axes and blocks.axis in seen.axes and seen.shape[blocks.axis] > 1:
            return Status.CONTRADICTED, f"dimension {blocks.axis}, its columns, is an output"
        return Status.CONFIRMED, _outputs_of(seen)
    if not seen.axes and seen.shape[blocks.axis] > 1:
        return Status.NOT_SEEN, "products sum over all of it, as for a factor of another weight"
    # Products may sum over independent matrices, such as experts: no block mixes them.
    if seen.shape[blocks.axis] > 1 and blocks.axis not in seen.axes:
        if roles & _TABLES:
            return Status.NOT_SEEN, f"products sum over dimension {blocks.axis}, perhaps to pick its rows"
        outputs = _listed(seen.axes)
        return (
            Status.CONTRADICTED,
            f"products sum over dimension {blocks.axis}, its rows: outputs are {outputs}",
        )
    if blocks.kind is Kind.FACTORED:
        return Status.CONFIRMED, _outputs_of(seen)
    if seen.is_lookup:
        return Status.CONFIRMED, "its rows are looked up"
    return _rows_verdict(found, seen, checks_heads)


def _outputs_of(seen: Observation) -> str:
    axes = seen.axes or ()
    if len(axes) > 1:
        return f"dimensions {_listed(axes)} are outputs"
    return f"dimension {axes[0]} is the output" if axes else "it has one output"


def _unnamed_heads(found: ParameterPartition, seen: Observation) -> str:
    """Why a parameter should be a query or key although it has another role; empty if it should not."""
    for operand in (Operand.QUERY, Operand.KEY, Operand.SCORE):
        numbers = seen.heads.get(operand)
        if numbers is not None and (numbers >= 0).any():
            count, rows = int(numbers.max()) + 1, int((numbers >= 0).sum())
            some = "its" if rows == numbers.numel() else f"{rows} of its {numbers.numel()}"
            return f"{some} rows are the {operand} of {_counted(count, 'head')}, but its role is {found.role.name}"
    return ""


def _rows_verdict(found: ParameterPartition, seen: Observation, checks_heads: bool) -> tuple[Status, str]:
    """Compare blocks of rows with the heads that the rows feed."""
    blocks, axes = found.blocks, seen.axes
    assert axes is not None
    assert blocks.axis is not None
    kept = tuple(size if axis in axes else 1 for axis, size in enumerate(seen.shape))
    index = replace(blocks, shape=kept).block_index()
    roles = list(dict.fromkeys(found.role.roles))
    numbers = [roles.index(part.role) for part in found.role.parts for _ in range(part.length)] * found.role.repeats
    role_of = torch.tensor(numbers).view([-1 if axis == blocks.axis else 1 for axis in range(len(kept))]).expand(kept)
    batch = None
    if blocks.batch_axes:
        sizes = [size if axis in blocks.batch_axes else 1 for axis, size in enumerate(kept)]
        batch = torch.arange(math.prod(sizes)).view(sizes).expand(kept)
    reasons: dict[Status, list[str]] = {status: [] for status in Status}
    for number, role in enumerate(roles):
        rows, structure = role_of == number, found.structures[found.role.roles.index(role)]
        if role in _OPERANDS and (structure is Structure.HEAD or checks_heads):
            status, reason = _heads_verdict(role, structure, seen, rows, index, batch)
            reasons[status].append(reason)
            continue
        own = index[rows]
        if structure is Structure.ROW and own.unique().numel() != own.numel():
            per_row = own.numel() // own.unique().numel()
            reasons[Status.CONTRADICTED].append(f"a row holds {per_row} outputs: {_outputs_of(seen)}")
        elif checks_heads and {Role.QUERY, Role.KEY} & set(roles):
            reasons[Status.CONTRADICTED] += [
                f"rows with the role {role} feed the {operand}"
                for operand in (Operand.QUERY, Operand.KEY)
                if (numbers_of := seen.heads.get(operand)) is not None and (numbers_of.expand(kept)[rows] >= 0).any()
            ]
    for status in (Status.CONTRADICTED, Status.NOT_SEEN, Status.CONFIRMED):
        if reasons[status]:
            return status, "; ".join(reasons[status])
    return Status.CONFIRMED, _outputs_of(seen)


def _heads_verdict(
    role: Role,
    structure: Structure,
    seen: Observation,
    rows: Tensor,
    index: Tensor,
    batch: Tensor | None,
) -> tuple[Status, str]:
    """Whether the rows of a query, key or value feed it, head by head."""
    kept = index.shape
    numbers = seen.of_role(role)
    others = [
        operand
        for operand, other in seen.heads.items()
        if operand not in (_OPERANDS[role], Operand.SCORE) and (other.expand(kept)[rows] >= 0).any()
    ]
    if numbers is None or (numbers.expand(kept)[rows] == NONE).all():
        if others:
            return Status.CONTRADICTED, f"rows with the role {role} feed the {others[0]}"
        return Status.NOT_SEEN, f"no attention call takes a {role} from it"
    if seen.axes and len(seen.axes) > 1:  # matrices without observations, such as experts that got no token
        rows = rows & ~(numbers == NONE).all(seen.axes[-1], keepdim=True).expand(kept)
    own, blocks = numbers.expand(kept)[rows], index[rows]
    if (own == NONE).any():
        return Status.CONTRADICTED, f"{int((own == NONE).sum())} of {own.numel()} rows with the role {role} feed none"
    if (own == SEVERAL).any():
        return Status.NOT_SEEN, f"several {role} heads come from the same rows"
    if role is Role.VALUE and others:
        return Status.CONTRADICTED, f"rows with the role {role} also feed the {others[0]}"
    if batch is not None:  # each expert has its own heads
        own = own + (int(own.max()) + 1) * batch[rows]
    heads, num_blocks = own.unique().numel(), blocks.unique().numel()
    pairs = torch.stack([own, blocks]).unique(dim=1).shape[1]
    if structure is Structure.ROW:
        if num_blocks != own.numel():
            return Status.CONTRADICTED, f"a row holds {own.numel() // num_blocks} outputs of the {role}"
        return Status.CONFIRMED, f"{own.numel()} rows of {heads} {role} heads"
    if structure is Structure.HEAD and not pairs == heads == num_blocks:
        mixed = (
            f"blocks hold rows of several {role} heads" if pairs > num_blocks else f"{role} heads have several blocks"
        )
        return Status.CONTRADICTED, f"{mixed}: {num_blocks} blocks, {heads} heads"
    return Status.CONFIRMED, _counted(heads, f"{role} head")


def _numbers(masks: Tensor) -> Tensor:
    """The head of each output, numbered by its first row."""
    count = masks.sum(0)
    numbers = masks.long().argmax(0)
    numbers = numbers.where(count > 0, NONE).where(count < 2, SEVERAL).cpu()
    order: dict[int, int] = {}
    for number in numbers.flatten().tolist():
        if number >= 0:
            order.setdefault(number, len(order))
    table = torch.full((max(len(masks), 1),), NONE)
    for number, place in order.items():
        table[number] = place
    return table[numbers.clamp_min(0)].where(numbers >= 0, numbers)


def _merged(known: Tensor, more: Tensor) -> Tensor | None:
    """The combined heads of two calls that use the same rows for the same heads, or disjoint rows; else None."""
    if torch.equal(known, more):
        return known
    if known.shape != more.shape or ((known != NONE) & (more != NONE)).any():
        return None
    return known.where(known != NONE, more + (int(known.max()) + 1) * (more >= 0))


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number > 1 else ''}"


def _listed(numbers: Iterable[int]) -> str:
    return " and ".join(map(str, numbers))


_ROLES = {Operand.QUERY: Role.QUERY, Operand.KEY: Role.KEY, Operand.SCORE: Role.KEY, Operand.VALUE: Role.VALUE}

Label = tuple[Role, int]
"""What one output does: its role and, for a query, key or value, its head."""


def rows_of(seen: Observation, role: Role = Role.LINEAR) -> Rows | None:
    """The rows of a parameter as observed; None if `Rows` cannot describe them.

    Args:
        seen: The observation.
        role: The role of outputs that feed no attention.
    """
    if not seen.axes:
        return None
    *batch, axis = seen.axes
    labels = _labels(seen, role)
    if role is Role.EXPERT and axis and not batch and len(seen.shape) > 2:
        batch = [0]  # experts, which the product sums over
    roles = {found for found, _ in labels}
    if len(roles) == 1 and not roles & {Role.QUERY, Role.KEY}:
        return Rows(*roles, axis=axis or None, batch_axes=tuple(batch))
    if not batch:
        return _of_sequence(labels, axis)
    # Heads in one dimension and channels in others: a block spans the others.
    along = [first for first in seen.axes if _varies_along_alone(seen, first)]
    if len(along) == 1 and roles <= {Role.QUERY, Role.KEY}:
        shape = [seen.shape[kept] for kept in seen.axes]
        place = seen.axes.index(along[0])
        step = math.prod(shape[place + 1 :])
        return _of_sequence([labels[number * step] for number in range(shape[place])], along[0])
    return None


def _labels(seen: Observation, role: Role) -> list[Label]:
    """One label for each output, in row-major order."""
    assert seen.axes is not None
    count = math.prod(seen.shape[axis] for axis in seen.axes)
    labels: list[Label] = [(role, 0)] * count
    for operand in (Operand.VALUE, Operand.SCORE, Operand.KEY, Operand.QUERY):
        numbers = seen.heads.get(operand)
        if numbers is not None:
            for place, number in enumerate(numbers.flatten().tolist()):
                if number >= 0:
                    labels[place] = (_ROLES[operand], number)
    return labels


def _varies_along_alone(seen: Observation, axis: int) -> bool:
    """Whether heads depend on the index of one dimension only."""
    found: list[Tensor] = list(seen.heads.values())
    same = all(
        bool((numbers == numbers.amax([a for a in range(numbers.dim()) if a != axis], keepdim=True)).all())
        for numbers in found
    )
    return same and bool(found)


def _of_sequence(labels: Sequence[Label], axis: int) -> Rows | None:
    """The rows of one dimension from their labels in order."""
    dimension = axis or None
    runs = [(role, head, len(list(rows))) for (role, head), rows in groupby(labels)]
    heads = [(role, head) for role, head, _ in runs if role in (Role.QUERY, Role.KEY)]
    if len(heads) == len(set(heads)):
        sequence = [(role, length) for role, _, length in runs]
        period = _period(sequence)
        if period == 1:
            return Rows(Span(sequence[0][0], len(sequence), sequence[0][1]), axis=dimension)
        return Rows(*_spans(sequence[:period]), repeats=len(sequence) // period, axis=dimension)
    period = _period(labels)
    runs = [(role, head, len(list(rows))) for (role, head), rows in groupby(labels[:period])]
    heads = [(role, head) for role, head, _ in runs if role in (Role.QUERY, Role.KEY)]
    if period == len(labels) or len(heads) != len(set(heads)):
        return None
    spans = _spans([(role, length) for role, _, length in runs], interleaved=True)
    return Rows(*spans, repeats=len(labels) // period, axis=dimension)


def _spans(sequence: Iterable[tuple[Role, int]], *, interleaved: bool = False) -> list[Span]:
    spans = []
    for (role, size), same in groupby(sequence):
        count = len(list(same))
        spans.append(Span(role, count, size, interleaved=interleaved and role in (Role.QUERY, Role.KEY)))
    return spans


def _period(sequence: Sequence[object]) -> int:
    """The period of a sequence."""
    length = len(sequence)
    return next(
        period
        for period in range(1, length + 1)
        if length % period == 0 and all(sequence[place] == sequence[place - period] for place in range(period, length))
    )


def layout_of(
    class_name: str, instances: Sequence[tuple[nn.Module, Mapping[str, tuple[Observation, Role]]]]
) -> ModuleLayout | None:
    """A layout for all modules of a class; None if none fits them all.

    Args:
        class_name: The class.
        instances: Its modules, each with observations of its parameters by their relative names, and with the roles of
            those that feed no attention.
    """
    found = []
    for _, parameters_seen in instances:
        rows = {name: rows_of(seen, role) for name, (seen, role) in parameters_seen.items()}
        found.append({name: own for name, own in rows.items() if own is not None})
    first = found[0]
    if not first:
        return None
    name = f"{class_name.rpartition('.')[2]}_as_seen"
    if all(other == first for other in found):
        return ModuleLayout(name, first)
    return _with_sizes(name, [module for module, _ in instances], found)


def _with_sizes(name: str, modules: Sequence[nn.Module], found: Sequence[Mapping[str, Rows]]) -> ModuleLayout | None:
    """A layout with attributes of the modules in place of numbers, for modules of different sizes."""
    if any(rows.keys() != found[0].keys() for rows in found):
        return None
    sizes: dict[str, str] = {}

    def attribute(numbers: Sequence[int]) -> int | str | None:
        if len(set(numbers)) == 1:
            return numbers[0]
        for key in vars(modules[0]):
            values = [vars(module).get(key) for module in modules]
            if all(type(value) is int for value in values) and values == list(numbers):
                sizes[key] = key
                return key
        return None

    parameters: dict[str, Rows | Role] = {}
    for parameter, first in found[0].items():
        others = [rows[parameter] for rows in found]
        if any(len(o.spans) != len(first.spans) or o.roles != first.roles or o.axis != first.axis for o in others):
            return None
        spans = []
        for place, span in enumerate(first.spans):
            if span.count is None:
                spans.append(span)
                continue
            count = attribute([int(o.spans[place].count or 0) for o in others])
            size = attribute([int(o.spans[place].size) for o in others])
            if span.role is Role.VALUE and (count is None or size is None):
                spans.append(Span(span.role))
                continue
            if count is None or size is None:
                return None
            spans.append(Span(span.role, count, size, interleaved=span.interleaved))
        repeats = attribute([int(o.repeats) for o in others])
        if repeats is None:
            return None
        parameters[parameter] = Rows(*spans, repeats=repeats, axis=first.axis, batch_axes=first.batch_axes)
    return ModuleLayout(name, parameters, sizes=sizes)


def as_python(value: object) -> str:
    """A layout, or a part of one, as Python code."""
    if isinstance(value, Role) or (isinstance(value, Span) and value == Span(value.role)):
        return f"Role.{(value if isinstance(value, Role) else value.role).name}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {as_python(item)}' for key, item in value.items())}}}"
    if not isinstance(value, ModuleLayout | Rows | Span):
        return repr(value)
    words = [as_python(span) for span in value.spans] if isinstance(value, Rows) else []
    for known in fields(value):
        item = getattr(value, known.name)
        if known.name == "spans" or not known.init:
            continue
        if known.default is MISSING and known.default_factory is MISSING:
            words.append(as_python(item))
        elif item != (known.default if known.default_factory is MISSING else known.default_factory()):
            words.append(f"{known.name}={as_python(item)}")
    return f"{type(value).__name__}({', '.join(words)})"
