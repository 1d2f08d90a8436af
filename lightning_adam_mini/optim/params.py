"""Checks of what users hand to the optimizer: each raises one message that names the remedy."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any
from warnings import warn

import torch
from torch import Tensor

from lightning_adam_mini.optim.distributed import is_dtensor, is_flattened
from lightning_adam_mini.optim.stochastic_rounding import UNCOUNTED

_INTERNAL = ("lightning_adam_mini", "torch")

__all__ = ["check_gradient", "check_group", "check_not_flat", "check_parameter", "warn_user"]


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
    """Check that no parameter is one that FSDP has flattened, whose blocks only its wrapper tells.

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
    """Warn at the line that called the library, whatever of torch lies between."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INTERNAL:
        frame, level = frame.f_back, level + 1
    warn(message, stacklevel=level)
