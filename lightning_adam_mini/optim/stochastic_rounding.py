"""Stochastic rounding to bfloat16, with random bits that are a function of what is rounded.

A float32 number is between two numbers of bfloat16. It becomes the one farther from zero with a probability equal to
its distance from the other, in units of their spacing. What is stored is then right on average: a bfloat16 weight
follows steps far below half of its spacing, which rounding to nearest drops (Gupta et al. 2015, "Deep Learning with
Limited Numerical Precision", Sec. 3).

The bits come from a hash of the parameter's name, the step and the element, not from a generator. So a resumed run is
the same run, and nothing depends on how a parameter is sharded, in which slices or threads it is updated, or on the
device. All numbers are unsigned and of 32 bits, sums and products modulo 2^32:

    mix(x):  x ^= x >> 16;  x *= 0x7feb352d;  x ^= x >> 15;  x *= 0x846ca68b;  x ^= x >> 16

    seed  = crc32 of the parameter's name in UTF-8, without what wrappers add to it (`zlib.crc32`); past step 2^24,
            which float32 cannot count, of the name, a line feed and the number of steps since, in decimal digits
    a     = mix(mix(seed + 0x9e3779b9) ^ step)      the step that is being taken, 1 for the first
    b     = mix(a + (index >> 32))                  index of the element in the whole parameter in C order, 64 bits
    r     = mix(mix((index & 0xffffffff) ^ b) + a)
    noise = r & 0xffff for the parameter, r >> 16 for its first moment

    x     = the bits of the float32
    y     = (x + noise) & 0xffff0000, whose upper half is the bfloat16; NaN is not changed

`mix` is lowbias32, of Wellons, "Prospecting for Hash Functions" (2018), https://nullprogram.com/blog/2018/07/31.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_adam_mini.optim.distributed import local_positions
from lightning_adam_mini.optim.shards import Box

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["MAX_STEP", "UNCOUNTED", "Rounding", "dtensor_positions", "name_seed", "random_bits", "round_to_bfloat16"]

MAX_STEP = 2**24
"""Float32, as which torch's optimizers keep the step, cannot add one to it."""

UNCOUNTED = "steps_uncounted"
"""Key of a parameter group: its steps since some parameter was at `MAX_STEP`."""

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


@dataclass(frozen=True, eq=False)
class Rounding:
    """The random bits of the elements of one parameter on this rank.

    Args:
        seed: Of the parameter, `name_seed`.
        shape: Shape of the whole parameter; of a flattened range, that of the range.
        positions: For each axis, the global position of each local position (int64); None where the
            local tensor is the whole, or a range.
        start: Number of the first element of a flattened range.
    """

    seed: int
    shape: tuple[int, ...]
    positions: tuple[Tensor, ...] | None = None
    start: int = 0

    @cached_property
    def first(self) -> int | None:
        """Number of the first element, where those of the local tensor follow each other in the whole; else None."""
        if self.positions is None:
            return self.start
        rows, *others = self.positions
        if any(len(numbers) != size for numbers, size in zip(others, self.shape[1:], strict=True)):
            return None
        if not len(rows):
            return 0
        return int(rows[0]) * math.prod(self.shape[1:]) if bool((rows.diff() == 1).all()) else None

    def bits(self, box: Box, step: int | Tensor, device: torch.device) -> Tensor:
        """32 random bits for each element of a rectangle of the local tensor.

        Args:
            box: The rectangle.
            step: Number of the step, an int64 tensor where the host may not wait for the device.
            device: Where the result is.

        Returns:
            A new int32 tensor of the rectangle's shape.
        """
        is_long = self.start + math.prod(self.shape) > _MASK + 1
        return random_bits(self.seed, step, self.index(box, device), is_long=is_long)

    def index(self, box: Box, device: torch.device) -> Tensor:
        """Number of each element of a rectangle in the whole parameter, in C order (int64)."""
        offset, shape = (self.start, self.shape) if box.flat is None else (self.start + box.flat[0], box.flat[1])
        index = torch.full((), offset, dtype=torch.int64, device=device)
        for axis, (low, size) in enumerate(zip(box.local, box.sizes, strict=True)):
            if self.positions is None:
                numbers = torch.arange(low, low + size, device=device)
            else:
                numbers = self.positions[axis][low : low + size].to(device)
            stride = math.prod(shape[axis + 1 :])
            index = index + (numbers * stride).view(-1, *[1] * (len(shape) - axis - 1))
        return index


def name_seed(name: str, uncounted: int | None = None) -> int:
    """The seed of a parameter.

    Args:
        name: Its name.
        uncounted: Steps since `MAX_STEP`, if it is past that.
    """
    return zlib.crc32((name if uncounted is None else f"{name}\n{uncounted}").encode())


def random_bits(seed: int, step: int | Tensor, index: Tensor, *, is_long: bool = True) -> Tensor:
    """32 random bits for each element, as the module says.

    Args:
        seed: Of the parameter.
        step: Number of the step.
        index: Numbers of the elements (int64).
        is_long: Whether an index may have more than 32 bits.

    Returns:
        A new int32 tensor of the shape of `index`, with the bits of the unsigned numbers.
    """
    a = _mix(_mix((seed + _GOLDEN) & _MASK) ^ step)
    b = _mix((a + (index >> 32 if is_long else 0)) & _MASK)
    return _mix_(_mix_(_int32(index) ^ _int32(b)).add_(_int32(a)))


def round_to_bfloat16(numbers: Tensor, noise: Tensor) -> Tensor:
    """Round float32 numbers to bfloat16, away from zero where the dropped bits and the noise carry.

    Args:
        numbers: Float32 numbers; they are overwritten.
        noise: As many integers, of which the lower 16 bits count (int32).
    """
    # NaN alone has bits that may carry into the sign; a NaN that a cast makes is the same on every device.
    is_nan = numbers.isnan()
    bits = numbers.view(torch.int32)
    bits.add_(noise & 0xFFFF).bitwise_and_(-(2**16))
    return numbers.masked_fill_(is_nan, math.nan).to(torch.bfloat16)


def dtensor_positions(param: DTensor) -> tuple[Tensor, ...]:
    """For each axis, the global positions of this rank's part (int64, on the CPU)."""
    return tuple(local_positions(param, axis) for axis in range(param.dim()))


def _mix(x: int | Tensor) -> int | Tensor:
    """The hash lowbias32 of numbers below 2^32; those on the device are int64, whose products keep their lower half."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def _mix_(x: Tensor) -> Tensor:
    """`_mix` in place, of int32 with the bits of unsigned numbers: half of the time of int64."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(0x846CA68B - 2**32)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def _int32(x: int | Tensor) -> Any:
    """The lower 32 bits of a number, as a signed one."""
    return x.to(torch.int32) if isinstance(x, Tensor) else (x & _MASK) - ((x & 2**31) << 1)
