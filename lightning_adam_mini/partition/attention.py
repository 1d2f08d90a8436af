"""Attention in classes that no layout describes: which modules attend, and what each of their matrices does.

The structure of a module decides first: a head count of its own, several projections of one input, a matrix with three
times as many rows as another has inputs. Names then distinguish queries, keys and values. Unclear matrices keep a full
second moment, with a `doubt` that becomes a warning. Matrices that are ordinary only by their names have a `doubt` too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_adam_mini.partition.layer_roles import found_output_axis, is_pointwise
from lightning_adam_mini.partition.layouts.parameter_names import (
    fused_parts,
    is_bias_name,
    is_output_name,
    is_plain,
    projected_parts,
)
from lightning_adam_mini.partition.module_layout import ModuleLayout, Rows, own_size
from lightning_adam_mini.partition.roles import ParameterRole, Part, Role
from lightning_adam_mini.partition.tree import Leaf, Node, Tree

__all__ = ["NO_AXIS", "Attention", "Projection", "checked_heads", "projections", "unclear", "with_axis"]

Q, K, V = Role.QUERY, Role.KEY, Role.VALUE
Roles = Mapping[int, ParameterRole]
"""Roles by the `id` of a parameter."""

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict)
NO_AXIS = "its output dimension is unknown"
_ATTENDS = "the module attends, and"
_MATRIX_ROLES = frozenset({Q, K, V, Role.LINEAR, Role.ATTENTION_OUTPUT, Role.FUSED_QKV})
_ACCESSORIES = frozenset({Role.NORM, Role.BIAS, Role.LORA})
_BY_NAME = ModuleLayout("names", {})


@dataclass(frozen=True)
class Projection:
    """A matrix of a module: of a layer, of a wrapper around one, or a parameter of the module itself.

    Args:
        member: Name within the module: of a child, of an item of a list of children, or of a parameter.
        leaf: The parameter.
        is_bare: Whether it has no layer.
    """

    member: str
    leaf: Leaf
    is_bare: bool = False

    @property
    def name(self) -> str:
        """The last part of the name that is not a number, which may say what it does."""
        names = [name for name in self.member.split(".") if not name.isdigit()]
        return names[-1] if names else self.member


def is_matrix(leaf: Leaf, role: ParameterRole) -> bool:
    """Whether a parameter may be a projection: a linear layer, a 1x1 convolution, or a matrix of an unknown kind."""
    shape = leaf.parameter.shape
    if len(shape) < 2 or leaf.parameter.numel() == max(shape):
        return False
    if isinstance(leaf.owner, _ConvNd):
        return is_pointwise(leaf.owner)
    return _MATRIX_ROLES.issuperset(role.roles) or (role.roles == (Role.OTHER,) and not role.known)


def _main_matrix(matrices: Sequence[Leaf], roles: Roles) -> Leaf | None:
    """The matrix of a wrapper, possibly with low-rank factors next to it; None if there are several matrices."""
    if not all(is_matrix(leaf, roles[id(leaf.parameter)]) for leaf in matrices):
        return None
    largest = max(matrices, key=lambda leaf: leaf.parameter.numel())
    sides, others = set(largest.parameter.shape), [leaf for leaf in matrices if leaf is not largest]
    ranks = [min(leaf.parameter.shape) for leaf in others]
    are_factors = len(others) % 2 == 0 and all(
        leaf.parameter.dim() == 2 and max(leaf.parameter.shape) in sides and rank < min(sides)
        for leaf, rank in zip(others, ranks, strict=True)
    )
    return largest if are_factors else None


def projections(tree: Tree, node: Node, roles: Roles) -> list[Projection]:
    """The matrices of a module itself, without those of inner modules with several matrices."""
    members: dict[str, list[Leaf]] = {}
    for relative, leaf in tree.below(node):
        if leaf.parameter.dim() > 1 and not _is_no_matrix(leaf, roles[id(leaf.parameter)]):
            members.setdefault(relative.partition(".")[0], []).append(leaf)
    return [found for member, leaves in members.items() for found in _of_member(tree, node, member, leaves, roles)]


def _is_no_matrix(leaf: Leaf, role: ParameterRole) -> bool:
    """Whether a parameter does not count next to a projection: a norm, a low-rank factor, a depthwise convolution."""
    is_vector = leaf.parameter.numel() == max(leaf.parameter.shape)
    return is_vector or role.roles[0] in _ACCESSORIES or (isinstance(leaf.owner, _ConvNd) and leaf.owner.groups > 1)


def _of_member(tree: Tree, node: Node, member: str, leaves: list[Leaf], roles: Roles) -> Iterator[Projection]:
    prefix = f"{node.plain_name}." if node.plain_name else ""
    if len(leaves) == 1 and leaves[0].plain_name == f"{prefix}{member}":
        if is_matrix(leaves[0], roles[id(leaves[0].parameter)]):
            yield Projection(member, leaves[0], is_bare=True)
        return
    if (main := _main_matrix(leaves, roles)) is not None:
        yield Projection(member, main, is_bare=isinstance(main.owner, nn.ParameterDict | nn.ParameterList))
        return
    child = tree.modules.get(f"{prefix}{member}")
    if child is None or not isinstance(child.module, _CONTAINERS):
        return
    items: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        items.setdefault(leaf.plain_name.removeprefix(f"{prefix}{member}.").partition(".")[0], []).append(leaf)
    for item, own in items.items():
        if (main := _main_matrix(own, roles)) is not None:
            bare = isinstance(main.owner, nn.ParameterDict | nn.ParameterList)
            yield Projection(f"{member}.{item}", main, is_bare=bare)


def sizes_of(tree: Tree, node: Node) -> nn.Module:
    """The module with the sizes of heads: the given one, or its parent."""
    if own_size(node.module, "heads") is None and own_size(node.module, "head_dim") is None:
        parent = tree.parent(node)
        if parent is not None and own_size(parent.module, "heads") is not None:
            return parent.module
    return node.module


def with_axis(leaf: Leaf, role: ParameterRole, module: nn.Module, rows: Rows) -> ParameterRole | None:
    """A role with the output dimension as its axis; None if that is unknown.

    It follows from the type of a layer or from a run of it; for a parameter without a layer, which may be multiplied
    from either side, from the number of rows that its part must have.
    """
    if role.known or rows.axis is not None or leaf.parameter.dim() < 2:
        return role
    if leaf.parameter.dim() > 2:
        return None
    axis = found_output_axis(leaf.owner, leaf.own_name)
    if axis is None:
        axis = _axis_of_rows(tuple(leaf.parameter.shape), rows.roles, module)
    if axis is None:
        return None
    part = replace(role.parts[0], length=leaf.parameter.shape[axis])
    return replace(role, parts=(part,), axis=axis, batch_axes=(), known=True)


def _axis_of_rows(shape: tuple[int, ...], parts: tuple[Role, ...], module: nn.Module) -> int | None:
    """The output dimension of a bare matrix, if its size alone determines it.

    The rows are as many heads as the module has, or at least a multiple of the head size; inputs have any size.
    """
    if not {Q, K, V}.issuperset(parts):
        return None
    if {Q, K, V} <= set(parts):
        thrice = [axis for axis in (0, 1) if shape[axis] == 3 * shape[1 - axis]]
        if thrice:
            return thrice[0]
    heads, kv_heads = own_size(module, "heads"), own_size(module, "kv_heads")
    head_dim = own_size(module, "head_dim") or 1
    counts = {Q: heads, K: kv_heads, V: kv_heads}
    if len(parts) > 1 and heads:  # a fused matrix has as many keys as queries, unless its class counts keys
        counts = {Q: heads, K: kv_heads or heads, V: kv_heads or heads}
    numbers = [counts[part] for part in parts]
    count = sum(number or 0 for number in numbers) if all(numbers) else 1
    if count * head_dim == 1:
        return None
    fits = [axis for axis in (0, 1) if shape[axis] % (count * head_dim) == 0]
    return fits[0] if len(fits) == 1 else None


@dataclass
class Attention:
    """One module and the matrices that belong to it.

    Args:
        tree: The model.
        node: The module.
        roles: The present role of every parameter.
        settled: Parameters, by their `id`, whose role comes from a layout.
    """

    tree: Tree
    node: Node
    roles: Roles
    settled: set[int]

    @cached_property
    def found(self) -> list[Projection]:
        """The module's matrices, including those with a role from a layout."""
        return projections(self.tree, self.node, self.roles)

    @cached_property
    def open(self) -> list[Projection]:
        """Matrices without a role from a layout."""
        return [
            projection
            for projection in self.found
            if id(projection.leaf.parameter) not in self.settled
            and self.roles[id(projection.leaf.parameter)].roles != (Role.CONV,)
        ]

    @cached_property
    def source(self) -> nn.Module:
        """The module with the sizes of heads."""
        return sizes_of(self.tree, self.node)

    @cached_property
    def counts_heads(self) -> bool:
        """Whether the module, or the one it is a part of, has heads of its own."""
        return any(own_size(self.source, size) is not None for size in ("heads", "head_dim"))

    @property
    def is_convolutional(self) -> bool:
        """Whether the module attends over pixels, which does not make the model a Transformer.

        Exceptions, with heads in the module: convolutions named as query, key and value one by one, and models without
        any convolution larger than 1x1.
        """
        if self.counts_heads and not self.tree.has_spatial_convolutions:
            return False
        named = [p for p in self.found if self._parts(p)]
        if not all(isinstance(p.leaf.owner, _ConvNd) for p in named or self.open):
            return False
        return not (self.counts_heads and named and all(len(self._parts(p)) == 1 for p in named))

    @cached_property
    def widths(self) -> frozenset[int]:
        """Numbers of inputs of the module's matrices; the rows of all heads together equal one of them."""
        return frozenset(width for projection in self.found for width in self._inputs(projection))

    def only_fused(self) -> Leaf | None:
        """The only matrix that can hold queries, keys and values; None if there is none, or several."""
        heads = own_size(self.source, "heads") or 1
        count = heads + 2 * (own_size(self.source, "kv_heads") or heads)
        unnamed = [p for p in self.open if not self._parts(p)]
        fits = [
            p
            for p in unnamed
            if self._holds_all(p, {*self._others(p), *self._inputs(p)}) and max(p.leaf.parameter.shape) % count == 0
        ]
        wider = [p for p in fits if max(p.leaf.parameter.shape[:2]) > min(p.leaf.parameter.shape[:2])]
        return wider[0].leaf if len(wider) == 1 else fits[0].leaf if len(fits) == 1 else None

    @cached_property
    def parts(self) -> set[Role]:
        """Queries, keys and values in the plain names of the module."""
        return {part for p in self.found if is_plain(p.name) for part in self._parts(p)}

    def _parts(self, projection: Projection) -> tuple[Role, ...]:
        name = projection.name
        if name.lower().removesuffix("_weight") == "in_proj" and self._is_fused_input(projection):
            return Q, K, V
        return fused_parts(name) or projected_parts(name)

    def _is_fused_input(self, projection: Projection) -> bool:
        """Whether `in_proj` projects to queries, keys and values, and not into a state-space layer."""
        if own_size(self.node.module, "heads") is None or any(projected_parts(p.name) for p in self.found):
            return False
        widths = {*self._others(projection), *self._inputs(projection)}
        return not hasattr(self.node.module, "A_log") and self._holds_all(projection, widths)

    @cached_property
    def attends_by_name(self) -> bool:
        """Whether names and structure together show that the module attends."""
        if any({Q, K, V} <= set(self._parts(p)) and (self.counts_heads or is_plain(p.name)) for p in self.open):
            return True
        if self.counts_heads:
            return bool({Q, K} & self.parts)
        return self.parts >= {Q, K, V}

    @cached_property
    def attends_by_structure(self) -> bool:
        """Whether the module has heads, and projects one input three times, or once to three outputs."""
        module = self.node.module
        counts = own_size(module if isinstance(module, _CONTAINERS) else self.source, "heads")
        if counts is None or hasattr(module, "A_log"):
            return False
        inputs: Counter[int] = Counter()
        for projection in self.open:
            inputs.update(self._inputs(projection))
        if any(count >= 3 for count in inputs.values()):
            return True
        return any(self._holds_all(p, others) for p in self.open if (others := set(self._others(p))))

    def _inputs(self, projection: Projection) -> set[int]:
        shape, role = tuple(projection.leaf.parameter.shape), self.roles[id(projection.leaf.parameter)]
        if len(shape) > 2 and not isinstance(projection.leaf.owner, _ConvNd):
            return set()
        return {shape[1 - role.axis]} if role.known and role.axis in (0, 1) else set(shape[:2])

    def _others(self, projection: Projection) -> Iterator[int]:
        for other in self.found:
            if other is not projection:
                yield from self._inputs(other)

    def _holds_all(self, projection: Projection, others: set[int]) -> bool:
        """Whether the rows of a matrix can be queries, keys and values, with a matrix that takes the values."""
        heads = own_size(self.source, "heads") or 1
        kv_heads = own_size(self.source, "kv_heads") or heads
        return any(
            length % (heads + 2 * kv_heads) == 0 and heads * length // (heads + 2 * kv_heads) in others
            for length in projection.leaf.parameter.shape[:2]
        )

    def read(self) -> Iterator[tuple[Leaf, ParameterRole]]:
        """Roles of the open matrices, given that the module attends."""
        kind = type(self.node.module).__name__
        has_pairs = {Q, K} <= self.parts
        of_layouts = {r for p in self.found if p not in self.open for r in self.roles[id(p.leaf.parameter)].roles}
        for projection in self.open:
            leaf, name, parts = projection.leaf, projection.name, self._parts(projection)
            role, why = self.roles[id(leaf.parameter)], f"{projection.member} of {kind}"
            if not self.attends_by_name or (len(parts) == 1 and parts[0] in of_layouts):
                parts = ()  # a layout gave this role to another matrix
            if projection.is_bare and is_bias_name(name):
                yield leaf, replace(_other(leaf, why), parts=(Part(Role.BIAS, leaf.parameter.shape[0]),), known=True)
            elif len(parts) > 1 and (is_plain(name) or len(parts) == 3):
                yield leaf, self._fused(projection, role, kind)
            elif parts and is_plain(name):
                found = self._projected(projection, parts[0], role, why)
                yield leaf, found or unclear(leaf, why, f"{_ATTENDS} {NO_AXIS}")
            elif is_output_name(name) and (
                self.attends_by_name or not self._holds_all(projection, set(self._others(projection)))
            ):
                found = self._projected(projection, Role.ATTENTION_OUTPUT, role, why)
                yield leaf, found or unclear(leaf, why, f"{_ATTENDS} {NO_AXIS}")
            elif has_pairs and not parts and role.known:
                doubt = f"{kind} attends, and only the name {name!r} says what this matrix does"
                yield leaf, replace(role, doubt=doubt)
            else:
                what = "its name says more than query, key or value" if parts else "the role of this matrix is unknown"
                yield leaf, unclear(leaf, why, f"{_ATTENDS} {what}")

    def _fused(self, projection: Projection, role: ParameterRole, kind: str) -> ParameterRole:
        leaf, name = projection.leaf, projection.name
        problem = f"no layout knows how {kind} orders query, key and value"
        placed = with_axis(leaf, role, self.source, Rows(Q, K, V))
        if placed is None and leaf.parameter.dim() == 2:
            return unclear(leaf, f"{name!r}: fused", f"{problem}, and {NO_AXIS}")
        axis = role.axis if placed is None else placed.axis
        batch_axes = role.batch_axes if placed is None else placed.batch_axes
        parts = (Part(Role.FUSED_QKV, leaf.parameter.shape[axis or 0]),)
        return ParameterRole(parts, f"{name!r}: fused", axis, batch_axes, problem=problem)

    def _projected(self, projection: Projection, part: Role, role: ParameterRole, why: str) -> ParameterRole | None:
        """The role of a query, key, value or output projection; None if its output dimension is unknown."""
        leaf = projection.leaf
        if projection.is_bare and leaf.parameter.dim() == 3:
            return self._of_three_dimensions(leaf, part, why)
        if projection.is_bare and part is Role.ATTENTION_OUTPUT and not role.known:
            return None
        placed = with_axis(leaf, role, self.source, Rows(part))
        if placed is None:
            return None
        return _BY_NAME.role(Rows(part), self.source, tuple(leaf.parameter.shape), placed.axis or 0, why)

    def _of_three_dimensions(self, leaf: Leaf, part: Role, why: str) -> ParameterRole | None:
        """The role of a parameter with dimensions heads, inputs and head size in any order; None if ambiguous."""
        shape = tuple(leaf.parameter.shape)
        heads, head_dim = own_size(self.source, "heads"), own_size(self.source, "head_dim")
        counts = {heads} if part in (Q, Role.ATTENTION_OUTPUT) else {own_size(self.source, "kv_heads") or heads}
        of_heads = [axis for axis, size in enumerate(shape) if size in counts]
        if len(of_heads) > 1 and head_dim is not None and Counter(shape)[head_dim] == 1:
            of_heads = [axis for axis in of_heads if shape[axis] != head_dim]
        if len(of_heads) != 1:
            return None
        (axis,) = of_heads
        if part in (Q, K):
            return ParameterRole((Part(part, shape[axis], 1),), why, axis)
        of_width = [other for other in range(3) if other != axis and shape[other] == head_dim]
        if len(of_width) != 1:
            return None
        if part is V:
            return ParameterRole((Part(part, shape[of_width[0]]),), why, of_width[0], (axis,))
        (outputs,) = set(range(3)) - {axis, of_width[0]}
        return ParameterRole((Part(part, shape[outputs]),), why, outputs)


def _other(leaf: Leaf, why: str) -> ParameterRole:
    last = leaf.parameter.dim() - 2
    axis = max(last, 0)
    return ParameterRole((Part(Role.OTHER, leaf.parameter.shape[axis]),), why, axis, tuple(range(axis)), known=False)


def unclear(leaf: Leaf, why: str, doubt: str) -> ParameterRole:
    """The role of a matrix whose role is unknown, so that it keeps a full second moment."""
    return replace(_other(leaf, f"{why}: {doubt}"), doubt=doubt)


Projections = Sequence[tuple[Tensor, ParameterRole]]


def checked_heads(projections: Projections) -> Iterator[tuple[Tensor, ParameterRole]]:
    """Correct the heads of one module by comparing its projections.

    Queries and keys have heads of one size, so keys with an unknown head count get the size of the queries' heads. And
    queries with twice the rows that the output projection has inputs contain something else, such as gates.

    Args:
        projections: Parameters of one module with their roles.

    Yields:
        Parameters with a changed role.
    """
    queries, keys = _alone(projections, Role.QUERY), _alone(projections, Role.KEY)
    sizes = {role.parts[0].head_dim for _, role in queries if not role.problem}
    for query, role in queries:
        if not role.problem and _has_gate(query, projections):
            yield query, replace(role, problem=f"its {_rows(role)} rows are twice the inputs of the output projection")
    if len(sizes) != 1:
        return
    (size,) = sizes
    for key, role in keys:
        if size and role.parts[0].head_dim != size:
            fits = _rows(role) % size == 0
            problem = "" if fits else f"its {_rows(role)} rows are not a multiple of the query's head size {size}"
            yield key, replace(role, parts=(replace(role.parts[0], head_dim=size),), problem=problem)


def _alone(projections: Projections, role: Role) -> list[tuple[Tensor, ParameterRole]]:
    return [(parameter, found) for parameter, found in projections if found.roles == (role,)]


def _has_gate(query: Tensor, projections: Projections) -> bool:
    """Whether queries have twice as many rows as the output projection has inputs, with keys and values of one size."""
    keys, values = ({_rows(role) for _, role in _alone(projections, r)} for r in (Role.KEY, Role.VALUE))
    outputs = [parameter for parameter, _ in _alone(projections, Role.ATTENTION_OUTPUT) if parameter.dim() == 2]
    inputs = {parameter.shape[1] for parameter in outputs}
    return len(keys) == 1 and keys == values and inputs == {query.shape[0] / 2}


def _rows(role: ParameterRole) -> int:
    return role.parts[0].length
