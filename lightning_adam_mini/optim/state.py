"""The state of one parameter: made, checked and restored.

Keys: `step` (float32, no dimensions), `exp_avg` (the parameter's shape) and the second moments that its blocks name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_adam_mini.blocks import Blocks
from lightning_adam_mini.optim.fingerprint import check_partition
from lightning_adam_mini.optim.sharding import copy_global_, is_dtensor, place_moment
from lightning_adam_mini.optim.shards import Shard
from lightning_adam_mini.partition import CutParameter

__all__ = ["check_keys", "check_state", "fits_parameter", "init_state", "restore_state", "second_moment_dtype"]


def second_moment_dtype(parameter: Tensor) -> torch.dtype:
    """Float32 or wider: in bfloat16, a moment with beta2 = 0.999 would never decay."""
    return torch.promote_types(parameter.dtype, torch.float32)


def init_state(
    parameter: Tensor,
    blocks: Blocks,
    shard: Shard | None = None,
    *,
    exp_avg_dtype: torch.dtype | None,
    capturable: bool,
) -> dict[str, Tensor]:
    """The state of a parameter before its first step; that of a DTensor has DTensors, but for `step`."""
    moment_dtype = second_moment_dtype(parameter)
    step_device = parameter.device if capturable else torch.device("cpu")
    state = {
        "step": torch.zeros((), dtype=torch.float32, device=step_device),
        "exp_avg": torch.zeros_like(parameter, dtype=exp_avg_dtype, memory_format=torch.preserve_format),
    }
    for key, shape in (shard or Shard(blocks)).frame.state_shapes.items():
        moment = torch.zeros(shape, dtype=moment_dtype, device=parameter.device)
        state[key] = place_moment(moment, parameter, blocks, key) if is_dtensor(parameter) else moment
    return state


def restore_state(state: Mapping[str, Tensor], saved: Mapping[str, Any]) -> None:
    """Copy a saved state into a fresh one, which keeps its dtypes and devices."""
    for key, tensor in state.items():
        copy_global_(tensor, torch.as_tensor(saved[key]))


def fits_parameter(state: Mapping[str, Tensor], parameter: Tensor, *, exp_avg_dtype: torch.dtype | None) -> bool:
    """Whether a state has the device and the dtypes that `init_state` would choose now."""
    moments = (value for key, value in state.items() if key not in ("step", "exp_avg"))
    exp_avg = state["exp_avg"]
    return (
        exp_avg.device == parameter.device
        and exp_avg.dtype == (exp_avg_dtype or parameter.dtype)
        and all(moment.dtype == second_moment_dtype(parameter) for moment in moments)
    )


def check_state(
    state_dict: Mapping[str, Any],
    param_groups: Sequence[Mapping[str, Any]],
    cuts: Mapping[Tensor, CutParameter],
    options: Iterable[str],
    *,
    saved_blocks: Callable[[Tensor], Blocks],
) -> None:
    """Check that a saved state fits the parameters and their blocks, and that its groups have the same `options`.

    Args:
        state_dict: The saved state.
        param_groups: Groups of the optimizer.
        cuts: Its parameters and their roles.
        options: Hyperparameters that each saved group must have.
        saved_blocks: The blocks that name the shapes of a parameter's saved second moments.

    Raises:
        ValueError: With the first parameter that differs and what the state may come from.
    """
    saved_sizes = [len(group["params"]) for group in state_dict["param_groups"]]
    sizes = [len(group["params"]) for group in param_groups]
    if saved_sizes != sizes:
        raise ValueError(
            f"the optimizer state has groups of {saved_sizes} parameters, this optimizer has {sizes}: it belongs to "
            "another model, or to other parameter groups"
        )
    for group, saved_group in zip(param_groups, state_dict["param_groups"], strict=True):
        if missing := [option for option in options if option in group and option not in saved_group]:
            raise ValueError(
                f"the optimizer state has groups without {', '.join(missing)}: it comes from another optimizer. "
                "Continue with the optimizer that saved it, or start the optimizer afresh from the weights alone"
            )
    names = [cuts[parameter].name for group in param_groups for parameter in group["params"]]
    parameters = [parameter for group in param_groups for parameter in group["params"]]
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    states = [state_dict["state"].get(number) for number in numbers]
    for name, parameter, saved in zip(names, parameters, states, strict=True):
        if saved is not None and "exp_avg" in saved:
            _check_shape(name, "exp_avg", saved["exp_avg"], tuple(parameter.shape), "another model")
    check_partition(state_dict["param_groups"], param_groups, names)
    for name, parameter, saved in zip(names, parameters, states, strict=True):
        if saved is not None:
            _check_parameter_state(saved, parameter, name, saved_blocks(parameter))


def check_keys(saved: Mapping[str, Any], name: str, blocks: Blocks) -> None:
    """Check that the saved state of a parameter has all that this partition keeps.

    Raises:
        ValueError: It has not.
    """
    expected = ("step", "exp_avg", *blocks.state_shapes)
    if not set(expected) <= saved.keys():
        raise ValueError(
            f"the saved state of {name!r} has the keys {', '.join(map(str, saved))}, but AdamMini with this "
            f"partition keeps {', '.join(expected)}: it comes from another optimizer or partition. Continue with the "
            "optimizer and partition that saved it, convert the state (`adam-mini convert`), or start the optimizer "
            "afresh from the weights alone"
        )


def _check_parameter_state(saved: Mapping[str, Any], parameter: Tensor, name: str, blocks: Blocks) -> None:
    check_keys(saved, name, blocks)
    expected: dict[str, tuple[int, ...]] = {"step": (), "exp_avg": tuple(parameter.shape), **blocks.state_shapes}
    for key, shape in expected.items():
        is_elementwise = key == "exp_avg_sq" and torch.as_tensor(saved[key]).shape == parameter.shape
        source = "AdamW, or from another partition" if is_elementwise else "another partition"
        _check_shape(name, key, saved[key], shape, source)


def _check_shape(name: str, key: str, saved: object, shape: tuple[int, ...], source: str) -> None:
    saved_shape = tuple(torch.as_tensor(saved).shape)
    if saved_shape != shape:
        raise ValueError(
            f"the saved {key} of {name!r} has shape {saved_shape}, but here it has {shape}: it comes from {source}."
            " Continue with the optimizer, model and partition that saved it, convert the state "
            "(`adam-mini convert`), or start the optimizer afresh from the weights alone"
        )
