"""Compare how a parameter is cut with what the forward pass does with it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import torch
from torch import Tensor

from lightning_adam_mini.blocks import Kind
from lightning_adam_mini.partition import Cut, CutParameter, Role
from lightning_adam_mini.verify.tracing import Heads, Operand, Outputs

__all__ = ["NONE", "SEVERAL", "Claim", "Sight", "Status", "VerifiedParameter", "judge"]

NONE, SEVERAL = -1, -2
"""In place of the number of a head: the row feeds none, or more than one."""

_OPERANDS = {Role.QUERY: Operand.QUERY, Role.KEY: Operand.KEY, Role.VALUE: Operand.VALUE}
_ROW_BY_CHOICE = frozenset({Role.EXPERT, Role.LORA})
"""Roles that say more than that a row is one of a query, key or value."""


_TABLES = frozenset({Role.TOKEN_EMBEDDING, Role.POSITION_EMBEDDING})


class Status(StrEnum):
    """What the forward pass says of a parameter."""

    CONFIRMED = "confirmed"
    CONTRADICTED = "contradicted"
    NOT_SEEN = "not seen"


@dataclass(frozen=True)
class VerifiedParameter:
    """The verdict on one parameter.

    Args:
        name: Its name in `model.named_parameters()`.
        status: Whether the forward pass agrees with its cut.
        reason: What was seen.
    """

    name: str
    status: Status
    reason: str


@dataclass(frozen=True)
class Sight:
    """What the forward pass shows of one parameter.

    Args:
        shape: Its shape.
        axes: Dimensions that are outputs; None where it met no activation in a product.
        is_lookup: Whether its rows are looked up.
        heads: For each operand of attention that it feeds the number of the head of each output, or `NONE` or
            `SEVERAL`, in a tensor of `shape` with size one on the other dimensions.
        problem: Why nothing can be told.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...] | None = None
    is_lookup: bool = False
    heads: Mapping[Operand, Tensor] = field(default_factory=dict)
    problem: str = ""

    @classmethod
    def of(cls, shape: tuple[int, ...], outputs: Sequence[Outputs], heads: Sequence[Heads]) -> Sight:
        """Bring together what several products and attention calls show."""
        lookups = {seen.axes for seen in outputs if seen.is_lookup}
        of_products = {seen.axes for seen in outputs if not seen.is_lookup} or lookups
        if not of_products:
            return cls(shape)
        if len(of_products) > 1:
            return cls(shape, problem="its products sum over different dimensions")
        by_operand: dict[Operand, Tensor] = {}
        for seen in heads:
            numbers = _numbers(seen.masks)
            known = by_operand.get(seen.operand)
            merged = numbers if known is None else _merged(known, numbers)
            if merged is None:
                problem = f"attention calls take different heads of the {seen.operand} from the same rows"
                return cls(shape, problem=problem)
            by_operand[seen.operand] = merged
        return cls(shape, next(iter(of_products)), bool(lookups), by_operand)

    def of_role(self, role: Role) -> Tensor | None:
        """The heads of each output, as a query, key or value."""
        operand = _OPERANDS[role]
        own = self.heads.get(operand)
        return self.heads.get(Operand.SCORE) if own is None and operand is not Operand.VALUE else own

    @property
    def feeds(self) -> str:
        """The operands that it feeds, for a sentence."""
        told = [
            f"{int(numbers.max()) + 1} {operand} head{'s' if numbers.max() else ''}"
            for operand, numbers in self.heads.items()
            if numbers.max() >= 0
        ]
        return " and ".join(told)


@dataclass(frozen=True)
class Claim:
    """What a partition says of one parameter.

    Args:
        cut: Its row of the partition; where the partition refuses it, as if each element were a block.
        problem: Why the partition refuses it; empty where it does not.
        is_own: Whether the user's override decided.
        wants_heads: Whether queries are cut by head in this partition.
        is_in_attention: Whether it belongs to the module that attends with it, and the heads that it feeds come from
            no other parameter that is cut as theirs.
    """

    cut: CutParameter
    problem: str = ""
    is_own: bool = False
    wants_heads: bool = True
    is_in_attention: bool = True


def judge(claim: Claim, sight: Sight) -> VerifiedParameter:
    """The verdict on one parameter."""
    status, reason = _verdict(claim, sight)
    return VerifiedParameter(claim.cut.name, status, reason)


def _verdict(claim: Claim, sight: Sight) -> tuple[Status, str]:
    cut, blocks = claim.cut, claim.cut.blocks
    if claim.problem:
        seen = f"; it feeds {sight.feeds}" if sight.feeds else ""
        return Status.CONTRADICTED, f"the partition refuses it: {claim.problem}{seen}"
    if blocks.kind is Kind.ELEMENT:
        seen = f", though it feeds {sight.feeds}" if sight.feeds and not claim.is_own else ""
        return Status.CONFIRMED, f"its elements share nothing{seen}"
    if sight.problem:
        return Status.NOT_SEEN, sight.problem
    if sight.axes is None:
        kind = "a vector" if sum(size > 1 for size in sight.shape) < 2 else "it"
        return Status.NOT_SEEN, f"{kind} meets no activation in a product"
    heads = _heads_elsewhere(claim, sight)
    if heads:
        return Status.CONTRADICTED, heads
    if blocks.axis is None:
        return Status.NOT_SEEN, "one block by the partition, whatever its rows do"
    if not sight.axes and sight.shape != (1,) * len(sight.shape):
        return Status.NOT_SEEN, "products sum over all of it, as of a factor that is multiplied into another weight"
    # Matrices that are kept apart may be summed over, as experts are: no block mixes them.
    if sight.shape[blocks.axis] > 1 and blocks.axis not in sight.axes:
        if _TABLES & set(cut.role.roles):
            return Status.NOT_SEEN, f"products sum over dimension {blocks.axis}, perhaps to pick its rows"
        outputs = _listed(sight.axes) or "none"
        return Status.CONTRADICTED, f"cut along dimension {blocks.axis}, which products sum over: outputs are {outputs}"
    if blocks.kind is Kind.ROW_COLUMN:
        return Status.CONFIRMED, _outputs_told(sight)
    if sight.is_lookup:
        return Status.CONFIRMED, "its rows are looked up"
    return _rows_verdict(claim, sight)


def _outputs_told(sight: Sight) -> str:
    axes = sight.axes or ()
    if len(axes) > 1:
        return f"dimensions {_listed(axes)} are outputs"
    return f"dimension {axes[0]} is the output" if axes else "one number"


def _heads_elsewhere(claim: Claim, sight: Sight) -> str:
    """Why a parameter that is cut as no query or key should be one; empty where it should not."""
    roles = set(claim.cut.role.roles)
    if claim.is_own or not claim.wants_heads or not claim.is_in_attention or roles & _ROW_BY_CHOICE:
        return ""
    if roles & {Role.QUERY, Role.KEY}:
        return ""
    for operand in (Operand.QUERY, Operand.KEY, Operand.SCORE):
        numbers = sight.heads.get(operand)
        if numbers is not None and (numbers >= 0).any():
            count = int(numbers.max()) + 1
            rows = int((numbers >= 0).sum())
            some = "its" if rows == numbers.numel() else f"{rows} of its {numbers.numel()}"
            heads = f"{count} head{'s' if count > 1 else ''}"
            return f"{some} rows are the {operand} of {heads}, but it is cut as {claim.cut.role.name}"
    return ""


def _rows_verdict(claim: Claim, sight: Sight) -> tuple[Status, str]:
    """Compare blocks of outputs with the heads that they feed."""
    cut, blocks = claim.cut, claim.cut.blocks
    assert sight.axes is not None
    assert blocks.axis is not None
    kept = tuple(size if axis in sight.axes else 1 for axis, size in enumerate(sight.shape))
    kept = tuple(blocks.shape[axis] if axis == blocks.axis else size for axis, size in enumerate(kept))
    index = replace(blocks, shape=kept).block_index()
    roles = list(dict.fromkeys(cut.role.roles))
    lengths = [(roles.index(part.role), part.length) for part in cut.role.parts]
    numbers = [number for number, length in lengths for _ in range(length)] * cut.role.repeats
    role_of = torch.tensor(numbers).view([-1 if axis == blocks.axis else 1 for axis in range(len(kept))]).expand(kept)
    batch = None
    if blocks.batch_axes:
        sizes = [size if axis in blocks.batch_axes else 1 for axis, size in enumerate(kept)]
        batch = torch.arange(math.prod(sizes)).view(sizes).expand(kept)
    told: list[str] = []
    unseen: list[str] = []
    for number, role in enumerate(roles):
        rows = role_of == number
        cut_of_role = cut.cuts[cut.role.roles.index(role)]
        if role in _OPERANDS and (cut_of_role is Cut.HEAD or not claim.is_own):
            status, reason = _heads_verdict(role, cut_of_role, sight, rows, index, batch)
            if status is Status.CONTRADICTED:
                return status, reason
            (told if status is Status.CONFIRMED else unseen).append(reason)
        else:
            own = index[rows]
            if cut_of_role is Cut.ROW and own.unique().numel() != own.numel():
                per_block = own.numel() // own.unique().numel()
                return (
                    Status.CONTRADICTED,
                    f"a row holds {per_block} outputs: dimensions {_listed(sight.axes)} are outputs",
                )
            if reason := _other_rows(role, claim, sight, rows, kept):
                return Status.CONTRADICTED, reason
    if unseen:
        return Status.NOT_SEEN, "; ".join(unseen)
    return Status.CONFIRMED, "; ".join(told) or _outputs_told(sight)


def _heads_verdict(
    role: Role,
    cut: Cut,
    sight: Sight,
    rows: Tensor,
    index: Tensor,
    batch: Tensor | None,
) -> tuple[Status, str]:
    """Whether the rows of a query, key or value feed it, head by head."""
    kept = index.shape
    numbers = sight.of_role(role)
    others = [
        operand
        for operand, seen in sight.heads.items()
        if operand not in (_OPERANDS[role], Operand.SCORE) and (seen.expand(kept)[rows] >= 0).any()
    ]
    if numbers is None or (numbers.expand(kept)[rows] == NONE).all():
        if others:
            return Status.CONTRADICTED, f"rows that are cut as {role} feed the {others[0]}"
        return Status.NOT_SEEN, f"no attention call takes a {role} from it"
    rows = rows & ~_unused(numbers, sight).expand(kept)
    own, blocks = numbers.expand(kept)[rows], index[rows]
    if (own == NONE).any():
        return Status.CONTRADICTED, f"{int((own == NONE).sum())} of {own.numel()} rows that are cut as {role} feed none"
    if (own == SEVERAL).any():
        return Status.NOT_SEEN, f"several {role} heads come from the same rows"
    if role is Role.VALUE and others:
        return Status.CONTRADICTED, f"rows that are cut as {role} feed the {others[0]} too"
    if batch is not None:  # each expert has heads of its own
        own = own + (int(own.max()) + 1) * batch[rows]
    heads, num_blocks = own.unique().numel(), blocks.unique().numel()
    pairs = torch.stack([own, blocks]).unique(dim=1).shape[1]
    if cut is Cut.ROW:
        if num_blocks != own.numel():
            return Status.CONTRADICTED, f"a row holds {own.numel() // num_blocks} outputs of the {role}"
        return Status.CONFIRMED, f"{own.numel()} rows of {heads} {role} heads"
    if cut is Cut.HEAD and not pairs == heads == num_blocks:
        mixed = (
            f"blocks hold rows of several {role} heads" if pairs > num_blocks else f"{role} heads are cut into parts"
        )
        return Status.CONTRADICTED, f"{mixed}: {num_blocks} blocks, {heads} heads"
    return Status.CONFIRMED, f"{heads} {role} head{'s' if heads > 1 else ''}"


def _unused(numbers: Tensor, sight: Sight) -> Tensor:
    """Matrices that took no part, such as experts that no token chose."""
    assert sight.axes is not None
    *batch, axis = sight.axes
    return (numbers == NONE).all(axis, keepdim=True) if batch else torch.zeros_like(numbers, dtype=torch.bool)


def _other_rows(role: Role, claim: Claim, sight: Sight, rows: Tensor, kept: tuple[int, ...]) -> str:
    """Why rows beside those of queries and keys should be some of them; empty where they should not."""
    if claim.is_own or not claim.wants_heads or not {Role.QUERY, Role.KEY} & set(claim.cut.role.roles):
        return ""
    for operand in (Operand.QUERY, Operand.KEY):
        numbers = sight.heads.get(operand)
        if numbers is not None and (numbers.expand(kept)[rows] >= 0).any():
            return f"rows that are cut as {role} feed the {operand}"
    return ""


def _numbers(masks: Tensor) -> Tensor:
    """The head of each output, numbered in the order of their first rows."""
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
    """Heads of several calls: the same rows for the same heads, or other rows for other heads; else None."""
    if torch.equal(known, more):
        return known
    if known.shape != more.shape or ((known != NONE) & (more != NONE)).any():
        return None
    return known.where(known != NONE, more + (int(known.max()) + 1) * (more >= 0))


def _listed(numbers: Iterable[int]) -> str:
    return " and ".join(map(str, numbers))
