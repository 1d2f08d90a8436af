"""How the recipe cuts the parameters, and the cuts that its `partition_overrides` can ask for."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lightning_adam_mini.blocks import Blocks
from lightning_adam_mini.factory import AdamMini
from lightning_adam_mini.hessian.cut_advice import KEEP
from lightning_adam_mini.partition import Structure, partition_module
from lightning_adam_mini.partition.inference import infer_roles
from lightning_adam_mini.partition.strategies import partition_parameter

__all__ = ["expressible_cuts", "own_cuts", "with_own_overrides"]

ASKED = (Structure.HEAD, Structure.ROW, Structure.WHOLE, Structure.ELEMENT)


def own_cuts(model: nn.Module, factory: AdamMini) -> dict[str, Blocks]:
    """The recipe's cut of each parameter, with the overrides that it has.

    Args:
        model: The model.
        factory: Says how the model is cut.
    """
    cuts = partition_module(model, factory.partition, factory.partition_overrides, factory.partition_layouts)
    return {name: cut.blocks for name, cut in cuts.items()}


def expressible_cuts(model: nn.Module, factory: AdamMini) -> dict[str, dict[str, Blocks]]:
    """By parameter, the cut that it has, `keep`, and those that `partition_overrides` can ask for, by their names.

    A cut by head is among them where a layout tells the size of a head.

    Args:
        model: The model.
        factory: Says how the model is cut.
    """
    own = own_cuts(model, factory)
    roles = infer_roles(model, factory.partition_layouts)
    found: dict[str, dict[str, Blocks]] = {}
    for name, parameter in model.named_parameters():
        found[name] = {KEEP: own[name]} if name in own else {}
        for cut in ASKED:
            try:
                by_role = dict.fromkeys(roles[name].roles, cut)
                blocks = partition_parameter(tuple(parameter.shape), roles[name], by_role, is_overridden=True)
            except ValueError:  # no head that a layout knows
                continue
            found[name][str(cut)] = blocks
    return found


def with_own_overrides(model: nn.Module, factory: AdamMini, advised: Mapping[str, str]) -> dict[str, str]:
    """Advised overrides before those that the recipe has, without the ones that would match nothing any more.

    Args:
        model: The model.
        factory: Says how the model is cut.
        advised: Cuts by a pattern of one parameter each.
    """
    if not advised:
        return dict(factory.partition_overrides)
    found = dict(advised)
    for key, cut in factory.partition_overrides.items():
        if key in found:
            continue
        try:
            partition_module(model, factory.partition, {**found, key: cut}, factory.partition_layouts)
        except ValueError:  # all that it matches is advised otherwise
            continue
        found[key] = cut
    return found
