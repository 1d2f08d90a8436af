"""The partition of a model: roles, a strategy and overrides brought together."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.modules.conv import _ConvNd

from lightning_adam_mini.blocks import Blocks
from lightning_adam_mini.partition.inference import Layouts, has_tokens, infer_roles
from lightning_adam_mini.partition.layouts import ORDERS, OrderLayout, named_layouts
from lightning_adam_mini.partition.module_layout import ModuleLayout, qualified_name
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
    "Advice",
    "ParameterPartition",
    "advise_layouts",
    "cut_parameters",
    "doubts",
    "of_every_layer",
    "partition_module",
    "partition_tensors",
    "recut",
    "refusal",
    "resolve_strategy",
]


@dataclass(frozen=True)
class ParameterPartition:
    """One row of a partition: a parameter, what it does and how it is cut.

    Args:
        name: Its name in `module.named_parameters()`.
        role: What it does.
        structures: The block structure of each of its parts.
        blocks: How it is cut.
        why: The rule or override that decided.
        problem: Why a frozen parameter cannot be cut as asked, and what would help; should it come to train, it is
            trained as by AdamW.
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
        """The cut; for a fused parameter the cuts of its different roles in order, joined by `+` where they differ."""
        by_role = dict(zip(self.role.roles, self.structures, strict=True))
        return self.structures[0] if len(set(self.structures)) == 1 else "+".join(by_role.values())


def partition_module(
    module: nn.Module,
    strategy: str | Strategy = "auto",
    overrides: Mapping[str, str] | None = None,
    layouts: Layouts | None = None,
) -> dict[str, ParameterPartition]:
    """Cut every parameter of a model.

    Args:
        module: The model.
        strategy: Name of a strategy, or one of your own. `auto` takes `transformer` where the model looks tokens
            up or attends over them, else `default`.
        overrides: Cuts by role (`value`), parameter name (`lm_head.weight`) or pattern over whole names
            (`re:.*router.*`). The first that matches a parameter wins.
        layouts: Layouts for classes of this model, by qualified or bare class name: the name of a known layout, such
            as `fused_per_head`, or a `ModuleLayout`. They come before the table.

    Returns:
        Cut parameters by name, in the order of `module.named_parameters()`. A frozen one that cannot be cut as asked
        has element-wise blocks, and says so in `problem`.

    Raises:
        ValueError: An unknown strategy, cut or layout, an override that matches nothing or contradicts another, or a
            parameter that cannot be cut as asked.
    """
    roles = infer_roles(module, layouts)
    named = dict(module.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in named.items()}
    frozen = {name for name, parameter in named.items() if not parameter.requires_grad}
    table = resolve_strategy(strategy, module, layouts)
    plain = plain_names(module)
    cuts, uncut = cut_parameters(shapes, roles, table, Overrides(overrides or {}, plain), frozen)

    def message(failed: Mapping[str, StructureError]) -> str:
        unclear = [name for name in failed if roles[name].problem and Role.FUSED_QKV in roles[name].roles]
        is_accepted = _acceptance(shapes, roles, table, overrides, plain, frozen - failed.keys())
        return refusal(failed, roles, advise_layouts(module, layouts or {}, unclear), is_accepted)

    if trained := {name: error for name, error in uncut.items() if name not in frozen}:
        raise ValueError(message(trained))
    of_like: dict[tuple[str, str], str] = {}  # in other layers the same is advised
    for name, error in uncut.items():
        like = of_every_layer(name), error.problem
        if like not in of_like:
            of_like[like] = message({name: error}).removeprefix(name)
        cuts[name] = replace(cuts[name], problem=f"{name}{of_like[like]}")
    return cuts


def partition_tensors(
    shapes: Mapping[str, tuple[int, ...]], strategy: str | Strategy = "auto", overrides: Mapping[str, str] | None = None
) -> dict[str, ParameterPartition]:
    """Cut parameters of which nothing but names and shapes is known: all have `Role.OTHER`.

    Raises:
        ValueError: The strategy decides by role, or as for `partition_module`.
    """
    table = resolve_strategy(strategy, None)
    if table.structures:
        raise ValueError(
            f"partition {table.name!r} needs to know what each parameter does: pass the model itself, as in "
            f"AdamMini(model, ...), or beside your groups, as in AdamMini(groups, ..., module=model)"
        )
    roles = {
        name: ParameterRole((Part(Role.OTHER, shape[0] if shape else 1),), "no module given", 0 if shape else None)
        for name, shape in shapes.items()
    }
    plain = {name: name for name in shapes}
    cuts, failed = cut_parameters(shapes, roles, table, Overrides(overrides or {}, plain))
    if failed:
        raise ValueError(refusal(failed, roles, None, _acceptance(shapes, roles, table, overrides, plain)))
    return cuts


def _acceptance(
    shapes: Mapping[str, tuple[int, ...]],
    roles: Mapping[str, ParameterRole],
    strategy: Strategy,
    overrides: Mapping[str, str] | None,
    plain: Mapping[str, str],
    frozen: Set[str] = frozenset(),
) -> Callable[[Mapping[str, str]], bool]:
    """Whether all parameters can be cut with further overrides, before those that are there or in their place."""

    def is_accepted(advised: Mapping[str, str]) -> bool:
        for others in (overrides or {}, {}):
            try:
                _, failed = cut_parameters(shapes, roles, strategy, Overrides({**advised, **others}, plain), frozen)
            except ValueError:
                continue
            if failed.keys() <= frozen:
                return True
        return False

    return is_accepted


def cut_parameters(
    shapes: Mapping[str, tuple[int, ...]],
    roles: Mapping[str, ParameterRole],
    strategy: Strategy,
    overrides: Overrides,
    frozen: Set[str] = frozenset(),
) -> tuple[dict[str, ParameterPartition], dict[str, StructureError]]:
    """The cut of each parameter, and why some cannot be cut as asked, which are cut by element."""
    partition, failed = {}, {}
    for name, role in roles.items():
        by_role, why = overrides.cuts(name, role, strategy)
        cuts = tuple(by_role[part_role] for part_role in role.roles)
        try:
            blocks = partition_parameter(shapes[name], role, by_role, is_overridden=why != role.why)
        except StructureError as error:
            failed[name] = error
            cuts, blocks = (Structure.ELEMENT,) * len(cuts), Blocks.element(shapes[name])
        partition[name] = ParameterPartition(name, role, cuts, blocks, why)
    if failed.keys() <= frozen:
        overrides.raise_if_unused(roles)
    return partition, failed


def recut(cut: ParameterPartition, shape: tuple[int, ...]) -> ParameterPartition:
    """The same parameter, cut in the same way, after its shape has changed.

    Args:
        cut: How it was cut.
        shape: Its new shape.

    Raises:
        ValueError: The parts of a fused parameter, or its heads, are not known in the new shape.
    """
    before, role = cut.blocks.shape, cut.role
    message = f"{cut.name} had the shape {before} and has {shape}, of which its blocks are not known"
    if len(shape) != len(before):
        if cut.structure not in (Structure.WHOLE, Structure.ELEMENT) or role.batch_axes:
            raise ValueError(f"{message}; build AdamMini after changing it")
        role = replace(role, axis=0 if shape else None)
    elif role.axis is not None and shape and shape[role.axis] != before[role.axis]:
        if len(role.parts) > 1 or role.repeats > 1:
            raise ValueError(f"{message}; build AdamMini after changing it")
        role = replace(role, parts=(replace(role.parts[0], length=shape[role.axis]),))
    try:
        by_role = dict(zip(role.roles, cut.structures, strict=True))
        blocks = partition_parameter(shape, role, by_role, is_overridden=cut.is_overridden)
    except ValueError as error:
        raise ValueError(f"{message}: {error}") from error
    return replace(cut, role=role, blocks=blocks)


def resolve_strategy(strategy: str | Strategy, module: nn.Module | None, layouts: Layouts | None = None) -> Strategy:
    """The strategy of a name; `auto` looks at the module.

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


_LAYERS = (nn.Linear, _ConvNd)
SHOWN = 12
"""Parameters that a message names with their problem; of equal layers, the first counts for all."""


def doubts(cuts: Iterable[ParameterPartition], strategy: Strategy, *, is_auto: bool) -> list[str]:
    """What a user should know of modules that attend in classes of their own, each in one sentence with its remedy.

    Args:
        cuts: The trainable parameters.
        strategy: The strategy that cut them, where no override did.
        is_auto: Whether `auto` chose the strategy, and not the user.

    Returns:
        Where the strategy cuts nothing by head, nothing but what `auto` should not have taken for a convolution.
    """
    if Structure.HEAD not in strategy.structures.values():
        fused = [cut for cut in cuts if is_auto and cut.role.problem and Role.FUSED_QKV in cut.role.roles]
        fused = [cut for cut in fused if not cut.is_overridden]
        if not fused:
            return []
        return [
            f"{_listed(fused)}: queries, keys and values of several heads in one block, since auto takes the model for "
            "a convolutional network; partition='default' says that this is meant, partition='transformer' that it is "
            "not"
        ]
    doubted = [cut for cut in cuts if cut.role.doubt and not cut.is_overridden]
    ordinary = [cut for cut in doubted if cut.role.known]
    unclear = [cut for cut in doubted if not cut.role.known]
    found = []
    for doubt in dict.fromkeys(cut.role.doubt for cut in unclear):
        alike = [cut for cut in unclear if cut.role.doubt == doubt]
        found.append(
            f"{_listed(alike)}: {doubt}, so that a full second moment is kept; say what it does with a ModuleLayout in "
            f"partition_layouts, or how to cut it, for example partition_overrides={_overriding(alike, 'row')}"
        )
    if ordinary:
        found.append(
            f"{_listed(ordinary)}: taken for ordinary matrices by their names alone, in a module that attends; if one "
            f"is a query or a key, say so with a ModuleLayout in partition_layouts, else with "
            f"partition_overrides={_overriding(ordinary, str(ordinary[0].structure))}"
        )
    return found


def _listed(cuts: Sequence[ParameterPartition]) -> str:
    patterns: dict[str, list[str]] = {}
    for cut in cuts:
        patterns.setdefault(of_every_layer(cut.name), []).append(cut.name)
    return ", ".join(f"{names[0]}{_and_like(names[1:])}" for names in patterns.values())


def _overriding(cuts: Sequence[ParameterPartition], how: str) -> dict[str, str]:
    return {of_every_layer(cut.name): how for cut in cuts}


class Advice:
    """Layouts by class that settle some parameters, each tried; or why none does.

    Args:
        accepted: Names of layouts by the class that they are for, the most usual first.
        unsettled: Parameters that stay as they are under the first of these.
        obstacle: What keeps the usual orders from settling them.
    """

    def __init__(self, accepted: Mapping[str, Sequence[str]], unsettled: Sequence[str], obstacle: str) -> None:
        self.accepted, self.unsettled, self.obstacle = accepted, unsettled, obstacle

    def __str__(self) -> str:
        """The advice as the end of a sentence; empty where there is none."""
        if self.accepted:
            first = {key: names[0] for key, names in self.accepted.items()}
            others = dict.fromkeys(name for names in self.accepted.values() for name in names[1:])
            told = f", or {', '.join(map(repr, others))} where that is the order" if others else ""
            but = f" (which leaves {', '.join(self.unsettled)} open)" if self.unsettled else ""
            return f"partition_layouts={first}{told}{but}"
        return ""


def refusal(
    failed: Mapping[str, StructureError],
    roles: Mapping[str, ParameterRole],
    advice: Advice | None,
    is_accepted: Callable[[Mapping[str, str]], bool],
) -> str:
    """One message about all parameters that cannot be cut as asked.

    Args:
        failed: Why, by the name of each.
        roles: The roles of all parameters.
        advice: Layouts that would settle them.
        is_accepted: Whether overrides settle them.
    """
    patterns: dict[str, list[str]] = {}
    for name in failed:
        patterns.setdefault(of_every_layer(name), []).append(name)
    told = [f"{names[0]}: {failed[names[0]].problem}{_and_like(names[1:])}" for names in patterns.values()]
    if len(told) > SHOWN:
        told = [*told[:SHOWN], f"and {', '.join(names[0] for names in list(patterns.values())[SHOWN:])} alike"]
    remedies = []
    if advice is not None and advice.accepted:
        remedies.append(f"give {advice}")
    elif advice is not None and advice.obstacle and not any(advice.obstacle in text for text in told):
        told.append(f"no usual order fits: {advice.obstacle}")
    fused = [name for name in failed if roles[name].roles == (Role.FUSED_QKV,)]
    by_role = {Role.FUSED_QKV.value: "row"} if len(fused) == len(failed) else {}
    by_name = {pattern: str(failed[names[0]].structures[0]) for pattern, names in patterns.items()}
    exact = {name: str(error.structures[0]) for name, error in failed.items()}
    overrides = next((rules for rules in (by_role, by_name, exact) if rules and is_accepted(rules)), None)
    if overrides:
        one_head = [
            name for name, error in failed.items() if len(error.structures) > 1 and "tells neither" in error.problem
        ]
        whole = " (or 'whole' where there is one head)" if one_head else ""
        remedies.append(f"override the cut, for example partition_overrides={overrides}{whole}")
    return f"{'; '.join(told)}; {', or '.join(remedies)}" if remedies else "; ".join(told)


def advise_layouts(module: nn.Module, layouts: Layouts, names: Iterable[str]) -> Advice:
    """Layouts for the classes whose parameters have rows in an unknown order.

    Args:
        module: The model.
        layouts: What the user gave.
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
            key = _class_key(tree, node)
            given = {**layouts, **{other: found[0] for other, found in accepted.items()}}
            fits, told = _fitting(module, given, key, node, tree, leaves[name])
            obstacle = obstacle or told
            if fits:
                accepted[key] = fits
                roles = infer_roles(module, {**given, key: fits[0]})
                open_names = [other for other in open_names if roles[other].problem]
                break
    first = {**layouts, **{key: found[0] for key, found in accepted.items()}}
    roles = infer_roles(module, first) if accepted else {}
    unsettled = [name for name in names if name not in roles or roles[name].problem]
    return Advice(accepted, unsettled, obstacle)


def _fitting(
    module: nn.Module, layouts: Layouts, key: str, node: Node, tree: Tree, leaf: Leaf
) -> tuple[list[str], str]:
    """Names of layouts that tell the rows of a parameter if they are given to its class; or why the usual do not."""
    fits: dict[tuple[object, ...], str] = {}
    obstacle = ""
    for name, layout in _candidates(node, tree, leaf):
        try:
            role = infer_roles(module, {**layouts, key: name})[leaf.name]
        except ValueError:
            continue
        if role.problem:
            obstacle = obstacle or (role.problem if isinstance(layout, OrderLayout) else "")
        elif {Role.QUERY, Role.KEY} & set(role.roles):
            fits.setdefault((role.parts, role.repeats, role.axis), name)
    return list(fits.values()), obstacle


def _candidates(node: Node, tree: Tree, leaf: Leaf) -> Iterator[tuple[str, ModuleLayout]]:
    """Layouts that may order the rows of a parameter: the usual orders, and those of the table that name it.

    Of those, only what reads sizes under names of its own, all of which the module has: others are mere orders.
    """
    prefix = f"{node.plain_name}." if node.plain_name else ""
    relative = leaf.plain_name.removeprefix(prefix)
    for order in ORDERS:
        yield order.name, order
    for name, layout in named_layouts().items():
        rows = None if isinstance(layout, OrderLayout) else layout.find(relative)
        if rows is not None and len(rows.spans) > 1 and leaf.parameter.dim() > 1 and layout.is_told_by(node.module):
            yield name, layout


def _around(tree: Tree, leaf: Leaf) -> Iterator[Node]:
    """Modules around a parameter, inner ones first."""
    name = leaf.plain_name
    while name:
        name = name.rpartition(".")[0]
        node = tree.modules.get(name)
        if node is not None and (node.module is not leaf.owner or not isinstance(node.module, _LAYERS)):
            yield node


def _class_key(tree: Tree, node: Node) -> str:
    """The bare name of a class, or its qualified one where others of the model share the name."""
    kind = type(node.module)
    alike = {type(other.module) for other in tree.nodes if type(other.module).__name__ == kind.__name__}
    return kind.__name__ if len(alike) == 1 else qualified_name(kind)


def of_every_layer(name: str) -> str:
    """An override for a parameter and its like in other layers."""
    escaped = re.sub(r"(?<![^.\\])\d+(?![^.\\])", r"\\d+", re.escape(name))
    return name if escaped == re.escape(name) else f"re:{escaped}"


def _and_like(others: Sequence[str]) -> str:
    told = ", ".join(others[:6]) + (f" and {len(others) - 6} more" if len(others) > 6 else "")
    return f" (likewise {told})" if others else ""
