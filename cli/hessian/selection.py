"""Blocks by the patterns of `--blocks`, and the cuts that overrides can ask for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from lightning_adam_mini.blocks import Blocks
from lightning_adam_mini.factory import AdamMini
from lightning_adam_mini.hessian import ParameterBlock, block_of, blocks_of
from lightning_adam_mini.hessian.advice import KEEP
from lightning_adam_mini.partition import Cut, partition_module
from lightning_adam_mini.partition.inference import infer_roles
from lightning_adam_mini.partition.strategies import cut_parameter

__all__ = ["choose_blocks", "expressible_cuts", "matrices"]

ASKED = (Cut.HEAD, Cut.ROW, Cut.WHOLE, Cut.ELEMENT)


def matrices(model: nn.Module, least: int = 1) -> tuple[list[ParameterBlock], list[str]]:
    """A block for each trainable parameter of two dimensions or more, and the names of those that are smaller.

    Args:
        model: The model.
        least: Elements that a block must have.
    """
    every = [(name, p) for name, p in model.named_parameters() if p.requires_grad and p.dim() > 1]
    chosen = [ParameterBlock(name, name) for name, p in every if p.numel() >= least]
    return chosen, [name for name, p in every if p.numel() < least]


def choose_blocks(model: nn.Module, patterns: Sequence[str], factory: AdamMini) -> list[ParameterBlock]:
    """Blocks that patterns name, each once, in the order of the patterns.

    Args:
        model: The model.
        patterns: Names of parameters, patterns of the shell or `re:` patterns, with or without the `model.` in front;
            with `[K]` or `[*]` behind, blocks of the partition.
        factory: Says how the model is cut.

    Raises:
        ValueError: A pattern matches nothing, or a parameter has no such block.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    cuts: dict[str, Blocks] = {}
    found: dict[str, ParameterBlock] = {}
    for pattern in patterns:
        numbered = re.fullmatch(r"(.*)\[(\d+|\*)\]", pattern)
        names = _matching(numbered[1] if numbered else pattern, list(parameters))
        if numbered and not cuts:
            cuts = partition(model, factory)
        for name in names:
            if numbered is None:
                some = [ParameterBlock(name, name)]
            elif numbered[2] == "*":
                some = list(blocks_of(name, cuts[name]))
            else:
                some = [block_of(name, cuts[name], int(numbered[2]))]
            found |= {block.name: block for block in some if block.name not in found}
    return list(found.values())


def partition(model: nn.Module, factory: AdamMini) -> dict[str, Blocks]:
    """The recipe's cut of each parameter."""
    cuts = partition_module(model, factory.partition, factory.partition_overrides, factory.partition_layouts)
    return {name: cut.blocks for name, cut in cuts.items()}


def expressible_cuts(model: nn.Module, factory: AdamMini) -> dict[str, dict[str, Blocks]]:
    """By parameter, the cut that it has, `keep`, and those that `partition_overrides` can ask for, by their names.

    A cut by head is among them where a layout tells the size of a head.

    Args:
        model: The model.
        factory: Says how the model is cut.
    """
    own = partition(model, factory)
    roles = infer_roles(model, factory.partition_layouts)
    found: dict[str, dict[str, Blocks]] = {}
    for name, parameter in model.named_parameters():
        found[name] = {KEEP: own[name]} if name in own else {}
        for cut in ASKED:
            try:
                blocks = cut_parameter(name, tuple(parameter.shape), roles[name], dict.fromkeys(roles[name].roles, cut))
            except ValueError:  # no head that a layout knows
                continue
            found[name][str(cut)] = blocks
    return found


def _matching(pattern: str, names: Sequence[str]) -> list[str]:
    known = {name: (name, name.removeprefix("model.")) for name in names}
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern.removeprefix("re:"))
        except re.error as error:
            raise ValueError(f"--blocks {pattern}: this is no regular expression: {error}") from error
        found = [name for name, forms in known.items() if any(expression.fullmatch(form) for form in forms)]
    else:
        found = [name for name, forms in known.items() if any(fnmatchcase(form, pattern) for form in forms)]
    if not found:
        close = get_close_matches(pattern, [form for forms in known.values() for form in forms], n=3, cutoff=0.4)
        hint = f"close ones: {', '.join(close)}" if close else f"the first ones: {', '.join(names[:3])}"
        raise ValueError(f"--blocks {pattern}: no trainable parameter of that name; {hint}")
    return found
