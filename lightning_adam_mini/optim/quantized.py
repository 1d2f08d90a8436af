"""8-bit first moments: a code per element and a float32 scale per 128 elements; and the checks of stored formats.

Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization": each group of elements is divided by its largest
magnitude (Sec. 2.1), and what is left, in [-1, 1], becomes the nearest of 256 values (Sec. 1.3, dynamic tree
quantization). A value has a sign, a power of ten from 1e-6 to 1, and for the power `10^-e` one of `2^(6-e)` fractions,
the middles of equal parts of [0.1, 1]; 0 and 1 are values of their own. So small elements of a group keep a relative
precision, and zero is exact.

Groups run along the flattened axes behind axis 0: a slice of axis 0 has its own, the last of which may be shorter. They
do not depend on how axis 0 is sharded or on the order in memory.

    scale = max |m| over the group                          float32
    code  = the smallest c with m / scale <= middle[c]      middle[c] = (value[c] + value[c + 1]) / 2, float32
    m     = value[code] * scale

A group of zeros has the scale 0. A group with an element that is not finite decodes to values that are not finite, so
that a diverging run stays visible.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_adam_mini.optim.distributed import is_dtensor, is_flattened, local
from lightning_adam_mini.optim.shards import Box, split, whole_box

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = [
    "GROUP_SIZE",
    "MIN_ELEMENTS",
    "ZERO_CODE",
    "bins",
    "check_exp_avg_dtype",
    "check_format",
    "check_rounds_something",
    "decode",
    "decode_tensor",
    "encode",
    "encode_tensor_",
    "has_codes",
    "init_scale",
    "read",
    "scale_shape",
    "values",
    "write_",
]

GROUP_SIZE = 128
"""Elements that share a scale."""
MIN_ELEMENTS = 4096
"""Smaller tensors keep their dtype: biases and norm scales are few, and their momentum matters."""
ZERO_CODE = 127
"""The code of zero."""
_ROUNDED = (torch.float32, torch.bfloat16)
"""Dtypes that stochastic rounding works on."""


def has_codes(shape: Sequence[int]) -> bool:
    """Whether the first moment of a parameter of a global `shape` is kept in 8 bits: a matrix that is not small."""
    return len(shape) >= 2 and math.prod(shape) >= MIN_ELEMENTS


def scale_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Shape of the scales of a tensor: slices of axis 0, and groups in a slice."""
    return shape[0], -(-math.prod(shape[1:]) // GROUP_SIZE)


@lru_cache(maxsize=16)
def values(device: torch.device | None = None) -> Tensor:
    """The 256 values of the codes in float32, in increasing order."""
    positive = [1.0]
    for power in range(7):
        parts = 2 ** (6 - power)
        positive += [(0.1 + 0.9 * (part + 0.5) / parts) * 10.0**-power for part in range(parts)]
    negative = [-value for value in positive if value != 1.0]
    return torch.tensor(sorted([*negative, 0.0, *positive]), dtype=torch.float32, device=device or "cpu")


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """The float32 values of codes.

    Args:
        codes: Rows of codes, uint8 of shape `(R, N)`.
        scale: Their scales, float32 of shape `(R, ceil(N / 128))`.

    Returns:
        A new tensor of shape `(R, N)`.
    """
    rows, width = codes.shape
    found = values(codes.device).index_select(0, codes.reshape(-1).to(torch.int32)).view(rows, width)
    whole = width // GROUP_SIZE
    if whole:
        head = found[:, : whole * GROUP_SIZE].unflatten(1, (whole, GROUP_SIZE))
        head.mul_(scale[:, :whole, None])
    if width % GROUP_SIZE:
        found[:, whole * GROUP_SIZE :].mul_(scale[:, whole:])
    return found


def encode(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of float32 rows of shape `(R, N)`: what `decode` takes."""
    height, width = rows.shape
    groups = F.pad(rows, (0, -width % GROUP_SIZE)).unflatten(1, (-1, GROUP_SIZE))
    scale = groups.abs().amax(2)
    divisor = torch.where(scale == 0, 1.0, scale)
    flat = (groups / divisor[:, :, None]).view(-1)
    first, middles = bins(rows.device)
    # Bit patterns with the same upper half lie between the same two middles, but for one middle among them.
    codes = first.index_select(0, flat.view(torch.int32).bitwise_right_shift(16).bitwise_and_(0xFFFF))
    codes += flat > middles.index_select(0, codes)
    return codes.to(torch.uint8).view(height, -1)[:, :width], scale


def read(codes: Tensor, scale: Tensor, box: Box) -> Tensor:
    """The float32 values of a slice.

    Args:
        codes: This rank's codes, of the shape of its part of the parameter.
        scale: This rank's scales.
        box: A slice that `split` made with `multiple=GROUP_SIZE`.

    Returns:
        A new tensor of the slice's shape.
    """
    return decode(box.view(codes).reshape(box.sizes[0], -1), _scales(scale, box)).view(box.sizes)


def write_(codes: Tensor, scale: Tensor, box: Box, numbers: Tensor) -> None:
    """Store float32 values of a slice, as `read` takes them."""
    new_codes, new_scale = encode(numbers.reshape(box.sizes[0], -1))
    box.view(codes).copy_(new_codes.reshape(box.sizes))
    _scales(scale, box).copy_(new_scale)


def decode_tensor(codes: Tensor, scale: Tensor) -> Tensor:
    """The float32 values of all codes, in the shape and the order in memory of `codes`."""
    numbers = torch.empty_like(codes, dtype=torch.float32)
    for box in split(whole_box(codes.shape), multiple=GROUP_SIZE):
        box.view(numbers).copy_(read(codes, scale, box))
    return numbers


def encode_tensor_(codes: Tensor, scale: Tensor, numbers: Tensor) -> None:
    """Store numbers of any floating dtype in codes of the same shape, and their scales."""
    for box in split(whole_box(codes.shape), multiple=GROUP_SIZE):
        write_(codes, scale, box, box.view(numbers).to(codes.device, torch.float32))


def init_scale(param: Tensor) -> Tensor:
    """The scales of a fresh first moment, zeros; of a DTensor one whose global shape any number of ranks has."""
    shape = scale_shape(param.shape)
    if not is_dtensor(param):
        return torch.zeros(shape, dtype=torch.float32, device=param.device)
    from torch.distributed.tensor import DTensor

    part = torch.zeros(scale_shape(local(param).shape), dtype=torch.float32, device=param.device)
    strides = (shape[1], 1)
    return DTensor.from_local(
        part, param.device_mesh, param.placements, run_check=False, shape=torch.Size(shape), stride=strides
    )


def _check_placements(name: str, param: DTensor) -> None:
    """Check that each rank has whole groups of a sharded parameter, so that its scales are sharded as it is.

    Args:
        name: Name of the parameter, for messages.
        param: The parameter.

    Raises:
        ValueError: A placement that splits groups.
    """
    from torch.distributed.tensor import Shard

    mesh = param.device_mesh
    columns = GROUP_SIZE * math.prod(mesh.size(i) for i, p in enumerate(param.placements) if p == Shard(1))
    for placement in param.placements:
        if placement.is_replicate() or getattr(placement, "dim", None) == 0:
            continue
        if placement == Shard(1) and param.dim() == 2 and param.shape[1] % columns == 0:
            continue
        raise ValueError(
            f"{name}: the placements {param.placements} of a parameter of shape {tuple(param.shape)} split the groups "
            f"of {GROUP_SIZE} elements that 8-bit first moments share a scale in; take exp_avg_dtype=torch.bfloat16"
        )


def _scales(scale: Tensor, box: Box) -> Tensor:
    """The scales of a slice, as a view."""
    inner = math.prod(box.sizes[2:])
    start = box.local[1] * inner // GROUP_SIZE
    count = -(-box.sizes[1] * inner // GROUP_SIZE)
    return scale.narrow(0, box.local[0], box.sizes[0]).narrow(1, start, count)


@lru_cache(maxsize=16)
def bins(device: torch.device) -> tuple[Tensor, Tensor]:
    """The least code of numbers by the upper 16 bits of their float32, and the middles between values, infinity last.

    A search among 255 middles takes ten times as long on the CPU.
    """
    table = values()
    middles = (table[:-1].double() + table[1:].double()).div_(2).float()
    upper = torch.arange(2**16, dtype=torch.int64, device="cpu")
    least = torch.where(upper < 2**15, upper << 16, (upper << 16) | 0xFFFF)  # of negative numbers, that of most bits
    first = torch.bucketize(_from_bits(least), middles).to(torch.int32)
    return first.to(device), torch.cat([middles, middles.new_full((1,), math.inf)]).to(device)


def _from_bits(bits: Tensor) -> Tensor:
    """Float32 numbers of 32 bits, given as int64."""
    signed = torch.where(bits < 2**31, bits, bits - 2**32)
    return signed.to(torch.int32).view(torch.float32)


# Checks of the formats in which first moments and parameters are stored


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
        _check_placements(name, parameter)
    elif is_flattened(parameter) and tuple(parameter.shape) != tuple(shape):
        raise ValueError(
            f"{name}: FSDP1 flattens this parameter, which splits the groups of elements that 8-bit first "
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
