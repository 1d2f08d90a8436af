"""Roles from the module tree: every parameter of a model gets a `ParameterRole`.

The order of precedence: layouts that the user named, then those that were registered; layouts of the table, those for
classes before those for names of children, and those of outer modules before those of inner ones; the model's own
statement of its embeddings and output head; the type of the owning layer; the name of a bare parameter. What none of
them knows is `Role.OTHER`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_adam_mini.partition.embeddings import roles_of_embeddings
from lightning_adam_mini.partition.heads import checked_heads
from lightning_adam_mini.partition.layer_types import EMBEDDING_TYPES, is_pointwise, role_from_type
from lightning_adam_mini.partition.layouts import FUSED_NAMES, FUSED_PAIRS, find_layouts, is_registered, named_layout
from lightning_adam_mini.partition.module_layout import ModuleLayout, qualified_name
from lightning_adam_mini.partition.roles import ParameterRole, Part, Role
from lightning_adam_mini.partition.tree import Leaf, Node, leaves, walk

__all__ = ["has_tokens", "infer_roles"]

Layouts = Mapping[str, "str | ModuleLayout"]
"""Layouts by class, as qualified or bare name: the name of a row of the table, or a layout."""


def infer_roles(module: nn.Module, layouts: Layouts | None = None) -> dict[str, ParameterRole]:
    """The role of each parameter.

    Args:
        module: A model, or any module tree around one.
        layouts: Layouts for classes of this model, before those of the table.

    Returns:
        Roles by name, as in `module.named_parameters()`. A parameter that is used twice has one entry, under its
        first name and with the more specific of its roles.

    Raises:
        ValueError: A parameter without a shape yet, or a layout that fits no module.

    Note:
        Heads that cannot be told are no error here, since not every cut needs them: `ParameterRole.problem` says why.
    """
    tree = _Tree.of(module)
    by_parameter: dict[int, ParameterRole] = {}
    for leaf in tree.leaves:
        if is_lazy(leaf.parameter):
            raise ValueError(f"{leaf.name}: has no shape yet; run one batch through the model first (lazy layers)")
        _keep_more_specific(by_parameter, leaf.parameter, role_from_type(leaf))
    for leaf, role in roles_of_embeddings(tree.nodes, tree.leaves):
        by_parameter[id(leaf.parameter)] = role
    settled: set[int] = set()
    for layout, node in [*_own_layouts(tree, layouts or {}), *_table_layouts(tree)]:
        _apply_layout(layout, node, tree, by_parameter, settled)
    _mark_unknown_fused(tree, by_parameter, settled)
    # Modules that make their parameters when asked for them give others than those that the tree found.
    by_name = {leaf.name: by_parameter[id(leaf.parameter)] for leaf in tree.leaves}
    return {name: by_parameter.get(id(parameter)) or by_name[name] for name, parameter in module.named_parameters()}


def has_tokens(module: nn.Module, layouts: Layouts | None = None) -> bool:
    """Whether any part of `module` looks tokens up or attends over them, be it in a class that no layout knows."""
    tree = _Tree.of(module)
    if any(isinstance(node.module, EMBEDDING_TYPES) for node in tree.nodes):
        return True
    own = [layout for layout, _ in _own_layouts(tree, layouts or {})]
    of_table = [layout for node in tree.nodes for layout in _deciding(node.module)]
    if any(layout.is_attention for layout in [*own, *of_table]):
        return True
    # Networks of convolutions attend over pixels, which a layout tells and a name does not.
    return any(not is_pointwise(leaf.owner) for leaf in _fused_weights(tree))


@dataclass(frozen=True)
class _Tree:
    nodes: list[Node]
    leaves: list[Leaf]

    @classmethod
    def of(cls, module: nn.Module) -> _Tree:
        nodes = list(walk(module))
        return cls(nodes, list(leaves(nodes)))

    @cached_property
    def _sorted(self) -> list[tuple[str, Leaf]]:
        return sorted(((leaf.plain_name, leaf) for leaf in self.leaves), key=itemgetter(0))

    def below(self, node: Node) -> Iterator[tuple[str, Leaf]]:
        """Parameters below a module, by their plain names relative to it."""
        prefix = f"{node.plain_name}." if node.plain_name else ""
        for place in range(bisect_left(self._sorted, prefix, key=itemgetter(0)), len(self._sorted)):
            plain_name, leaf = self._sorted[place]
            if not plain_name.startswith(prefix):
                return
            yield plain_name.removeprefix(prefix), leaf


_SPECIFICITY = {Role.OTHER: 0, Role.LINEAR: 1, Role.POSITION_EMBEDDING: 2, Role.OUTPUT_HEAD: 2, Role.TOKEN_EMBEDDING: 3}


def _keep_more_specific(roles: dict[int, ParameterRole], parameter: nn.Parameter, role: ParameterRole) -> None:
    known = roles.get(id(parameter))
    if known is None or _SPECIFICITY.get(role.roles[0], 2) > _SPECIFICITY.get(known.roles[0], 2):
        roles[id(parameter)] = role


def _own_layouts(tree: _Tree, layouts: Layouts) -> Iterator[tuple[ModuleLayout, Node]]:
    """Layouts that the user gave for classes of this model.

    Raises:
        ValueError: No module is of such a class, or its parameters have other names than the layout's.
    """
    for class_name, given in layouts.items():
        layout = named_layout(given) if isinstance(given, str) else given
        if not isinstance(layout, ModuleLayout):
            raise ValueError(
                f"partition_layouts: {class_name!r} must have the name of a layout or a ModuleLayout, not {given!r}"
            )
        nodes = [node for node in tree.nodes if _is_a(node.module, class_name)]
        if not nodes:
            raise ValueError(
                f"partition_layouts: no module of this model is of class {class_name!r}; it has "
                f"{', '.join(sorted({type(node.module).__name__ for node in tree.nodes}))}"
            )
        for node in nodes:
            names = [name for name, _ in tree.below(node)]
            if not any(layout.find(name) for name in names):
                raise ValueError(
                    f"partition_layouts: {layout.name!r} names none of the parameters of {class_name} "
                    f"({', '.join(names[:8])}); it names {', '.join(layout.parameters)}"
                )
            missing = [name for name in layout.parameters if not any(name == n or "*" in name for n in names)]
            if missing and not isinstance(given, str):
                raise ValueError(
                    f"partition_layouts: {class_name} has no {missing[0]} as {layout.name!r} says; it has "
                    f"{', '.join(names[:8])}"
                )
            yield layout, node


def _table_layouts(tree: _Tree) -> list[tuple[ModuleLayout, Node]]:
    """Layouts of the table with their modules; a class tells more than names of children, so it goes first."""
    found = [(layout, node) for node in tree.nodes for layout in find_layouts(node.module)]
    return sorted(found, key=lambda pair: (not is_registered(pair[0]), not pair[0].classes))


def _deciding(module: nn.Module) -> list[ModuleLayout]:
    """The layouts that say whether a module attends: that of its class, or else all.

    Convolutional networks may attend over pixels with a single head, which makes no Transformers of them.
    """
    found = find_layouts(module)
    of_class = [layout for layout in found if layout.classes]
    return of_class or [layout for layout in found if not _is_convolutional(module, layout)]


def _is_convolutional(module: nn.Module, layout: ModuleLayout) -> bool:
    """Whether what a layout names are convolutions, in a module that counts no heads."""
    convolutions = (is_pointwise(getattr(module, child)) for child in layout.children)
    return all(convolutions) and not layout.counts_heads(module)


def _is_a(module: nn.Module, class_name: str) -> bool:
    return any(class_name in (base.__name__, qualified_name(base)) for base in type(module).__mro__)


def _apply_layout(
    layout: ModuleLayout, node: Node, tree: _Tree, roles: dict[int, ParameterRole], settled: set[int]
) -> None:
    """Give the parameters of a module the roles its layout names, unless another layout came first."""
    of_all_rows: list[nn.Parameter] = []
    for relative, leaf in tree.below(node):
        rows = layout.find(relative)
        known = roles[id(leaf.parameter)]
        if rows is None or id(leaf.parameter) in settled or _is_settled_by_type(leaf, known, relative, layout):
            continue
        settled.add(id(leaf.parameter))
        why = f"{relative} of {type(node.module).__name__}"
        shape = tuple(leaf.parameter.shape)
        roles[id(leaf.parameter)] = layout.role(rows, node.module, shape, known.axis or 0, why)
        if rows.takes_all:  # what a layout counts or sizes itself is its own word
            of_all_rows.append(leaf.parameter)
    for parameter, role in checked_heads([(parameter, roles[id(parameter)]) for parameter in of_all_rows]):
        roles[id(parameter)] = role


def _is_settled_by_type(leaf: Leaf, known: ParameterRole, name: str, layout: ModuleLayout) -> bool:
    """Whether the type of a layer, or the model's own word on its embeddings, says more than a layout."""
    role = known.roles[0]
    if role in (Role.NORM, Role.BIAS):
        return True
    if role is Role.CONV:  # also a convolution may be a projection, if it is named in full
        return name not in layout.rows or not (layout.classes or is_pointwise(leaf.owner))
    if role is Role.EXPERT:
        return not layout.classes
    tables = {Role.TOKEN_EMBEDDING, Role.POSITION_EMBEDDING, Role.BIAS}
    rows = layout.find(name)
    return role is Role.TOKEN_EMBEDDING and rows is not None and not tables.issuperset(rows.roles)


def _fused_weights(tree: _Tree) -> Iterator[Leaf]:
    """Weights of linear layers whose name says that they hold query, key and value."""
    for leaf in tree.leaves:
        name = leaf.layer.rpartition(".")[2].lower()
        is_fused = leaf.own_name == "weight" and (name in FUSED_NAMES or name in FUSED_PAIRS)
        if is_fused and role_from_type(leaf).roles == (Role.LINEAR,):
            yield leaf


def _mark_unknown_fused(tree: _Tree, roles: dict[int, ParameterRole], settled: set[int]) -> None:
    """Mark fused query-key-value matrices of classes that no layout knows, for the strategy to refuse."""
    owners = {node.plain_name: node.module for node in tree.nodes}
    for leaf in _fused_weights(tree):
        if id(leaf.parameter) in settled:
            continue
        parent_name, _, fused = leaf.layer.rpartition(".")
        parent = owners.get(parent_name)
        class_name = type(parent).__name__
        problem = (
            f"no layout tells how {class_name} orders query, key and value (name one, such as "
            f"partition_layouts={{'{class_name}': 'fused_contiguous'}}, 'fused_per_head' or 'fused_per_group')"
        )
        known = roles[id(leaf.parameter)]
        parts = (Part(Role.FUSED_QKV, known.parts[0].length),)
        roles[id(leaf.parameter)] = ParameterRole(parts, f"{fused!r}: fused", known.axis, problem=problem)
