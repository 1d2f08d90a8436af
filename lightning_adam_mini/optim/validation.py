"""Checks of what users hand to the optimizer: each raises one message that names the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_adam_mini.optim.sharding import is_flattened

__all__ = ["check_gradient", "check_group", "check_not_flat", "check_parameter"]


def check_group(group: dict[str, Any]) -> None:
    """Check the hyperparameters of a parameter group.

    Raises:
        ValueError: One of them is out of its range.
    """
    lr, eps, weight_decay, betas = group["lr"], group["eps"], group["weight_decay"], group["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor of one element, not a tensor of shape {tuple(lr.shape)}")
    if not 0.0 <= float(lr) < float("inf"):
        raise ValueError(f"lr must be a finite number of at least 0, not {float(lr)}")
    if not 0.0 <= eps < float("inf"):
        raise ValueError(f"eps must be a finite number of at least 0, not {eps}")
    if not 0.0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay must be a finite number of at least 0, not {weight_decay}")
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), not {tuple(betas)}")


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


def check_gradient(name: str, grad: Tensor) -> None:
    """Check that the optimizer can use a gradient.

    Raises:
        ValueError: It is sparse.
    """
    if grad.is_sparse:
        raise ValueError(f"{name}: sparse gradients are not supported; use nn.Embedding(..., sparse=False)")
