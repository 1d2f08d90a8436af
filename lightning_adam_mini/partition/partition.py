"""The partition of a model from roles, a strategy and overrides, and what to do where it cannot be determined.

Error messages and warnings advise layouts and overrides that were tried on the model first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.modules.conv import _ConvNd

from lightning_adam_mini.blocks import Blocks
from lightning_adam_mini.partition.inference import Layouts, has_tokens, infer_roles
from lightning_adam_mini.partition.layouts import ORDERS, OrderLayout, named_layouts
from lightning_adam_mini.partition.module_layout import ModuleLayout
from lightning_adam_mini.partition.roles import ParameterRole, Part, Role
from lightning_adam_mini.partition.strategies import (
    STRATEGIES,
    Overrides,
    Strategy,
    Structure,
    StructureError,
    partition_parameter,
)
from lightning_adam_mini.partition.tree import Leaf, Node, Tree, plain_names

__all__ = [
    "ParameterPartition",
    "advise_layouts",
    "by_equal_layers",
    "doubts",
    "partition_module",
    "partition_parameters",
    "partition_tensors",
    "pattern_of_equal_layers",
    "recut",
    "resolve_strategy",
]

_LAYERS = (nn.Linear, _ConvNd)
SHOWN = 12
"""Problems that a message lists at most; equal layers count once."""


@dataclass(frozen=True)
class ParameterPartition:
    """One row of a partition: a parameter, its role and its blocks.

    Args:
        name: Its name in `module.named_parameters()`.
        role: Its role.
        structures: The block structure of each of its parts.
        blocks: Its blocks.
        why: The rule or override that decided.
        problem: Why a frozen parameter cannot have the blocks that were asked for, and the remedy; if it is unfrozen,
            it is trained as by AdamW.
    """

    name: str
    role: ParameterRole
    structures: tuple[Structure, ...]
    blocks: Blocks
    why: str
    problem: str = ""

    @property
    def is_overridden(self) -> bool:
        """Whether an override decided, and not the role."""
        return self.why != self.role.why

    @property
    def structure(self) -> str:
        """The block structure; for a fused parameter those of its roles in order, joined by `+` if they differ."""
        by_role = dict(zip(self.role.roles, self.structures, strict=True))
        return self.structures[0] if len(set(self.structures)) == 1 else "+".join(by_role.values())

    def under(self, strategy: Strategy) -> ParameterPartition:
        """The partition that a strategy of no heads gives the parameter, without overrides."""
        by_role = strategy.structures_of(self.role.roles)
        blocks = partition_parameter(self.blocks.shape, self.role, by_role)
        return replace(self, structures=tuple(by_role[role] for role in self.role.roles), blocks=blocks)


def partition_module(
    module: nn.Module,
    strategy: str | Strategy = "auto",
    overrides: Mapping[str, str] | None = None,
    layouts: Layouts | None = None,
) -> dict[str, ParameterPartition]:
    """Partition every parameter of a model into blocks.

    Args:
        module: The model.
        strategy: Name of a strategy, or a `Strategy`. `auto` uses `transformer` if the model looks up tokens or attends
            over them, else `default`.
        overrides: Block structures by role (`value`), parameter name (`lm_head.weight`) or pattern over whole names
            (`re:.*router.*`). The first that matches a parameter wins.
        layouts: Layouts for classes of this model, by qualified or bare class name: the name of a known layout, such
            as `fused_per_head`, or a `ModuleLayout`. They take precedence over the table.

    Returns:
        The parameters by name, in the order of `module.named_parameters()`. A frozen one that cannot have the blocks
        that were asked for has element-wise blocks, and a `problem`.

    Raises:
        ValueError: An unknown strategy, block structure or layout, an override that matches nothing or contradicts
            another, or a trainable parameter that cannot have the blocks that were asked for.
    """
    roles = infer_roles(module, layouts)
    named = dict(module.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in named.items()}
    frozen = {name for name, parameter in named.items() if not parameter.requires_grad}
    table = resolve_strategy(strategy, module, layouts)
    plain = plain_names(module)
    partition, failed = partition_parameters(shapes, roles, table, Overrides(overrides or {}, plain), frozen)

    def message(errors: Mapping[str, StructureError]) -> str:
        of_unknown_order = [name for name in errors if roles[name].problem and Role.FUSED_QKV in roles[name].roles]
        is_accepted = _acceptance(shapes, roles, table, overrides, plain, frozen - errors.keys())
        return _refusal(errors, roles, advise_layouts(module, layouts or {}, of_unknown_order), is_accepted)

    if trained := {name: error for name, error in failed.items() if name not in frozen}:
        raise ValueError(message(trained))
    of_equal_layers: dict[tuple[str, str], str] = {}  # which get the same advice
    for name, error in failed.items():
        key = pattern_of_equal_layers(name), error.problem
        if key not in of_equal_layers:
            of_equal_layers[key] = message({name: error}).removeprefix(name)
        partition[name] = replace(partition[name], problem=f"{name}{of_equal_layers[key]}")
    return partition


def partition_tensors(
    shapes: Mapping[str, tuple[int, ...]], strategy: str | Strategy = "auto", overrides: Mapping[str, str] | None = None
) -> dict[str, ParameterPartition]:
    """Partition parameters of which only names and shapes are known: all have `Role.OTHER`.

    Raises:
        ValueError: The strategy decides by role, or as for `partition_module`.
    """
    table = resolve_strategy(strategy, None)
    if table.structures:
        raise ValueError(
            f"partition {table.name!r} needs the role of each parameter: pass the model itself, as in "
            f"AdamMini(model, ...), or with your groups, as in AdamMini(groups, ..., module=model)"
        )
    roles = {
        name: ParameterRole((Part(Role.OTHER, shape[0] if shape else 1),), "no module given", 0 if shape else None)
        for name, shape in shapes.items()
    }
    plain = {name: name for name in shapes}
    partition, failed = partition_parameters(shapes, roles, table, Overrides(overrides or {}, plain))
    if failed:
        raise ValueError(_refusal(failed, roles, None, _acceptance(shapes, roles, table, overrides, plain)))
    return partition


def partition_parameters(
    shapes: Mapping[str, tuple[int, ...]],
    roles: Mapping[str, ParameterRole],
    strategy: Strategy,
    overrides: Overrides,
    frozen: Set[str] = frozenset(),
) -> tuple[dict[str, ParameterPartition], dict[str, StructureError]]:
    """The partition of each parameter, and the errors of those that get element-wise blocks instead."""
    partition, failed = {}, {}
    for name, role in roles.items():
        by_role, why = overrides.structures(name, role, strategy)
        structures = tuple(by_role[part_role] for part_role in role.roles)
        try:
            blocks = partition_parameter(shapes[name], role, by_role, is_overridden=why != role.why)
        except StructureError as error:
            failed[name] = error
            structures, blocks = (Structure.ELEMENT,) * len(structures), Blocks.element(shapes[name])
        partition[name] = ParameterPartition(name, role, structures, blocks, why)
    if failed.keys() <= frozen:
        overrides.raise_if_unused(roles)
    return partition, failed


def recut(before: ParameterPartition, shape: tuple[int, ...]) -> ParameterPartition:
    """The partition of a parameter after its shape has changed, with the same block structures.

    Args:
        before: Its partition in the old shape.
        shape: Its new shape.

    Raises:
        ValueError: The parts of a fused parameter, or its heads, are not known in the new shape.
    """
    old_shape, role = before.blocks.shape, before.role
    message = f"{before.name} had the shape {old_shape} and has {shape}, for which its blocks are not known"
    if len(shape) != len(old_shape):
        if before.structure not in (Structure.WHOLE, Structure.ELEMENT) or role.batch_axes:
            raise ValueError(f"{message}; build AdamMini after changing it")
        role = replace(role, axis=0 if shape else None)
    elif role.axis is not None and shape and shape[role.axis] != old_shape[role.axis]:
        if len(role.parts) > 1 or role.repeats > 1:
            raise ValueError(f"{message}; build AdamMini after changing it")
        role = replace(role, parts=(replace(role.parts[0], length=shape[role.axis]),))
    try:
        by_role = dict(zip(role.roles, before.structures, strict=True))
        blocks = partition_parameter(shape, role, by_role, is_overridden=before.is_overridden)
    except ValueError as error:
        raise ValueError(f"{message}: {error}") from error
    return replace(before, role=role, blocks=blocks)


def resolve_strategy(strategy: str | Strategy, module: nn.Module | None, layouts: Layouts | None = None) -> Strategy:
    """The strategy of a name; `auto` depends on the module.

    Raises:
        ValueError: No strategy has that name.
    """
    if isinstance(strategy, Strategy):
        return strategy
    if not isinstance(strategy, str):
        raise ValueError(f"partition must be the name of a strategy or a Strategy, not {strategy!r}")
    if strategy == "auto":
        return STRATEGIES["transformer" if module is not None and has_tokens(module, layouts) else "default"]
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown partition {strategy!r}; choose from auto, {', '.join(STRATEGIES)}")
    return STRATEGIES[strategy]


# Warnings and advice


def doubts(trained: Iterable[ParameterPartition], strategy: Strategy, *, is_auto: bool) -> list[str]:
    """Warnings about attention in classes without a layout, each in one sentence with its remedy.

    Args:
        trained: The trainable parameters.
        strategy: The strategy that decided where no override did.
        is_auto: Whether `auto` selected the strategy.

    Returns:
        Warnings. A strategy without head blocks gives only one, for a Transformer that `auto` may have taken for a
        convolutional network.
    """
    if Structure.HEAD not in strategy.structures.values():
        fused = [p for p in trained if is_auto and p.role.problem and Role.FUSED_QKV in p.role.roles]
        fused = [p for p in fused if not p.is_overridden]
        if not fused:
            return []
        return [
            f"{_listed(fused)}: queries, keys and values of several heads are one block, since auto classifies the "
            "model as a convolutional network; set partition='default' if that is right, else partition='transformer'"
        ]
    doubted = [p for p in trained if p.role.doubt and not p.is_overridden]
    known = [p for p in doubted if p.role.known]
    found = []
    for doubt in dict.fromkeys(p.role.doubt for p in doubted if not p.role.known):
        unknown = [p for p in doubted if not p.role.known and p.role.doubt == doubt]
        found.append(
            f"{_listed(unknown)}: {doubt}, so a full second moment is kept; describe it with a ModuleLayout in "
            f"partition_layouts, or choose its blocks, for example partition_overrides={_overriding(unknown, 'row')}"
        )
    if known:
        found.append(
            f"{_listed(known)}: treated as ordinary matrices because of their names alone, in a module that attends; "
            f"if one is a query or a key, give a ModuleLayout in partition_layouts, else confirm with "
            f"partition_overrides={_overriding(known, str(known[0].structure))}"
        )
    return found


def _listed(partitions: Sequence[ParameterPartition]) -> str:
    names = by_equal_layers(p.name for p in partitions)
    return ", ".join(f"{own[0]}{_and_likewise(own[1:])}" for own in names.values())


def _overriding(partitions: Sequence[ParameterPartition], structure: str) -> dict[str, str]:
    return {pattern_of_equal_layers(p.name): structure for p in partitions}


def _acceptance(
    shapes: Mapping[str, tuple[int, ...]],
    roles: Mapping[str, ParameterRole],
    strategy: Strategy,
    overrides: Mapping[str, str] | None,
    plain: Mapping[str, str],
    frozen: Set[str] = frozenset(),
) -> Callable[[Mapping[str, str]], bool]:
    """A check of further overrides: whether the model accepts them, before the present ones or in their place."""

    def is_accepted(advised: Mapping[str, str]) -> bool:
        for others in (overrides or {}, {}):
            try:
                rules = Overrides({**advised, **others}, plain)
                _, failed = partition_parameters(shapes, roles, strategy, rules, frozen)
            except ValueError:
                continue
            if failed.keys() <= frozen:
                return True
        return False

    return is_accepted


@dataclass(frozen=True)
class LayoutAdvice:
    """Layouts by class that give the order of fused parameters, each tried on the model; or why none does.

    Args:
        accepted: Names of layouts by class, the most common first.
        unsettled: Parameters whose order or heads stay unknown, or become unknown, with the first layout of each class.
        obstacle: Why the common orders do not fit.
    """

    accepted: Mapping[str, Sequence[str]]
    unsettled: Sequence[str]
    obstacle: str

    def __str__(self) -> str:
        """The advice as the end of a sentence; empty if there is none."""
        if not self.accepted:
            return ""
        first = {key: names[0] for key, names in self.accepted.items()}
        others = dict.fromkeys(name for names in self.accepted.values() for name in names[1:])
        alternatives = f", or {', '.join(map(repr, others))} if that is the order" if others else ""
        but = f" (which leaves {', '.join(self.unsettled)} open)" if self.unsettled else ""
        return f"partition_layouts={first}{alternatives}{but}"


def _refusal(
    failed: Mapping[str, StructureError],
    roles: Mapping[str, ParameterRole],
    advice: LayoutAdvice | None,
    is_accepted: Callable[[Mapping[str, str]], bool],
) -> str:
    """One message about all parameters that cannot have the blocks that were asked for.

    Args:
        failed: The error of each by name.
        roles: The roles of all parameters.
        advice: Layouts that solve the problems.
        is_accepted: Whether overrides solve them.
    """
    names_of = by_equal_layers(failed)
    problems = [f"{names[0]}: {failed[names[0]].problem}{_and_likewise(names[1:])}" for names in names_of.values()]
    if len(problems) > SHOWN:
        rest = [names[0] for names in list(names_of.values())[SHOWN:]]
        problems = [*problems[:SHOWN], f"and likewise {', '.join(rest)}"]
    remedies = []
    if advice is not None and advice.accepted:
        remedies.append(f"give {advice}")
    elif advice is not None and advice.obstacle and not any(advice.obstacle in text for text in problems):
        problems.append(f"no common order fits: {advice.obstacle}")
    all_fused = all(roles[name].roles == (Role.FUSED_QKV,) for name in failed)
    by_role = {Role.FUSED_QKV.value: "row"} if all_fused else {}
    by_pattern = {pattern: str(failed[names[0]].structures[0]) for pattern, names in names_of.items()}
    by_name = {name: str(error.structures[0]) for name, error in failed.items()}
    overrides = next((rules for rules in (by_role, by_pattern, by_name) if rules and is_accepted(rules)), None)
    if overrides:
        may_be_one_head = any(len(error.structures) > 1 and "has neither" in error.problem for error in failed.values())
        whole = " (or 'whole' if there is one head)" if may_be_one_head else ""
        remedies.append(f"override the block structure, for example partition_overrides={overrides}{whole}")
    return f"{'; '.join(problems)}; {', or '.join(remedies)}" if remedies else "; ".join(problems)


def advise_layouts(module: nn.Module, layouts: Layouts, names: Iterable[str]) -> LayoutAdvice:
    """Layouts for the classes whose fused parameters have an unknown order.

    Args:
        module: The model.
        layouts: The layouts that the user gave.
        names: The parameters.
    """
    tree = Tree.of(module)
    leaves = {leaf.name: leaf for leaf in tree.leaves}
    accepted: dict[str, list[str]] = {}
    names = [name for name in names if name in leaves]
    obstacle, open_names = "", list(names)
    while open_names:
        name, *open_names = open_names
        for node in _around(tree, leaves[name]):
            key = tree.class_name(type(node.module))
            given = {**layouts, **{other: found[0] for other, found in accepted.items()}}
            fits, why_not = _fitting(module, given, key, node, leaves[name])
            obstacle = obstacle or why_not
            if fits:
                accepted[key] = fits
                roles = infer_roles(module, {**given, key: fits[0]})
                open_names = [other for other in open_names if roles[other].problem]
                break
    if not accepted:
        return LayoutAdvice({}, names, obstacle)
    # A layout holds for all modules of its class, also for those that had no problem before.
    before, after = (
        infer_roles(module, {**layouts, **further})
        for further in ({}, {key: found[0] for key, found in accepted.items()})
    )
    unsettled = [name for name, role in after.items() if role.problem and (name in names or not before[name].problem)]
    return LayoutAdvice(accepted, unsettled, obstacle)


def _fitting(module: nn.Module, layouts: Layouts, key: str, node: Node, leaf: Leaf) -> tuple[list[str], str]:
    """Names of layouts that, given to a class, determine the rows of a parameter; or why the common ones do not."""
    fits: dict[tuple[object, ...], str] = {}
    obstacle = ""
    for name, layout in _candidates(node, leaf):
        try:
            role = infer_roles(module, {**layouts, key: name})[leaf.name]
        except ValueError:
            continue
        if role.problem:
            obstacle = obstacle or (role.problem if isinstance(layout, OrderLayout) else "")
        elif {Role.QUERY, Role.KEY} & set(role.roles):
            fits.setdefault((role.parts, role.repeats, role.axis), name)
    return list(fits.values()), obstacle


def _candidates(node: Node, leaf: Leaf) -> Iterator[tuple[str, ModuleLayout]]:
    """Layouts that may order the rows of a parameter: the common orders, and layouts of the table that name it.

    The latter must read sizes under names that no other layout uses, and the module must have them all: otherwise they
    add nothing to the common orders.
    """
    relative = leaf.plain_name.removeprefix(f"{node.plain_name}." if node.plain_name else "")
    for order in ORDERS:
        yield order.name, order
    for name, layout in named_layouts().items():
        rows = None if isinstance(layout, OrderLayout) else layout.find(relative)
        if rows is not None and len(rows.spans) > 1 and leaf.parameter.dim() > 1 and layout.has_own_sizes(node.module):
            yield name, layout


def _around(tree: Tree, leaf: Leaf) -> Iterator[Node]:
    """Modules around a parameter, inner ones first."""
    name = leaf.plain_name
    while name:
        name = name.rpartition(".")[0]
        node = tree.modules.get(name)
        if node is not None and (node.module is not leaf.owner or not isinstance(node.module, _LAYERS)):
            yield node


def pattern_of_equal_layers(name: str) -> str:
    """An override for a parameter and the same parameter of other layers."""
    escaped = re.sub(r"(?<![^.\\])\d+(?![^.\\])", r"\\d+", re.escape(name))
    return name if escaped == re.escape(name) else f"re:{escaped}"


def by_equal_layers(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by `pattern_of_equal_layers`."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(pattern_of_equal_layers(name), []).append(name)
    return found


def _and_likewise(others: Sequence[str]) -> str:
    shown = ", ".join(others[:6]) + (f" and {len(others) - 6} more" if len(others) > 6 else "")
    return f" (likewise {shown})" if others else ""
