"""What overrides can ask for, and few overrides that ask for it: the vocabulary of advice about a partition."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from torch import nn

from lightning_adam_mini.blocks import Blocks
from lightning_adam_mini.partition.inference import Layouts, infer_roles
from lightning_adam_mini.partition.partition import by_equal_layers
from lightning_adam_mini.partition.roles import Role
from lightning_adam_mini.partition.strategies import Structure, partition_parameter

__all__ = ["expressible_structures", "merge_overrides"]


def expressible_structures(
    module: nn.Module, layouts: Layouts | None = None, *, factored: bool = False
) -> dict[str, dict[str, Blocks]]:
    """By parameter, the block structures that `partition_overrides` can ask for, by name.

    Heads are among them where a layout declares the size of a head, and columns where there is a second dimension.

    Args:
        module: The model.
        layouts: Layouts for classes of this model, as for `partition_module`.
        factored: Whether a factored second moment, which has no blocks, counts as well.
    """
    roles = infer_roles(module, layouts)
    asked = [structure for structure in Structure if factored or structure is not Structure.FACTORED]
    found: dict[str, dict[str, Blocks]] = {}
    for name, parameter in module.named_parameters():
        found[name] = {}
        for structure in asked:
            try:
                by_role = dict.fromkeys(roles[name].roles, structure)
                blocks = partition_parameter(tuple(parameter.shape), roles[name], by_role, is_overridden=True)
            except ValueError:  # no layout knows its heads, or it is a vector
                continue
            found[name][str(structure)] = blocks
    return found


def merge_overrides(structures: Mapping[str, str], otherwise: str) -> dict[str, str]:
    """Overrides, one for equal layers where most agree, for a partition that has `otherwise` everywhere.

    Args:
        structures: The structure of each parameter of the model, by its plain name (`plain_names`).
        otherwise: The structure without an override.

    Returns:
        Names and `re:` patterns, exceptions before the pattern of the other layers.
    """
    found: dict[str, str] = {}
    for pattern, names in by_equal_layers(structures).items():
        asked = {name: structures[name] for name in names if structures[name] != otherwise}
        if not asked:
            continue
        ((common, _),) = Counter(asked.values()).most_common(1)
        exceptions = {name: structures[name] for name in names if structures[name] != common}
        is_shorter = len(exceptions) + 1 < len(asked)
        found |= {_exactly(name): structure for name, structure in (exceptions if is_shorter else asked).items()}
        found |= {pattern: common} if is_shorter else {}
    return found


def _exactly(name: str) -> str:
    """An override for one parameter, also if a role has its name."""
    return f"re:{re.escape(name)}" if name in list(Role) else name
