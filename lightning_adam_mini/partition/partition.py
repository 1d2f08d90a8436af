"""The partition of a model: roles, a strategy and overrides brought together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace

from torch import nn

from lightning_adam_mini.blocks import Blocks
from lightning_adam_mini.partition.inference import Layouts, has_tokens, infer_roles
from lightning_adam_mini.partition.overrides import Overrides
from lightning_adam_mini.partition.remedies import advise_layouts, of_every_layer, refusal
from lightning_adam_mini.partition.roles import ParameterRole, Part, Role
from lightning_adam_mini.partition.strategies import (
    STRATEGIES,
    Strategy,
    Structure,
    StructureError,
    partition_parameter,
)
from lightning_adam_mini.partition.tree import plain_names

__all__ = ["ParameterPartition", "cut_parameters", "partition_module", "partition_tensors", "recut", "resolve_strategy"]


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
