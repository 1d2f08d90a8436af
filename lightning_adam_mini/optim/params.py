"""What the optimizer is given: parameters, their names and groups, gradients, and the checks of all of these.

Every check raises one message that names the remedy.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal
from warnings import warn

import torch
from torch import Tensor

from lightning_adam_mini.optim.distributed import is_dtensor, is_flattened
from lightning_adam_mini.optim.stochastic_rounding import UNCOUNTED
from lightning_adam_mini.partition import ParameterPartition, Role

__all__ = [
    "WeightDecayPolicy",
    "check_gradient",
    "check_group",
    "check_memory",
    "check_not_flat",
    "check_parameter",
    "decay_groups",
    "decays",
    "extent",
    "lies_in_its_storage",
    "listed",
    "memory_problem",
    "named_parameters",
    "parameter_of",
    "shares_own_memory",
    "warn_user",
]

WeightDecayPolicy = Literal["matrices", "all"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes of parameters, gradients and moments."""
_INTERNAL = ("lightning_adam_mini", "torch")


# Parameters, names and groups


def parameter_of(entry: Tensor | tuple[str, Tensor]) -> Tensor:
    """The parameter of an entry that may be a pair of a name and a parameter."""
    return entry[1] if isinstance(entry, tuple) else entry


def listed(entries: Iterable[Any]) -> list[Any]:
    """Checked entries as lists, since they or the parameters of a group may come from a generator.

    Raises:
        ValueError: An entry is no parameter, pair or group, or groups are mixed with parameters.
    """
    if isinstance(entries, Tensor):
        entries = [entries]
    checked = [_checked(entry) for entry in entries]
    if len({isinstance(entry, dict) for entry in checked}) > 1:
        raise ValueError("AdamMini got parameters and groups; put the parameters in a group too, {'params': [...]}")
    return checked


def _checked(entry: Any) -> Any:
    match entry:
        case {"params": params}:
            return {**entry, "params": listed(params)}
        case Tensor() | (str(), Tensor()):
            return entry
    raise ValueError(
        "AdamMini takes a model, parameters, pairs of a name and a parameter, or groups {'params': [...]} of them, not "
        f"an entry of type {type(entry).__name__}"
    )


def named_parameters(entries: Iterable[Any], *, offset: int = 0) -> dict[str, Tensor]:
    """Parameters by name, from parameters, pairs or groups of them; parameters without a name are numbered.

    Raises:
        ValueError: Two parameters have the same name.
    """
    named: dict[str, Tensor] = {}
    for entry in entries:
        if isinstance(entry, dict):
            found = named_parameters(entry["params"], offset=offset + len(named))
        elif isinstance(entry, tuple):
            found = {entry[0]: entry[1]}
        else:
            found = {f"parameter {offset + len(named)}": entry}
        if twice := named.keys() & found.keys():
            raise ValueError(f"two parameters have the name {min(twice)!r}; give each a name of its own")
        named.update(found)
    return named


def decays(partition: ParameterPartition, policy: WeightDecayPolicy) -> bool:
    """Whether weight decay applies to a parameter.

    Args:
        partition: The parameter's role and blocks.
        policy: `matrices` excludes biases, norm scales and all other vectors and scalars, of whatever shape; `all`
            excludes nothing, as the AdamW baseline of the Adam-mini paper.
    """
    if policy == "all":
        return True
    shape, roles = partition.blocks.shape, partition.role.roles
    if Role.OTHER in roles:  # a class token of shape (1, 1, width) is a vector
        return sum(size > 1 for size in shape) >= 2
    return len(shape) >= 2 and Role.BIAS not in roles and Role.NORM not in roles


def decay_groups(
    parameters: Iterable[tuple[Tensor, ParameterPartition]], *, weight_decay: float, policy: WeightDecayPolicy
) -> list[dict[str, Any]]:
    """Split parameters into a group that decays and one that does not; an empty group is left out."""
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for parameter, partition in parameters:
        groups[decays(partition, policy)].append(parameter)
    rates = {True: weight_decay, False: 0.0}
    return [{"params": params, "weight_decay": rates[key]} for key, params in groups.items() if params]


# Checks of options, parameters and gradients


def check_group(group: Mapping[str, Any]) -> None:
    """Check the hyperparameters of a parameter group.

    Raises:
        ValueError: One of them is out of its range, or no number.
    """
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor of one element, not a tensor of shape {tuple(lr.shape)}")
    for option in ("lr", "eps", "weight_decay"):
        value = group[option]
        if not (_is_number(value) and 0.0 <= value < float("inf")):
            shown = float(value) if isinstance(value, Tensor) else value
            raise ValueError(f"{option} must be a finite number of at least 0, not {shown}")
    is_pair = isinstance(betas, Sequence | Tensor) and not isinstance(betas, str) and len(betas) == 2
    if not (is_pair and all(_is_number(beta) and 0.0 <= beta < 1.0 for beta in betas)):
        raise ValueError(f"betas must be two numbers in [0, 1), not {tuple(betas) if is_pair else betas}")
    for option in ("maximize", "capturable"):
        if not isinstance(group.get(option, False), bool):
            raise ValueError(f"{option} must be True or False, not {group[option]!r}")
    uncounted = group.get(UNCOUNTED, 0)
    if not isinstance(uncounted, int) or uncounted < 0:
        raise ValueError(f"{UNCOUNTED} must be a number of steps, not {uncounted!r}")


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, Real) and not isinstance(value, bool)


def check_parameter(name: str, parameter: Tensor) -> None:
    """Check that the optimizer can update a parameter.

    Raises:
        ValueError: It is complex.
    """
    if torch.is_complex(parameter):
        raise ValueError(f"{name}: complex parameters are not supported; train torch.view_as_real of it instead")


def check_not_flat(named: Mapping[str, Tensor]) -> None:
    """Check that no parameter is one that FSDP has flattened: only its wrapper knows the blocks.

    Raises:
        ValueError: One is.
    """
    for name, parameter in named.items():
        if is_flattened(parameter):
            raise ValueError(
                f"{name}: FSDP has flattened this parameter, which hides its blocks; pass the wrapped model to "
                "AdamMini, FullyShardedDataParallel(model, use_orig_params=True), or shard it with fully_shard (FSDP2)"
            )


def check_gradient(name: str, parameter: Tensor, grad: Tensor) -> None:
    """Check that the optimizer can use a gradient.

    Raises:
        ValueError: It is sparse or complex, or has another shape or device than its parameter, or is a DTensor where
            that is none.
    """
    if grad.layout is not torch.strided:
        raise ValueError(f"{name}: sparse gradients are not supported; use nn.Embedding(..., sparse=False)")
    if not grad.is_floating_point():
        raise ValueError(f"{name}: the gradient must be of a floating dtype, not {grad.dtype}")
    if grad.shape != parameter.shape:
        raise ValueError(
            f"{name}: the gradient has the shape {tuple(grad.shape)}, the parameter {tuple(parameter.shape)}: it was "
            "computed before the parameter changed; call zero_grad() and compute it again"
        )
    if grad.device != parameter.device:
        raise ValueError(
            f"{name}: the gradient is on {grad.device}, the parameter on {parameter.device}: it was computed before "
            "the parameter moved; call zero_grad() and compute it again"
        )
    if is_dtensor(grad) is not is_dtensor(parameter):
        which = "the gradient" if is_dtensor(grad) else "the parameter"
        raise ValueError(
            f"{name}: {which} alone is a DTensor; call zero_grad() and compute the gradient of the parameter as it is"
        )


def warn_user(message: str) -> None:
    """Warn at the line that called the library, skipping frames of torch in between."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INTERNAL:
        frame, level = frame.f_back, level + 1
    warn(message, stacklevel=level)


# Memory: what a kernel may go to by its address


def check_memory(name: str, param: Tensor, grad: Tensor | None) -> None:
    """Check that a step can read the memory of a gradient and write that of its parameter.

    Args:
        name: Its name, for messages.
        param: The parameter, or this rank's part of it.
        grad: Its gradient, sharded as the parameter is; None to check the parameter alone.

    Raises:
        ValueError: One of them has an unsupported layout or dtype, or less memory than its shape needs; the gradient
            has another shape or device than the parameter, or elements of the parameter share memory.
    """
    if problem := memory_problem(param, DTYPES, written=True):
        raise ValueError(f"{name}: the parameter {problem}; give it a tensor of its own, such as data.clone()")
    if grad is None:
        return
    if problem := memory_problem(grad, DTYPES):
        raise ValueError(f"{name}: its gradient {problem}; give it a dense gradient, or None")
    if grad.shape != param.shape or grad.device != param.device:
        raise ValueError(
            f"{name}: the parameter has the shape {tuple(param.shape)} on {param.device}, but its gradient "
            f"{tuple(grad.shape)} on {grad.device}; set the gradient to None after changing a parameter"
        )


def memory_problem(tensor: Tensor, dtypes: tuple[torch.dtype, ...], *, written: bool = False) -> str | None:
    """Why the memory of a tensor cannot be read, or written; None if it can."""
    if tensor.layout is not torch.strided:
        return f"has the layout {tensor.layout}, which is not dense"
    if tensor.dtype not in dtypes:
        return f"has the dtype {tensor.dtype}, and not one of {', '.join(map(str, dtypes))}"
    if not lies_in_its_storage(tensor):
        return f"has the shape {tuple(tensor.shape)}, but its storage is smaller"
    if written and shares_own_memory(tensor):
        return "has elements that share memory, as those of an expanded tensor do"
    return None


def lies_in_its_storage(tensor: Tensor) -> bool:
    """Whether the storage, which may have been resized, holds all elements."""
    if not (tensor.is_cpu or tensor.is_cuda) or not tensor.numel():
        return True
    return bool((tensor.storage_offset() + extent(tensor)) * tensor.itemsize <= tensor.untyped_storage().nbytes())


def extent(tensor: Tensor) -> int:
    """Elements of memory from the first to the last of a tensor, including gaps."""
    if tensor.is_contiguous() or not tensor.numel():
        return tensor.numel()
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def shares_own_memory(tensor: Tensor) -> bool:
    """Whether elements of a tensor may overlap in memory; those of a slice or permutation of a dense one never do."""
    if tensor.is_contiguous() or not tensor.numel():
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False
