"""What to do about parameters that cannot be cut as asked, or that nothing tells enough of.

Whatever a message advises was tried on the very model first: layouts that the table would accept for its classes, and
overrides that cut its parameters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.conv import _ConvNd

from lightning_adam_mini.partition.inference import Layouts, infer_roles
from lightning_adam_mini.partition.layouts import ORDERS, OrderLayout, named_layouts
from lightning_adam_mini.partition.module_layout import ModuleLayout, qualified_name
from lightning_adam_mini.partition.roles import ParameterRole, Role
from lightning_adam_mini.partition.strategies import Strategy, Structure, StructureError
from lightning_adam_mini.partition.tree import Leaf, Node, Tree

if TYPE_CHECKING:
    from lightning_adam_mini.partition.partition import ParameterPartition

__all__ = ["Advice", "advise_layouts", "doubts", "of_every_layer", "refusal"]

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
