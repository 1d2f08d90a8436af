"""From what was seen to layouts that say it, in the words of `partition_layouts`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from itertools import groupby

from torch import Tensor, nn

from lightning_adam_mini.partition import ModuleLayout, Role, Rows, Span
from lightning_adam_mini.verify.judging import Observation
from lightning_adam_mini.verify.tracing import Operand

__all__ = ["as_python", "layout_of", "rows_of"]

_ROLES = {Operand.QUERY: Role.QUERY, Operand.KEY: Role.KEY, Operand.SCORE: Role.KEY, Operand.VALUE: Role.VALUE}

Label = tuple[Role, int]
"""What one output does: its role and, for a query, key or value, its head."""


def rows_of(seen: Observation, role: Role = Role.LINEAR) -> Rows | None:
    """The rows of a parameter as they were seen; None where the vocabulary has no words for them.

    Args:
        seen: What was seen.
        role: What its outputs do where they feed no attention.
    """
    if not seen.axes:
        return None
    *batch, axis = seen.axes
    labels = _labels(seen, role)
    if role is Role.EXPERT and axis and not batch and len(seen.shape) > 2:
        batch = [0]  # experts that are summed over
    roles = {found for found, _ in labels}
    if len(roles) == 1 and not roles & {Role.QUERY, Role.KEY}:
        return Rows(*roles, axis=axis or None, batch_axes=tuple(batch))
    if not batch:
        return _of_sequence(labels, axis)
    # Heads on one dimension, their channels on others: a block spans the others.
    along = [first for first in seen.axes if _varies_along_alone(seen, first)]
    if len(along) == 1 and roles <= {Role.QUERY, Role.KEY}:
        shape = [seen.shape[kept] for kept in seen.axes]
        place = seen.axes.index(along[0])
        step = math.prod(shape[place + 1 :])
        return _of_sequence([labels[number * step] for number in range(shape[place])], along[0])
    return None


def _labels(seen: Observation, role: Role) -> list[Label]:
    """One label for each output, with the last dimension running fastest."""
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
    """Whether heads depend on the place along one dimension and on no other."""
    found: list[Tensor] = list(seen.heads.values())
    same = all(
        bool((numbers == numbers.amax([a for a in range(numbers.dim()) if a != axis], keepdim=True)).all())
        for numbers in found
    )
    return same and bool(found)


def _of_sequence(labels: Sequence[Label], axis: int) -> Rows | None:
    """Rows of one dimension from their labels, in order."""
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
    """Length of the shortest beginning that the sequence repeats."""
    length = len(sequence)
    return next(
        period
        for period in range(1, length + 1)
        if length % period == 0 and all(sequence[place] == sequence[place - period] for place in range(period, length))
    )


def layout_of(
    class_name: str, instances: Sequence[tuple[nn.Module, Mapping[str, tuple[Observation, Role]]]]
) -> ModuleLayout | None:
    """A layout for all modules of a class; None where none holds for all.

    Args:
        class_name: The class.
        instances: Its modules, each with what was seen of its parameters by their names relative to it, and the role
            of those that feed no attention.
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
    """A layout whose numbers are attributes of the modules, where those differ in size."""
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
    """A layout, or a part of one, as one would write it."""
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
