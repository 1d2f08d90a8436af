"""Checks of the formats in which first moments and parameters are stored: each message names the remedy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_adam_mini.optim.distributed import is_dtensor, is_flattened
from lightning_adam_mini.optim.quantized import check_placements, has_codes

__all__ = ["check_exp_avg_dtype", "check_format", "check_rounds_something"]

_ROUNDED = (torch.float32, torch.bfloat16)


def check_exp_avg_dtype(exp_avg_dtype: object, *, stochastic_rounding: bool = False) -> None:
    """Check the dtype of first moments.

    Raises:
        ValueError: No dtype that first moments can have, or none that stochastic rounding goes with.
    """
    if exp_avg_dtype is None or exp_avg_dtype is torch.uint8:
        return
    if not (isinstance(exp_avg_dtype, torch.dtype) and exp_avg_dtype.is_floating_point):
        raise ValueError(
            f"exp_avg_dtype must be a floating dtype, such as torch.bfloat16, torch.uint8 for 8 bits, or None, not "
            f"{exp_avg_dtype!r}"
        )
    if stochastic_rounding and exp_avg_dtype not in _ROUNDED:
        raise ValueError(
            f"stochastic_rounding takes first moments in float32, bfloat16 or uint8, not {exp_avg_dtype}; choose one "
            "of these, or leave stochastic_rounding out"
        )


def check_format(
    name: str,
    parameter: Tensor,
    shape: Sequence[int],
    *,
    exp_avg_dtype: torch.dtype | None,
    stochastic_rounding: bool,
) -> None:
    """Check that a parameter can be stored as asked.

    Args:
        name: Its name.
        parameter: The parameter, or this rank's part of it.
        shape: Shape of the whole parameter.
        exp_avg_dtype: As for `AdamMini`.
        stochastic_rounding: As for `AdamMini`.

    Raises:
        ValueError: It is sharded so that groups of 8-bit codes are split, or has a dtype that is not rounded.
    """
    if stochastic_rounding and parameter.dtype not in _ROUNDED:
        raise ValueError(
            f"{name}: stochastic_rounding takes parameters in float32 or bfloat16, not {parameter.dtype}; train with "
            "bfloat16 parameters (model.bfloat16(), or precision bf16-true), or leave stochastic_rounding out"
        )
    if exp_avg_dtype is not torch.uint8 or not has_codes(shape):
        return
    if is_dtensor(parameter):
        check_placements(name, parameter)
    elif is_flattened(parameter) and tuple(parameter.shape) != tuple(shape):
        raise ValueError(
            f"{name}: the first FSDP flattens this parameter, which splits the groups of elements that 8-bit first "
            "moments share a scale in; take exp_avg_dtype=torch.bfloat16, or shard the model with fully_shard (FSDP2)"
        )


def check_rounds_something(dtypes: Iterable[torch.dtype]) -> None:
    """Check that stochastic rounding has something to round.

    Args:
        dtypes: Dtypes of all parameters and first moments.

    Raises:
        ValueError: None is bfloat16.
    """
    if torch.bfloat16 not in set(dtypes):
        raise ValueError(
            "stochastic_rounding rounds what is stored in bfloat16, and no parameter or first moment is: train with "
            "bfloat16 parameters (model.bfloat16() before the optimizer is built, or precision bf16-true), take "
            "exp_avg_dtype=torch.bfloat16, or leave stochastic_rounding out"
        )
