"""From any state that can be converted to that of an optimizer: matched, converted and grouped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_adam_mini.blocks import Blocks
from lightning_adam_mini.convert.matching import Wanted, match
from lightning_adam_mini.convert.saved import SavedBy, SavedParameter, saved_by, saved_parameters, whole
from lightning_adam_mini.convert.second_moment import second_moment
from lightning_adam_mini.optim import AdamMini, quantized
from lightning_adam_mini.optim.state import first_moment_dtype, saved_tensor, second_moment_dtype

__all__ = ["Conversion", "convert"]

HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay", "initial_lr")


@dataclass(frozen=True)
class Conversion:
    """A converted state.

    Args:
        state: What the optimizer loads.
        source: What wrote the state that it was converted from.
        group_sources: For each group of it, the numbers of the groups that its parameters had before.
    """

    state: dict[str, Any]
    source: SavedBy
    group_sources: tuple[tuple[int, ...], ...]


@torch.no_grad()
def convert(
    state_dict: dict[str, Any],
    optimizer: Optimizer,
    *,
    names: Sequence[str] | None = None,
    keep_hyperparameters: bool = False,
    by_elements: bool = False,
) -> Conversion:
    """Any state that can be converted as one of `optimizer`, an AdamMini or an AdamW.

    Args:
        state_dict: A state of AdamW, Adam, AdamMini or the package `adam-mini`.
        optimizer: What the state is for.
        names: As in `from_adamw`.
        keep_hyperparameters: As in `from_adamw`.
        by_elements: Make a state of AdamW, also where `optimizer` is an AdamMini.

    Raises:
        ValueError: As `from_adamw`.
    """
    source = saved_by(state_dict)
    by_elements = by_elements or not isinstance(optimizer, AdamMini)
    exp_avg_dtype = getattr(optimizer, "exp_avg_dtype", None)
    wanted, parameters = _wanted(optimizer)
    found = match(saved_parameters(state_dict, names), wanted)
    states: dict[int, dict[str, Tensor]] = {}
    for number, (name, (parameter, own)) in enumerate(parameters.items()):
        blocks = Blocks.element(wanted.shapes[name]) if by_elements else own
        if name in found and found[name].state:
            kept = first_moment_dtype(blocks.shape, parameter.dtype, None if by_elements else exp_avg_dtype)
            dtypes = (kept, None if by_elements else second_moment_dtype(parameter))
            states[number] = _converted(source, found[name], name, blocks, dtypes)
        elif not by_elements and parameter.requires_grad:  # an AdamMini has its state before the first step
            states[number] = _fresh(parameter, blocks, exp_avg_dtype)
    sources = tuple(tuple(sorted({found[name].group for name in group if name in found})) for group in wanted.groups)
    groups = optimizer.state_dict()["param_groups"]
    if by_elements and isinstance(optimizer, AdamMini):
        groups = [_as_adamw(group) for group in groups]
    if keep_hyperparameters:
        for group, numbers, members in zip(groups, sources, wanted.groups, strict=True):
            group.update(_hyperparameters([state_dict["param_groups"][n] for n in numbers], members))
    return Conversion({"state": states, "param_groups": groups}, source, sources)


def _wanted(optimizer: Optimizer) -> tuple[Wanted, dict[str, tuple[Tensor, Blocks]]]:
    """What an optimizer is over, and its parameters with their blocks in the order of its state."""
    if isinstance(optimizer, AdamMini):
        flat = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        cuts = optimizer.partition
        parameters = {name: (p, cut.blocks) for (name, cut), p in zip(cuts.items(), flat, strict=True)}
        order = [
            (cut.name, cut.blocks.shape) for cut in optimizer._table.partitions()
        ]  # the model's, with what is frozen
        named = True
    else:
        known = [group.get("param_names") for group in optimizer.param_groups]
        named = all(known)
        parameters = {}
        for group, group_names in zip(optimizer.param_groups, known, strict=True):
            for index, parameter in enumerate(group["params"]):
                name = group_names[index] if group_names else f"parameter {len(parameters)}"
                parameters[name] = (parameter, Blocks.element(parameter.shape))
        order = [(name, tuple(parameter.shape)) for name, (parameter, _) in parameters.items()]
    shapes = {name: tuple(parameter.shape) for name, (parameter, _) in parameters.items()}
    remaining = iter(parameters)
    groups = [[next(remaining) for _ in group["params"]] for group in optimizer.param_groups]
    frozen = frozenset(name for name, (parameter, _) in parameters.items() if not parameter.requires_grad)
    return Wanted(groups, shapes, order, named, frozen), parameters


def _converted(
    source: SavedBy,
    saved: SavedParameter,
    name: str,
    blocks: Blocks,
    dtypes: tuple[torch.dtype, torch.dtype | None],
) -> dict[str, Tensor]:
    """The state of one parameter; no more than one of its size is expanded at a time.

    Args:
        source: What wrote the state.
        saved: The saved parameter.
        name: Its name.
        blocks: How it is to be cut.
        dtypes: Those of the first moment, which matters where it is or becomes 8-bit codes, and of the second; None for
            that of the first.
    """
    needed = {"step", "exp_avg"} if source is not SavedBy.PACKAGE else {"step", "m"}
    if missing := needed - saved.state.keys():
        raise ValueError(f"the optimizer state of {name!r} has no {', '.join(sorted(missing))}: it is not complete")
    if "max_exp_avg_sq" in saved.state:
        raise ValueError(
            f"the optimizer state of {name!r} has max_exp_avg_sq: AMSGrad divides by the largest second moment so far, "
            "which Adam-mini has not; start the optimizer afresh from the weights alone"
        )
    first = saved.first_moment
    assert first is not None
    exp_avg = whole(first)
    if source is SavedBy.PACKAGE:
        exp_avg = exp_avg.reshape(blocks.shape)
    moments = _in_format({**saved.state, "exp_avg": exp_avg}, dtypes[0])
    dtype = dtypes[1] or moments["exp_avg"].dtype
    step = saved_tensor(saved.state["step"]).detach().to("cpu", torch.float32).clone()
    return {"step": step, **moments, **second_moment(source, saved, name, blocks, dtype)}


def _in_format(saved: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """A saved first moment as 8-bit codes or as numbers; one that needs no change is shared."""
    exp_avg, scale = saved["exp_avg"], saved.get("exp_avg_scale")
    if scale is not None:
        scale = whole(scale)
        if dtype is torch.uint8:
            return {"exp_avg": exp_avg, "exp_avg_scale": scale}
        return {"exp_avg": quantized.decode_tensor(exp_avg, scale).to(dtype)}
    if dtype is not torch.uint8:
        return {"exp_avg": exp_avg}
    codes = torch.empty_like(exp_avg, dtype=torch.uint8)
    scale = torch.empty(quantized.scale_shape(exp_avg.shape), dtype=torch.float32, device=exp_avg.device)
    quantized.encode_tensor_(codes, scale, exp_avg)
    return {"exp_avg": codes, "exp_avg_scale": scale}


def _fresh(parameter: Tensor, blocks: Blocks, exp_avg_dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The state of a parameter that never had a gradient."""
    device = "cpu" if parameter.is_meta else parameter.device
    moments = {
        key: torch.zeros(shape, dtype=second_moment_dtype(parameter), device=device)
        for key, shape in blocks.state_shapes.items()
    }
    kept = first_moment_dtype(blocks.shape, parameter.dtype, exp_avg_dtype)
    numbers = torch.zeros(blocks.shape, dtype=parameter.dtype if kept is torch.uint8 else kept, device=device)
    return {
        "step": torch.zeros((), dtype=torch.float32, device="cpu"),
        **_in_format({"exp_avg": numbers}, kept),
        **moments,
    }


def _as_adamw(group: dict[str, Any]) -> dict[str, Any]:
    """A group with the options of torch's AdamW, which are of its version, and the hyperparameters that it has."""
    (template,) = torch.optim.AdamW([torch.empty(0)]).state_dict()["param_groups"]
    shared = {key: group[key] for key in (*HYPERPARAMETERS, "maximize", "capturable") if key in group}
    return {**template, **shared, "params": group["params"]}


def _hyperparameters(groups: Sequence[dict[str, Any]], members: Sequence[str]) -> dict[str, Any]:
    """The hyperparameters that saved groups have in common.

    Raises:
        ValueError: They differ, or a weight decay is not decoupled.
    """
    found: dict[str, Any] = {}
    for group in groups:
        if group.get("weight_decay") and group.get("decoupled_weight_decay") is False:
            raise ValueError(
                "the state is Adam's, whose weight decay is an L2 term of the gradient and has another size; leave "
                "keep_hyperparameters out"
            )
        own = {"betas": (group["beta1"], group["beta2"])} if "beta1" in group else {}
        own |= {key: group[key] for key in HYPERPARAMETERS if key in group}
        for key, value in own.items():
            value = tuple(value) if key == "betas" else value
            if key in found and found[key] != value:
                raise ValueError(
                    f"the parameters of one group ({members[0]}, ...) had {key} = {found[key]} and {value}; make the "
                    "groups that the other optimizer had (weight_decay_policy), or leave keep_hyperparameters out"
                )
            found[key] = value
    return found
