"""The state of a parameter: how it is made, checked, saved and restored.

Keys: `step` (float32, no dimensions), `exp_avg` (the parameter's shape) and the second moments that its blocks name. An
8-bit first moment has codes under `exp_avg` and their scales under `exp_avg_scale`.

A saved state names the block structure of each parameter, so that it is not loaded into another partition. Shapes alone
do not tell: a fused matrix of queries, keys and values keeps as many numbers in one order of its rows as in another. So
each group saves the signatures of its parameters (`Blocks.signature`), joined by `; `, as `partition`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_adam_mini.blocks import Blocks
from lightning_adam_mini.optim import quantized
from lightning_adam_mini.optim.distributed import copy_global_, is_dtensor, local, place_moment
from lightning_adam_mini.optim.params import check_group
from lightning_adam_mini.optim.shards import Shard

__all__ = [
    "NO_STATE",
    "check_is_state",
    "check_keys",
    "check_partition",
    "check_state",
    "first_moment",
    "first_moment_bytes",
    "first_moment_dtype",
    "fits_parameter",
    "init_state",
    "is_sharded_as",
    "partition_changes",
    "restore_state",
    "saved_signatures",
    "saved_tensor",
    "second_moment_dtype",
    "steps_taken",
]

NO_STATE = "none"
"""Replaces the signature of a parameter that had no state when its group was saved, as frozen ones have none."""
_FIRST_MOMENT = ("exp_avg", "exp_avg_scale")
_INTEGERS = (torch.int64, torch.int32, torch.int16)
_NUM_NAMED = 3
"""Parameters that a message names."""
_DAMAGED = "Load another checkpoint, or start the optimizer afresh from the weights alone"


def second_moment_dtype(parameter: Tensor) -> torch.dtype:
    """Float32 or wider: in bfloat16, a moment with beta2 = 0.999 would never decay."""
    return torch.promote_types(parameter.dtype, torch.float32)


def first_moment_dtype(shape: Sequence[int], dtype: torch.dtype, exp_avg_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype in which the first moment of a parameter is kept.

    Args:
        shape: The whole parameter's.
        dtype: Its dtype.
        exp_avg_dtype: What the user asked for: uint8 is for matrices that are not small, and None the parameter's.
    """
    if exp_avg_dtype is torch.uint8 and not quantized.has_codes(shape):
        return dtype
    return exp_avg_dtype or dtype


def first_moment_bytes(shape: Sequence[int], dtype: torch.dtype, exp_avg_dtype: torch.dtype | None) -> int:
    """Bytes of the first moment of a parameter, with its scales; the arguments are those of `first_moment_dtype`."""
    kept = first_moment_dtype(shape, dtype, exp_avg_dtype)
    scales = math.prod(quantized.scale_shape(shape)) if kept is torch.uint8 else 0
    return math.prod(shape) * kept.itemsize + scales * torch.float32.itemsize


def first_moment(state: Mapping[str, Tensor]) -> Tensor:
    """The first moment of a parameter as float32 numbers, in whatever format its state has it.

    Args:
        state: The state of one parameter, `optimizer.state[parameter]`.

    Returns:
        A tensor of the parameter's shape, sharded as the state is; a new one, unless the state has it in float32.
    """
    exp_avg, scale = state["exp_avg"], state.get("exp_avg_scale")
    if scale is None:
        return exp_avg.to(torch.float32)
    numbers = quantized.decode_tensor(local(exp_avg), local(scale))
    return _laid_out_as(exp_avg, numbers)


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
    kept = first_moment_dtype(blocks.shape, parameter.dtype, exp_avg_dtype)
    step_device = parameter.device if capturable else torch.device("cpu")
    state = {
        "step": torch.zeros((), dtype=torch.float32, device=step_device),
        "exp_avg": torch.zeros_like(parameter, dtype=kept, memory_format=torch.preserve_format),
    }
    if kept is torch.uint8:
        local(state["exp_avg"]).fill_(quantized.ZERO_CODE)
        state["exp_avg_scale"] = quantized.init_scale(parameter)
    for key, shape in (shard or Shard(blocks)).local_blocks.state_shapes.items():
        moment = torch.zeros(shape, dtype=moment_dtype, device=parameter.device)
        state[key] = place_moment(moment, parameter, blocks, key) if is_dtensor(parameter) else moment
    return state


def saved_tensor(value: Any) -> Tensor:
    """A saved tensor, or a saved number as a CPU tensor, since torch's default device may be meta."""
    return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")


def restore_state(state: Mapping[str, Tensor], saved: Mapping[str, Any]) -> None:
    """Copy a saved state into a fresh one, which keeps its dtypes and devices; a first moment changes its format."""
    tensors = {key: saved_tensor(value) for key, value in saved.items() if key in (*state, *_FIRST_MOMENT)}
    is_converted = ("exp_avg_scale" in state) is not ("exp_avg_scale" in tensors)
    for key, tensor in state.items():
        if not (is_converted and key in _FIRST_MOMENT):
            copy_global_(tensor, tensors[key])
    if not is_converted:
        return
    exp_avg = state["exp_avg"]
    if "exp_avg_scale" in tensors:
        copy_global_(exp_avg, first_moment(tensors))
        return
    numbers = _laid_out_as(exp_avg, torch.empty_like(local(exp_avg), dtype=torch.float32))
    copy_global_(numbers, tensors["exp_avg"])
    quantized.encode_tensor_(local(exp_avg), local(state["exp_avg_scale"]), local(numbers))


def fits_parameter(
    state: Mapping[str, Tensor],
    parameter: Tensor,
    *,
    shape: Sequence[int] | None = None,
    exp_avg_dtype: torch.dtype | None,
) -> bool:
    """Whether a state has the device and the dtypes that `init_state` would choose now.

    Args:
        state: The state.
        parameter: The parameter, or this rank's part of it.
        shape: Shape of the whole parameter; that of `parameter` by default.
        exp_avg_dtype: As for `init_state`.
    """
    moments = (value for key, value in state.items() if key not in ("step", *_FIRST_MOMENT))
    exp_avg = state["exp_avg"]
    return (
        exp_avg.device == parameter.device
        and exp_avg.dtype == first_moment_dtype(shape or parameter.shape, parameter.dtype, exp_avg_dtype)
        and all(moment.dtype == second_moment_dtype(parameter) for moment in moments)
    )


def is_sharded_as(state: Mapping[str, Tensor], parameter: Tensor) -> bool:
    """Whether a state is spread over ranks as its parameter is."""
    exp_avg = state["exp_avg"]
    if is_dtensor(exp_avg) and is_dtensor(parameter):
        return exp_avg.device_mesh == parameter.device_mesh and exp_avg.placements == parameter.placements
    return is_dtensor(exp_avg) is is_dtensor(parameter)


def steps_taken(state: Mapping[str, Tensor]) -> int:
    """Steps that a parameter has taken; none without a state."""
    step = state.get("step")
    return 0 if step is None or step.is_meta else int(step)


def check_is_state(state_dict: object, *, is_wrapped: bool = False) -> None:
    """Check that what is loaded is a state of an optimizer at all.

    Args:
        state_dict: What is loaded.
        is_wrapped: Whether hooks of the user may still make a state of it.

    Raises:
        ValueError: It is not.
    """
    remedy = "give what the state_dict() of an optimizer returned"
    if not isinstance(state_dict, dict):
        raise ValueError(f"an optimizer state is a dict, not a {type(state_dict).__name__}; {remedy}")
    if is_wrapped:
        return
    state, groups = state_dict.get("state"), state_dict.get("param_groups")
    if not isinstance(state, Mapping) or not isinstance(groups, list | tuple):
        keys = ", ".join(map(repr, state_dict)) or "nothing"
        raise ValueError(f"an optimizer state has 'state', a dict, and 'param_groups', a list, not {keys}; {remedy}")
    if not all(isinstance(group, Mapping) and isinstance(group.get("params"), list | tuple) for group in groups):
        raise ValueError(f"each of the groups in an optimizer state has a list of 'params'; {remedy}")


def check_state(
    state_dict: Mapping[str, Any],
    param_groups: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    options: Iterable[str],
    *,
    saved_blocks: Sequence[Blocks],
) -> None:
    """Check that a saved state fits the parameters and their blocks, and that its groups have the same `options`.

    Args:
        state_dict: The saved state.
        param_groups: Groups of the optimizer.
        names: Names of its parameters, group after group.
        options: Hyperparameters that each saved group must have.
        saved_blocks: The blocks that say the shapes of each parameter's saved second moments.

    Raises:
        ValueError: With the first parameter that differs and what the state may come from.
    """
    check_is_state(state_dict)
    saved_groups = state_dict["param_groups"]
    saved_sizes = [len(group["params"]) for group in saved_groups]
    sizes = [len(group["params"]) for group in param_groups]
    if saved_sizes != sizes:
        raise ValueError(
            f"the optimizer state has groups of {saved_sizes} parameters, this optimizer has {sizes}: it belongs to "
            "another model, or to other parameter groups"
        )
    for number, (group, saved_group) in enumerate(zip(param_groups, saved_groups, strict=True)):
        if missing := [option for option in options if option in group and option not in saved_group]:
            raise ValueError(
                f"the optimizer state has groups without {', '.join(missing)}: it comes from another optimizer. "
                "Continue with the optimizer that saved it, or start the optimizer afresh from the weights alone"
            )
        try:
            check_group(saved_group)
        except ValueError as error:
            raise ValueError(f"group {number} of the optimizer state: {error}. {_DAMAGED}") from error
    parameters = [parameter for group in param_groups for parameter in group["params"]]
    numbers = [number for group in saved_groups for number in group["params"]]
    if extra := [number for number in state_dict["state"] if number not in set(numbers)]:
        raise ValueError(
            f"the optimizer state has a state of {extra[0]!r}, which is in none of its groups: it is not complete. "
            f"{_DAMAGED}"
        )
    states = [state_dict["state"].get(number) for number in numbers]
    for name, parameter, saved in zip(names, parameters, states, strict=True):
        if saved is not None and not isinstance(saved, Mapping):
            raise ValueError(f"the saved state of {name!r} is a {type(saved).__name__}, not a dict. {_DAMAGED}")
        if saved and isinstance(saved.get("exp_avg"), Tensor):
            _check_shape(name, "exp_avg", saved["exp_avg"], tuple(parameter.shape), "another model")
    check_partition(saved_groups, param_groups, names)
    signatures = saved_signatures(saved_groups)
    for name, parameter, saved, signature, blocks in zip(
        names, parameters, states, signatures, saved_blocks, strict=True
    ):
        if saved is not None:
            _check_parameter_state(saved, parameter, name, blocks)
        elif signature not in (None, NO_STATE) and parameter.requires_grad and parameter.numel():
            raise ValueError(f"the optimizer state has none of {name!r}: it is not complete. {_DAMAGED}")


def check_keys(saved: Mapping[str, Any], name: str, blocks: Blocks) -> None:
    """Check that the saved state of a parameter has all that this partition keeps.

    Raises:
        ValueError: It has not, or it has codes in the place of a first moment, without their scales.
    """
    expected = ("step", "exp_avg", *blocks.state_shapes)
    if not set(expected) <= saved.keys():
        raise ValueError(
            f"the saved state of {name!r} has the keys {', '.join(map(str, saved))}, but AdamMini with this "
            f"partition keeps {', '.join(expected)}: it comes from another optimizer or partition. Continue with the "
            "optimizer and partition that saved it, convert the state (`adam-mini convert`), or start the optimizer "
            "afresh from the weights alone"
        )

    is_codes = getattr(saved["exp_avg"], "dtype", None) is torch.uint8
    if is_codes is not ("exp_avg_scale" in saved):
        found, lost = ("8-bit codes", "no scales") if is_codes else ("scales", "no 8-bit codes")
        raise ValueError(
            f"the saved first moment of {name!r} has {found} and {lost}: the state is not complete. Load the state as "
            "it was saved, or start the optimizer afresh from the weights alone"
        )


def _laid_out_as(tensor: Tensor, values: Tensor) -> Tensor:
    """This rank's values of a tensor as a DTensor, where the tensor is one; both have its global shape and strides."""
    if not is_dtensor(tensor):
        return values
    from torch.distributed.tensor import DTensor

    mesh, placements = tensor.device_mesh, tensor.placements
    return DTensor.from_local(values, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


def _check_values(name: str, key: str, value: object, *, is_codes: bool) -> None:
    """Check that saved numbers are as training makes them: of a fitting dtype, finite, and no sums below zero."""
    tensor = saved_tensor(value) if key == "step" and isinstance(value, int | float) else value
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
        found = tensor.layout if isinstance(tensor, Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"the saved {key} of {name!r} is {found}, not a dense tensor. {_DAMAGED}")
    if not (tensor.is_floating_point() or is_codes or (key == "step" and tensor.dtype in _INTEGERS)):
        raise ValueError(f"the saved {key} of {name!r} is {tensor.dtype}, not a floating dtype. {_DAMAGED}")
    here = local(tensor.detach())
    if here.is_meta or is_codes or not here.numel():
        return
    if here.dtype.itemsize == 1:
        here = here.to(torch.float32)
    low, high = (float(bound) for bound in here.aminmax())
    wrong = ""
    if not (math.isfinite(low) and math.isfinite(high)):
        wrong = "numbers that are not finite"
    elif key != "exp_avg" and low < 0:
        wrong = "negative numbers"
    elif key == "step" and low != int(low):
        wrong = f"{low}, which is no number of steps"
    if wrong:
        raise ValueError(f"the saved {key} of {name!r} has {wrong}: it is damaged, or its run has diverged. {_DAMAGED}")


def _check_parameter_state(saved: Mapping[str, Any], parameter: Tensor, name: str, blocks: Blocks) -> None:
    check_keys(saved, name, blocks)
    expected: dict[str, tuple[int, ...]] = {"step": (), "exp_avg": tuple(parameter.shape), **blocks.state_shapes}
    if "exp_avg_scale" in saved:
        expected["exp_avg_scale"] = quantized.scale_shape(parameter.shape)
    for key, shape in expected.items():
        is_elementwise = key == "exp_avg_sq" and getattr(saved[key], "shape", None) == parameter.shape
        source = "AdamW, or from another partition" if is_elementwise else "another partition"
        _check_shape(name, key, saved[key], shape, source)
        _check_values(name, key, saved[key], is_codes=key == "exp_avg" and "exp_avg_scale" in saved)


def _check_shape(name: str, key: str, saved: object, shape: tuple[int, ...], source: str) -> None:
    saved_shape = tuple(getattr(saved, "shape", ()))
    if isinstance(saved, Tensor) and saved_shape != shape:
        raise ValueError(
            f"the saved {key} of {name!r} has shape {saved_shape}, but here it has {shape}: it comes from {source}."
            " Continue with the optimizer, model and partition that saved it, convert the state "
            "(`adam-mini convert`), or start the optimizer afresh from the weights alone"
        )


# The partition that a state was saved with


def partition_changes(
    saved_groups: Sequence[Mapping[str, Any]], own_groups: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> dict[str, tuple[str, str]]:
    """The saved and the present signature of each parameter whose block structure has changed.

    Args:
        saved_groups: `param_groups` of a saved state; groups without `partition`, of older states, are not compared.
        own_groups: `param_groups` of the optimizer.
        names: Names of the parameters, group after group.

    Raises:
        ValueError: Groups of other numbers of parameters.
    """
    signatures = saved_signatures(saved_groups)
    now = [signature for group in own_groups for signature in group["partition"].split("; ") if group["params"]]
    before = zip(names, signatures, now, strict=True)
    return {name: (old, new) for name, old, new in before if old is not None and old not in (new, NO_STATE)}


def saved_signatures(saved_groups: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """The signature of each parameter of a saved state, `NO_STATE` or, where the groups have none, None.

    Raises:
        ValueError: A group has another number of signatures than of parameters.
    """
    signatures: list[str | None] = []
    for number, group in enumerate(saved_groups):
        size, saved = len(group["params"]), group.get("partition")
        if saved is None or not size:
            signatures += [None] * size
            continue
        found = saved.split("; ") if isinstance(saved, str) else []
        if len(found) != size:
            raise ValueError(
                f"group {number} of the optimizer state has the blocks of {len(found)} parameters, here it has "
                f"{size}: it belongs to another model, or to other parameter groups"
            )
        signatures += found
    return signatures


def check_partition(
    saved_groups: Sequence[Mapping[str, Any]], own_groups: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> None:
    """Refuse a state that was saved with another partition.

    Args:
        saved_groups: `param_groups` of a saved state; groups without `partition`, of older states, are accepted.
        own_groups: `param_groups` of the optimizer.
        names: Names of the parameters, group after group.

    Raises:
        ValueError: With the parameters that differ, their saved and present blocks, and how to convert the state.
    """
    changes = partition_changes(saved_groups, own_groups, names)
    if not changes:
        return
    named = list(changes.items())[:_NUM_NAMED]
    listed = "; ".join(f"{name!r} has the blocks {old!r} in the state and {new!r} here" for name, (old, new) in named)
    more = f", and {len(changes) - _NUM_NAMED} more" if len(changes) > _NUM_NAMED else ""
    raise ValueError(
        f"the optimizer state has another partition: {listed}{more}. Continue with the partition that saved "
        "it, or convert the state: lightning_adam_mini.convert.repartition(state, optimizer), or `adam-mini convert`"
    )
