"""A parameter with all that a step needs of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_adam_mini.blocks import Blocks, Kind, wide_dtype
from lightning_adam_mini.optim.quantized import scale_shape
from lightning_adam_mini.optim.shards import Shard
from lightning_adam_mini.optim.stochastic_rounding import Rounding

__all__ = ["ParameterView", "check_memory", "extent", "lies_in_its_storage", "shares_own_memory"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass
class ParameterView:
    """A parameter, or this rank's part of it, with its gradient, its blocks and its state.

    A step may rely on this: the parts of a `ParameterView` fit each other, so that it fails before it has changed
    anything, or not at all.

    Args:
        param: The parameter.
        grad: Its gradient, of the same shape; None where this rank has none.
        shard: How it is cut; for a whole parameter, `Shard(blocks)`.
        step: Steps taken, a float32 tensor without dimensions.
        exp_avg: First moment, of the parameter's shape; codes where there are scales.
        moments: Second moments, one tensor for each of the state shapes of `shard.local_blocks`.
        exact: Sum squares themselves, as `Blocks.square_sums` says, and not squared norms.
        square_sums: Sums of squares of the gradient over all ranks, where blocks are split between ranks.
        exp_avg_scale: Scales of a first moment in 8 bits, as `quantized` says.
        rounding: The random bits of what is stored in bfloat16; None where it is rounded to nearest.
        name: Name of the parameter, for messages.

    Raises:
        ValueError: Parameter, gradient, blocks and state do not fit each other, as after another tensor of another
            shape was put in the place of one.
    """

    param: Tensor
    grad: Tensor | None
    shard: Shard
    step: Tensor
    exp_avg: Tensor
    moments: tuple[Tensor, ...]
    exact: bool = False
    square_sums: tuple[Tensor, ...] | None = None
    exp_avg_scale: Tensor | None = None
    rounding: Rounding | None = None
    name: str = "a parameter"

    def __post_init__(self) -> None:
        """Check that all parts fit each other."""
        check_memory(self.name, self.param, self.grad)
        if reason := self._misfit():
            raise ValueError(
                f"{self.name}: {reason}. Build the optimizer anew after changing a parameter, or load a state that fits"
            )

    def _misfit(self) -> str | None:
        """Why the parameter does not go with its blocks and state; None if it does."""
        param, frame = self.param, self.shard.local_blocks
        shape = tuple(param.shape)
        if not self.shard.fits(shape):
            return f"it has the shape {shape}, but its blocks are those of {frame.shape}"
        state = {"exp_avg": (self.exp_avg, shape)}
        assert len(self.moments) == len(frame.state_shapes)
        for moment, (key, expected) in zip(self.moments, frame.state_shapes.items(), strict=True):
            state[key] = (moment, expected)
        if self.exp_avg_scale is not None:
            state["exp_avg_scale"] = (self.exp_avg_scale, scale_shape(shape))
        for key, (tensor, expected) in state.items():
            if tensor.shape != expected:
                return f"{key} of its state has the shape {tuple(tensor.shape)}, and {expected} is right"
            if tensor.device != param.device:
                return f"{key} of its state is on {tensor.device}, and the parameter on {param.device}"
            dtypes = (torch.uint8,) if key == "exp_avg" and self.exp_avg_scale is not None else _DTYPES
            if problem := _memory_problem(tensor, dtypes, written=True):
                return f"{key} of its state {problem}"
        if self.step.numel() != 1 or not self.step.dtype.is_floating_point:
            return f"step of its state is no single number, but {self.step.dtype} of shape {tuple(self.step.shape)}"
        problem = _memory_problem(self.step, _DTYPES, written=True)
        return f"step of its state {problem}" if problem else None

    @property
    def is_plain(self) -> bool:
        """Whether the state is numbers that tensor operations update in place; else the update goes through slices."""
        return self.exp_avg_scale is None and self.rounding is None

    @property
    def blocks(self) -> Blocks:
        """How the part is cut that the second moments of this rank belong to."""
        return self.shard.local_blocks

    @property
    def is_whole(self) -> bool:
        """Whether the second moments, once expanded, broadcast against the parameter as it is."""
        return self.shard.boxes is None

    def local_square_sums(self) -> tuple[Tensor, ...]:
        """Sums of squares over this rank's part, in a dtype in which they are finite where their means are."""
        if self.grad is None:
            return tuple(torch.zeros_like(moment, dtype=wide_dtype(moment.device)) for moment in self.moments)
        return self.shard.square_sums(self.grad, exact=self.exact)

    def mean_square(self) -> tuple[Tensor, ...]:
        """Means of the squares of the gradient over the blocks, whole on this rank or not, as the second moments."""
        means = self.blocks.means(*(self.square_sums or self.local_square_sums()))
        return tuple(mean.to(moment.dtype) for mean, moment in zip(means, self.moments, strict=True))

    def pieces(self, scale: float | Tensor, eps: float) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Pieces of the parameter and of its first moment with their denominators `root / scale + eps`."""
        if self.is_whole or self.blocks.kind is not Kind.FACTORED:
            denom = self.blocks.root_second_moment(*self.moments).div_(scale).add_(eps)
            yield from self.split(denom)
            return
        for box, root in self.shard.factored_roots(self.moments):
            yield box.view(self.param), box.view(self.exp_avg), root.div_(scale).add_(eps)

    def split(self, denom: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Pieces of the parameter and of its first moment with what broadcasts against them of `denom`."""
        if self.shard.boxes is None:
            yield self.param, self.exp_avg, denom
            return
        for box in self.shard.boxes:
            yield box.view(self.param), box.view(self.exp_avg), box.within(denom)


def check_memory(name: str, param: Tensor, grad: Tensor | None) -> None:
    """Check that the memory of a parameter can be moved by that of a gradient.

    Args:
        name: Its name, for messages.
        param: The parameter, or this rank's part of it.
        grad: Its gradient, laid out as the parameter is; None for the parameter alone.

    Raises:
        ValueError: One has another layout or dtype than optimizers take, or less memory than its shape needs; the
            gradient has another shape or device than the parameter, or elements of the parameter share memory.
    """
    if problem := _memory_problem(param, _DTYPES, written=True):
        raise ValueError(f"{name}: the parameter {problem}; give it a tensor of its own, such as data.clone()")
    if grad is None:
        return
    if problem := _memory_problem(grad, _DTYPES):
        raise ValueError(f"{name}: its gradient {problem}; give it a dense gradient, or None")
    if grad.shape != param.shape or grad.device != param.device:
        raise ValueError(
            f"{name}: the parameter has the shape {tuple(param.shape)} on {param.device}, but its gradient "
            f"{tuple(grad.shape)} on {grad.device}; set the gradient to None after changing a parameter"
        )


def _memory_problem(tensor: Tensor, dtypes: tuple[torch.dtype, ...], *, written: bool = False) -> str | None:
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
    """Whether there is memory for all elements: a storage may have been resized."""
    if not (tensor.is_cpu or tensor.is_cuda) or not tensor.numel():
        return True
    return bool((tensor.storage_offset() + extent(tensor)) * tensor.itemsize <= tensor.untyped_storage().nbytes())


def extent(tensor: Tensor) -> int:
    """Elements of memory from the first to the last of a tensor, gaps and all."""
    if tensor.is_contiguous() or not tensor.numel():
        return tensor.numel()
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def shares_own_memory(tensor: Tensor) -> bool:
    """Whether elements of a tensor may lie on each other: no slice or permutation of a dense one has any that do."""
    if tensor.is_contiguous() or not tensor.numel():
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False
