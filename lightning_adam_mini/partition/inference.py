"""Roles from the module tree: every parameter of a model gets a `ParameterRole`.

Precedence: layouts that the user gave, then registered ones; layouts of the table, those for classes before those for
names of children, and those of outer modules before those of inner ones; the embeddings and output head that the model
declares; the type of the owning layer; the name of a bare parameter; else `Role.OTHER`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_adam_mini.partition.attention import NO_AXIS, Attention, checked_heads, projections, unclear, with_axis
from lightning_adam_mini.partition.layer_roles import EMBEDDING_TYPES, is_pointwise, role_from_type, roles_of_embeddings
from lightning_adam_mini.partition.layouts import OrderLayout, find_layouts, is_registered, named_layout, named_layouts
from lightning_adam_mini.partition.module_layout import ModuleLayout, Rows, qualified_name
from lightning_adam_mini.partition.roles import ParameterRole, Role
from lightning_adam_mini.partition.tree import Leaf, Node, Tree

__all__ = ["has_tokens", "infer_roles"]

Layouts = Mapping[str, "str | ModuleLayout"]
"""Layouts by qualified or bare class name: the name of a known layout, or a `ModuleLayout`."""


def infer_roles(module: nn.Module, layouts: Layouts | None = None) -> dict[str, ParameterRole]:
    """The role of each parameter.

    Args:
        module: A model, or any module that contains one.
        layouts: Layouts for classes of this model; they take precedence over the table.

    Returns:
        Roles by name, as in `module.named_parameters()`. A parameter that is used twice has one entry, under its
        first name and with the more specific of its roles. Unknown heads are no error here, since not every block
        structure needs them: `ParameterRole.problem` has the reason.

    Raises:
        ValueError: A parameter without a shape yet, or a layout that fits no module.
    """
    inference = _Inference(module, layouts or {})
    by_parameter = inference.roles
    # Some modules create their parameters on access, so that these are not the objects in the tree.
    by_name = {leaf.name: by_parameter[id(leaf.parameter)] for leaf in inference.tree.leaves}
    return {name: by_parameter.get(id(parameter)) or by_name[name] for name, parameter in module.named_parameters()}


def has_tokens(module: nn.Module, layouts: Layouts | None = None) -> bool:
    """Whether any part of `module` looks up tokens or attends over them, with or without a layout."""
    if any(isinstance(part, EMBEDDING_TYPES) for part in module.modules()):
        return True
    return bool(_Inference(module, layouts or {}).attending)


class _Inference:
    """The inference for one model: `roles` by the `id` of each parameter, and plain names of `attending` modules."""

    def __init__(self, module: nn.Module, layouts: Layouts) -> None:
        self.tree = Tree.of(module)
        self.roles: dict[int, ParameterRole] = {}
        self.attending: set[str] = set()
        self._settled: set[int] = set()
        self._described: set[str] = set()
        for leaf in self.tree.leaves:
            if is_lazy(leaf.parameter):
                raise ValueError(f"{leaf.name}: has no shape yet; run one batch through the model first (lazy layers)")
            _keep_more_specific(self.roles, leaf.parameter, role_from_type(leaf))
        for leaf, role in roles_of_embeddings(self.tree.nodes, self.tree.leaves):
            self.roles[id(leaf.parameter)] = role
        self._other_names = _names_through_wrappers(self.tree, self.roles)
        for class_name, given in layouts.items():
            layout, nodes = _own_layout(self.tree, class_name, given)
            for node in self._described_by(layout, nodes, class_name, is_named=isinstance(given, str)):
                self._apply(layout, node, is_own=True)
                self.attending |= {node.plain_name} if layout.is_attention else set()
        of_table = _table_layouts(self.tree)
        of_class = {node.plain_name for layout, node in of_table if layout.classes}
        for layout, node in of_table:
            self._apply(layout, node, is_own=is_registered(layout))
            # A layout for the class decides whether a module attends, before layouts for names of children.
            is_of_names = node.plain_name not in of_class and not _is_convolutional(node.module, layout)
            if layout.is_attention and (layout.classes or is_of_names):
                self.attending.add(node.plain_name)
        self._read_attention()

    def _names(self, relative: str, node: Node, leaf: Leaf) -> list[str]:
        """Names of a parameter relative to a module: its own, and those without wrappers around its layer."""
        prefix = f"{node.plain_name}." if node.plain_name else ""
        others = self._other_names.get(id(leaf.parameter), ())
        return [relative, *(name.removeprefix(prefix) for name in others if name.startswith(prefix))]

    def _rows(self, layout: ModuleLayout, relative: str, node: Node, leaf: Leaf) -> Rows | None:
        if (rows := layout.find(relative)) is not None:
            return rows
        found = (layout.find(name) for name in self._names(relative, node, leaf))
        return next((rows for rows in found if rows and _PROJECTED.issuperset(rows.roles)), None)

    def _described_by(
        self, layout: ModuleLayout, nodes: list[Node], class_name: str, *, is_named: bool
    ) -> Iterator[Node]:
        """The modules of a class that a layout from the user describes.

        Raises:
            ValueError: The layout names no parameter of any of them; or one lacks a parameter that a layout of the
                user's own names.
        """
        names = {
            node.plain_name: [name for at, leaf in self.tree.below(node) for name in self._names(at, node, leaf)]
            for node in nodes
        }
        found = [
            node
            for node in nodes
            if any(layout.find(name) for name in names[node.plain_name]) or self._only_fused(layout, node) is not None
        ]
        if not found:
            wanted = ", ".join(layout.parameters)
            wanted = wanted or "projections of queries, keys and values, or one matrix with all of them"
            raise ValueError(
                f"partition_layouts: {layout.name!r} names none of the parameters of {class_name} "
                f"({', '.join(names[nodes[0].plain_name][:8])}); it names {wanted}"
            )
        for node in found:
            own = names[node.plain_name]
            missing = [name for name in layout.parameters if "*" not in name and name not in own]
            if missing and not is_named:
                raise ValueError(
                    f"partition_layouts: {class_name} has no {missing[0]}, which {layout.name!r} names; it has "
                    f"{', '.join(own[:8])}"
                )
            yield node

    def _only_fused(self, layout: ModuleLayout, node: Node) -> Leaf | None:
        """The only matrix of a module that can hold queries, keys and values, if no name says so."""
        if not isinstance(layout, OrderLayout):
            return None
        return Attention(self.tree, node, self.roles, self._settled).only_fused()

    def _apply(self, layout: ModuleLayout, node: Node, *, is_own: bool) -> None:
        """Give the parameters of a module the roles of its layout, unless an earlier layout decided."""
        self._described |= {node.plain_name} if is_own or layout.classes else set()
        names_all = isinstance(layout, OrderLayout)
        attention = Attention(self.tree, node, self.roles, self._settled)
        found = [(relative, leaf, self._rows(layout, relative, node, leaf)) for relative, leaf in self.tree.below(node)]
        if isinstance(layout, OrderLayout) and not any(rows and len(rows.spans) > 1 for _, _, rows in found):
            only = self._only_fused(layout, node)
            found = [(name, leaf, layout.fused if leaf is only else rows) for name, leaf, rows in found]
        by_class = is_own or bool(layout.classes)
        source = node.module if layout.classes else attention.source
        # A layout of the table is proof of sizes only for its own classes.
        is_lent = is_own and layout in named_layouts().values() and not layout.describes(type(node.module))
        widths = attention.widths if names_all or (is_lent and not layout.has_own_sizes(node.module)) else None
        of_all_rows: list[nn.Parameter] = []
        for relative, leaf, rows in found:
            known = self.roles[id(leaf.parameter)]
            if rows is None or id(leaf.parameter) in self._settled or leaf.parameter.dim() < (2 if names_all else 1):
                continue
            is_named = names_all or (is_own and relative in layout.parameters)
            if _is_settled_by_type(leaf, known, relative, rows, layout, is_named=is_named):
                continue
            why = f"{relative} of {type(node.module).__name__}"
            self._settled.add(id(leaf.parameter))
            placed: ParameterRole | None = known
            if names_all or not by_class:
                placed = known if _NEEDS_NO_AXIS.issuperset(rows.roles) else with_axis(leaf, known, source, rows)
            shape = tuple(leaf.parameter.shape)
            if placed is None and names_all and len(rows.spans) > 1 and len(shape) == 2:
                # The user gave the order: the output dimension is the one whose size allows it.
                by_axis = [layout.role(rows, source, shape, axis, why, widths) for axis in (0, 1)]
                fits = [role for role in by_axis if not role.problem]
                fits = [role for role in fits if _num_queries(role) in (widths or ())] or fits
                unplaced = replace(by_axis[0], problem=by_axis[0].problem or NO_AXIS)
                self.roles[id(leaf.parameter)] = fits[0] if len(fits) == 1 else unplaced
                continue
            if placed is None:
                self.roles[id(leaf.parameter)] = unclear(leaf, why, NO_AXIS)
                continue
            if by_class and not is_own and not known.known:  # the table names the axis if it is not the first
                placed = replace(placed, axis=0, batch_axes=())
            if rows.axis is None and placed.batch_axes and not _NEEDS_NO_AXIS.issuperset(rows.roles):
                rows = Rows(*rows.spans, repeats=rows.repeats, axis=placed.axis, batch_axes=placed.batch_axes)
            self.roles[id(leaf.parameter)] = layout.role(rows, source, shape, placed.axis or 0, why, widths)
            if rows.takes_all:  # heads that a layout counts or sizes are not corrected
                of_all_rows.append(leaf.parameter)
        self._check_heads(of_all_rows)

    def _check_heads(self, parameters: list[nn.Parameter]) -> None:
        pairs = [(parameter, self.roles[id(parameter)]) for parameter in parameters]
        for parameter, role in checked_heads(pairs):
            self.roles[id(parameter)] = role

    def _read_attention(self) -> None:
        """Find attention without a layout, inner modules first: the outer ones attend through them."""
        for node in reversed(self.tree.nodes):
            attention = Attention(self.tree, node, self.roles, self._settled)
            if node.plain_name in self._described or not attention.open:
                continue
            if not attention.attends_by_name:
                prefix = f"{node.plain_name}." if node.plain_name else ""
                if any(name.startswith(prefix) for name in self.attending) or not attention.attends_by_structure:
                    continue
            if not attention.is_convolutional:
                self.attending.add(node.plain_name)
            for leaf, role in list(attention.read()):
                self._settled.add(id(leaf.parameter))
                self.roles[id(leaf.parameter)] = role
            self._check_heads([p.leaf.parameter for p in attention.found if not p.is_bare])


def _num_queries(role: ParameterRole) -> int:
    """Rows of all queries."""
    return role.repeats * sum(part.length for part in role.parts if part.role is Role.QUERY)


_PROJECTED = frozenset({Role.QUERY, Role.KEY, Role.VALUE, Role.ATTENTION_OUTPUT, Role.MLP, Role.LINEAR})
"""Roles that a layout may give to a layer inside a wrapper."""
_NEEDS_NO_AXIS = frozenset({Role.NORM, Role.BIAS, Role.OTHER, Role.POSITION_EMBEDDING, Role.TOKEN_EMBEDDING})


def _names_through_wrappers(tree: Tree, roles: dict[int, ParameterRole]) -> dict[int, list[str]]:
    """Names that matrices would have without wrappers around their layers, by the `id` of the parameter."""
    names: dict[int, list[str]] = {}
    for node in tree.nodes:
        prefix = f"{node.plain_name}." if node.plain_name else ""
        for projection in projections(tree, node, roles):
            name = f"{prefix}{projection.member}.weight"
            if not projection.is_bare and name != projection.leaf.plain_name:
                names.setdefault(id(projection.leaf.parameter), []).insert(0, name)
    return names


_SPECIFICITY = {Role.OTHER: 0, Role.LINEAR: 1, Role.POSITION_EMBEDDING: 2, Role.OUTPUT_HEAD: 2, Role.TOKEN_EMBEDDING: 3}


def _keep_more_specific(roles: dict[int, ParameterRole], parameter: nn.Parameter, role: ParameterRole) -> None:
    known = roles.get(id(parameter))
    if known is None or _SPECIFICITY.get(role.roles[0], 2) > _SPECIFICITY.get(known.roles[0], 2):
        roles[id(parameter)] = role


def _own_layout(tree: Tree, class_name: str, given: str | ModuleLayout) -> tuple[ModuleLayout, list[Node]]:
    """A layout that the user gave for a class, and the modules of that class.

    Raises:
        ValueError: There is no such layout, or no module of such a class.
    """
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
    return layout, nodes


def _table_layouts(tree: Tree) -> list[tuple[ModuleLayout, Node]]:
    """Layouts of the table with their modules, those for classes before those for names of children."""
    found = [(layout, node) for node in tree.nodes for layout in find_layouts(node.module)]
    return sorted(found, key=lambda pair: (not is_registered(pair[0]), not pair[0].classes))


def _is_convolutional(module: nn.Module, layout: ModuleLayout) -> bool:
    """Whether a layout by names describes convolutions, in a module without heads.

    Convolutional networks may attend over pixels with a single head, which does not make them Transformers.
    """
    convolutions = (is_pointwise(getattr(module, child)) for child in layout.children)
    return not layout.classes and all(convolutions) and not layout.counts_heads(module)


def _is_a(module: nn.Module, class_name: str) -> bool:
    return any(class_name in (base.__name__, qualified_name(base)) for base in type(module).__mro__)


def _is_settled_by_type(
    leaf: Leaf, known: ParameterRole, name: str, rows: Rows, layout: ModuleLayout, *, is_named: bool
) -> bool:
    """Whether the type of a layer, or the embeddings that the model declares, take precedence over a layout.

    A parameter that a layout from the user names in full follows the layout; a pattern such as `*` also matches norms
    and biases, which keep their role.
    """
    role = known.roles[0]
    if role in (Role.NORM, Role.BIAS):
        return not is_named
    if role is Role.CONV:  # a convolution may be a projection, if it is named in full
        is_projection = name in layout.rows and (layout.classes or is_pointwise(leaf.owner))
        return not is_named and not is_projection
    if role is Role.EXPERT:
        return not layout.classes
    tables = {Role.TOKEN_EMBEDDING, Role.POSITION_EMBEDDING, Role.BIAS}
    return not is_named and role is Role.TOKEN_EMBEDDING and not tables.issuperset(rows.roles)
