"""Convert the state of one optimizer to that of another over the same parameters: match, convert, group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_adam_mini.blocks import Blocks
from lightning_adam_mini.convert.saved_states import (
    SavedBy,
    SavedParameter,
    Wanted,
    match,
    saved_by,
    saved_parameters,
    whole,
)
from lightning_adam_mini.convert.second_moments import second_moment
from lightning_adam_mini.optim import AdamMini, quantized
from lightning_adam_mini.optim.state import first_moment_dtype, saved_tensor, second_moment_dtype

__all__ = ["Conversion", "convert", "from_adam_mini_package", "from_adamw", "repartition", "to_adamw"]

HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay", "initial_lr")


@dataclass(frozen=True)
class Conversion:
    """A converted state.

    Args:
        state: The state to load into the optimizer.
        source: What saved the original state.
        group_sources: For each group of the state, the numbers of the saved groups that its parameters come from.
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
    """Convert a state to one of `optimizer`, an AdamMini or an AdamW.

    Args:
        state_dict: A state of AdamW, Adam, AdamMini or the package `adam-mini`.
        optimizer: The optimizer to convert for; it is not changed.
        names: As in `from_adamw`.
        keep_hyperparameters: As in `from_adamw`.
        by_elements: Return a state of AdamW, also if `optimizer` is an AdamMini.

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
        elif not by_elements and parameter.requires_grad:  # AdamMini creates its state before the first step
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
    """The parameters of an optimizer with their blocks, in the order of its state, and how to match saved ones."""
    if isinstance(optimizer, AdamMini):
        flat = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        partition = optimizer.partition
        parameters = {name: (p, found.blocks) for (name, found), p in zip(partition.items(), flat, strict=True)}
        # In the model's order, with frozen parameters.
        order = [(found.name, found.blocks.shape) for found in optimizer._table.partitions()]
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
    """The converted state of one parameter; at most one tensor of its size is expanded at a time.

    Args:
        source: What saved the state.
        saved: The saved parameter.
        name: Its name.
        blocks: Its new blocks.
        dtypes: Of the first moment, which matters if it is or becomes 8-bit codes, and of the second moment; None for
            the dtype of the first.
    """
    needed = {"step", "exp_avg"} if source is not SavedBy.PACKAGE else {"step", "m"}
    if missing := needed - saved.state.keys():
        raise ValueError(f"the optimizer state of {name!r} has no {', '.join(sorted(missing))}: it is incomplete")
    if "max_exp_avg_sq" in saved.state:
        raise ValueError(
            f"the optimizer state of {name!r} has max_exp_avg_sq: AMSGrad divides by the largest second moment so far, "
            "which Adam-mini does not keep; start a new optimizer from the weights alone"
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
    """A saved first moment as 8-bit codes or as numbers; it is shared if it needs no change."""
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
    """The state of a parameter that had no gradient yet."""
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
    """A group with all options of the installed torch's AdamW, and the hyperparameters of `group`."""
    (template,) = torch.optim.AdamW([torch.empty(0)]).state_dict()["param_groups"]
    shared = {key: group[key] for key in (*HYPERPARAMETERS, "maximize", "capturable") if key in group}
    return {**template, **shared, "params": group["params"]}


def _hyperparameters(groups: Sequence[dict[str, Any]], members: Sequence[str]) -> dict[str, Any]:
    """The common hyperparameters of saved groups.

    Raises:
        ValueError: They differ, or a weight decay is not decoupled.
    """
    found: dict[str, Any] = {}
    for group in groups:
        if group.get("weight_decay") and group.get("decoupled_weight_decay") is False:
            raise ValueError(
                "the state is Adam's, whose weight decay is an L2 term of the gradient, so that its value does not fit "
                "here; leave keep_hyperparameters out"
            )
        own = {"betas": (group["beta1"], group["beta2"])} if "beta1" in group else {}
        own |= {key: group[key] for key in HYPERPARAMETERS if key in group}
        for key, value in own.items():
            value = tuple(value) if key == "betas" else value
            if key in found and found[key] != value:
                raise ValueError(
                    f"the parameters of one group ({members[0]}, ...) had {key} = {found[key]} and {value}; use the "
                    "groups of the other optimizer (weight_decay_policy), or leave keep_hyperparameters out"
                )
            found[key] = value
    return found


def from_adamw(
    state_dict: dict[str, Any],
    optimizer: AdamMini,
    *,
    names: Sequence[str] | None = None,
    keep_hyperparameters: bool = False,
) -> dict[str, Any]:
    """Convert a state of AdamW or Adam to one of AdamMini: the second moment becomes its means over blocks.

    The first moment and the step stay. The input does not change; its first moments are shared unless only one side
    stores them in 8 bits.

    Args:
        state_dict: `state_dict()` of `torch.optim.AdamW` or `Adam`, in any groups; or the same keyed by names.
        optimizer: The AdamMini over the same model; it is not changed. Load the result into it.
        names: Names of the parameters in the order of the other optimizer. Needed if the state has none, and groups and
            shapes are ambiguous.
        keep_hyperparameters: Take learning rate, betas, eps and weight decay from the state instead of `optimizer`.

    Raises:
        ValueError: A state of another optimizer or model, with the parameter and both shapes; AMSGrad; or
            hyperparameters that do not fit into one group.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> adamw = torch.optim.AdamW(model.parameters())
        >>> model(torch.ones(4)).sum().backward()
        >>> adamw.step()
        >>> optimizer = AdamMini(model, partition="default")
        >>> optimizer.load_state_dict(from_adamw(adamw.state_dict(), optimizer))
    """
    _require(state_dict, SavedBy.ADAMW, "from_adamw")
    return convert(state_dict, optimizer, names=names, keep_hyperparameters=keep_hyperparameters).state


def from_adam_mini_package(
    state_dict: dict[str, Any], optimizer: AdamMini, *, keep_hyperparameters: bool = False
) -> dict[str, Any]:
    """Convert a state of the reference implementation, the package `adam-mini` 1.1.1, to one of AdamMini.

    The package names its parameters. Where its blocks differ (it does not know fused or transposed matrices), they are
    expanded to elements and averaged over the new blocks.

    Args:
        state_dict: `state_dict()` of the package's `Adam_mini`.
        optimizer: The AdamMini over the same model; it is not changed.
        keep_hyperparameters: As in `from_adamw`.

    Raises:
        ValueError: As `from_adamw`.
    """
    _require(state_dict, SavedBy.PACKAGE, "from_adam_mini_package")
    return convert(state_dict, optimizer, keep_hyperparameters=keep_hyperparameters).state


def repartition(
    state_dict: dict[str, Any],
    optimizer: AdamMini,
    *,
    names: Sequence[str] | None = None,
    keep_hyperparameters: bool = False,
) -> dict[str, Any]:
    """Convert a state of AdamMini to another partition.

    Blocks are expanded to elements and averaged over the new blocks; equal blocks keep every bit.

    Args:
        state_dict: `state_dict()` of an AdamMini.
        optimizer: The other AdamMini, over the same model; it is not changed.
        names: As in `from_adamw`.
        keep_hyperparameters: As in `from_adamw`.

    Raises:
        ValueError: As `from_adamw`; or a state that does not name its partition, with ambiguous shapes.
    """
    _require(state_dict, SavedBy.ADAM_MINI, "repartition")
    return convert(state_dict, optimizer, names=names, keep_hyperparameters=keep_hyperparameters).state


def to_adamw(
    state_dict: dict[str, Any],
    optimizer: Optimizer,
    *,
    names: Sequence[str] | None = None,
    keep_hyperparameters: bool = False,
) -> dict[str, Any]:
    """Convert a state of AdamMini to one of AdamW: each element gets the value of its block.

    With a factored second moment, it gets the product of its row and column. The averages of the blocks remain: the
    first steps of AdamW have the step sizes of Adam-mini.

    Args:
        state_dict: `state_dict()` of an AdamMini.
        optimizer: The `torch.optim.AdamW` over the same parameters; or the AdamMini that saved the state, for an AdamW
            with the same groups. It is not changed.
        names: As in `from_adamw`.
        keep_hyperparameters: As in `from_adamw`.

    Raises:
        ValueError: As `repartition`.
    """
    _require(state_dict, SavedBy.ADAM_MINI, "to_adamw")
    return convert(
        state_dict, optimizer, names=names, keep_hyperparameters=keep_hyperparameters, by_elements=True
    ).state


def _require(state_dict: dict[str, Any], expected: SavedBy, function: str) -> None:
    found = saved_by(state_dict)
    if found is not expected:
        other = {
            SavedBy.ADAMW: "from_adamw",
            SavedBy.ADAM_MINI: "repartition or to_adamw",
            SavedBy.PACKAGE: "from_adam_mini_package",
        }
        raise ValueError(f"{function} takes a state of {expected}, but this is one of {found}; use {other[found]}")
