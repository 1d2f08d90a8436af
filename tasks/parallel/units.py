"""The units of a network that are gathered and freed together: its repeated blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn

__all__ = ["repeated_blocks"]


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks that a network is a stack of, by name, none within another.

    A transformers model names their classes (`_no_split_modules`). Elsewhere they are the members of a ModuleList,
    Sequential or ModuleDict that share their class with another member and hold a matrix in a child of theirs: layers
    of a Transformer, residual blocks of a ResNet, stages of a U-Net, convolutions of a graph network. Parameters that a
    block shares with the outside belong to the whole model, so such a block is left out.
    """
    named = set(getattr(model, "_no_split_modules", None) or ())
    found = dict(_by_class(model, "", named)) if named else {}
    found = found or dict(_members(model, ""))
    owners = Counter(id(parameter) for parameter in _all_parameters(model))
    return {name: block for name, block in found.items() if not _shares_outside(block, owners)}


def _by_class(module: nn.Module, prefix: str, names: set[str]) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if type(child).__name__ in names:
            yield path, child
        else:
            yield from _by_class(child, f"{path}.", names)


def _members(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    is_container = isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict)
    classes = Counter(type(child) for child in module.children())
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        is_plain_container = isinstance(child, nn.ModuleList | nn.ModuleDict) or type(child) is nn.Sequential
        if is_container and classes[type(child)] > 1 and not is_plain_container and _is_block(child):
            yield path, child
        else:
            yield from _members(child, f"{path}.")


def _is_block(module: nn.Module) -> bool:
    own = {id(parameter) for parameter in module.parameters(recurse=False)}
    return any(parameter.dim() > 1 and id(parameter) not in own for parameter in module.parameters())


def _all_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of all modules, a shared one as often as it is held."""
    for child in module.modules():
        yield from child.parameters(recurse=False)


def _shares_outside(block: nn.Module, owners: Counter[int]) -> bool:
    within = Counter(id(parameter) for parameter in _all_parameters(block))
    return any(owners[parameter] > number for parameter, number in within.items())
