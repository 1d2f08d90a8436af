"""Blocks by the patterns of `--blocks`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from lightning_adam_mini.blocks import Blocks
from lightning_adam_mini.factory import AdamMini
from lightning_adam_mini.hessian import ParameterBlock, block_of, blocks_of

from .cuts import own_cuts

__all__ = ["choose_blocks"]


def choose_blocks(
    model: nn.Module, patterns: Sequence[str] | None, factory: AdamMini, *, least: int = 1
) -> tuple[list[ParameterBlock], list[str]]:
    """Blocks that patterns name, each once, in the order of the patterns; without any, all trainable matrices.

    Args:
        model: The model.
        patterns: Names of parameters, patterns of the shell or `re:` patterns, with or without the `model.` in front;
            with `[K]` or `[*]` behind, blocks of the partition.
        factory: Says how the model is cut.
        least: Elements of a matrix that no pattern names, below which it is left out.

    Returns:
        The blocks, and the names of the matrices that were left out.

    Raises:
        ValueError: A pattern matches nothing, a parameter has no such block, or there is no matrix.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if patterns is not None:
        return _named(model, patterns, list(parameters), factory), []
    matrices = {name: p.numel() for name, p in parameters.items() if p.dim() > 1}
    if not matrices:
        raise ValueError("the model has no trainable parameter of two dimensions: name others by --blocks")
    chosen = [ParameterBlock(name, name) for name, size in matrices.items() if size >= least]
    if not chosen:
        raise ValueError(f"no matrix has {least} elements: lower --steps, or name --blocks")
    return chosen, [name for name, size in matrices.items() if size < least]


def _named(model: nn.Module, patterns: Sequence[str], names: Sequence[str], factory: AdamMini) -> list[ParameterBlock]:
    others = _others(model, names)
    cuts: dict[str, Blocks] = {}
    found: dict[str, ParameterBlock] = {}
    for pattern in patterns:
        numbered = re.fullmatch(r"(.*)\[(\d+|\*)\]", pattern)
        if numbered and not cuts:
            cuts = own_cuts(model, factory)
        for name in _matching(numbered[1] if numbered else pattern, names, others):
            if numbered is None:
                some = [ParameterBlock(name, name)]
            elif numbered[2] == "*":
                some = list(blocks_of(name, cuts[name]))
            else:
                some = [block_of(name, cuts[name], int(numbered[2]))]
            found |= {block.name: block for block in some if block.name not in found}
    return list(found.values())


def _others(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Why parameters have no Hessian of their own: tied ones by their other names, and frozen ones."""
    first = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if first[id(p)] != name:
            found[name] = f"is the same tensor as {first[id(p)]}, which goes by that name"
        elif name not in names:
            found[name] = "is frozen, and the Hessian is that of trainable parameters"
    return found


def _matching(pattern: str, names: Sequence[str], others: Mapping[str, str]) -> list[str]:
    """Names of trainable parameters that a pattern matches."""
    found = _matches(pattern, names)
    if not found:
        if other := next(iter(_matches(pattern, list(others))), None):
            raise ValueError(f"--blocks {pattern!r}: {other} {others[other]}")
        forms = [form for name in names for form in _forms(name)]
        close = get_close_matches(pattern, forms, n=3, cutoff=0.4)
        hint = f"close ones: {', '.join(close)}" if close else f"the first ones: {', '.join(names[:3])}"
        raise ValueError(f"--blocks {pattern!r}: no trainable parameter of that name; {hint}")
    return found


def _matches(pattern: str, names: Sequence[str]) -> list[str]:
    if not pattern.startswith("re:"):
        return [name for name in names if any(fnmatchcase(form, pattern) for form in _forms(name))]
    try:
        expression = re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise ValueError(f"--blocks {pattern!r}: this is no regular expression: {error}") from error
    return [name for name in names if any(expression.fullmatch(form) for form in _forms(name))]


def _forms(name: str) -> tuple[str, ...]:
    return (name, name.removeprefix("model."))
