"""Blocks: how one tensor is cut into blocks whose elements share a second moment.

This is the vocabulary that the partition (which decides) and the optimizer (which computes) have in common. A `Blocks`
is a value: it knows shapes and nothing of modules, roles or gradients.

A tensor has one *cut axis* (its output neurons, tokens or channels; "rows" below, whichever dimension they lie on),
optional *batch axes* (experts) that every block keeps apart, and *reduced axes*, the rest. Along the cut axis rows come
in `segments`, each grouped into blocks of a number of rows: one row (an output neuron), a head's rows, or all of them.
A fused query-key-value matrix is one segment each for Q, K and V; where it interleaves them head by head, the sequence
of segments repeats.

Shapes: `R` rows on the cut axis, `C` the product of the reduced axes, `B` blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Blocks", "Kind", "Segment", "sum_square", "wide_dtype"]


class Kind(StrEnum):
    """What is kept of the squared gradients."""

    MEAN = "mean"
    """One mean a block (Adam-mini)."""
    ELEMENT = "element"
    """Every element, as in AdamW."""
    FACTORED = "factored"
    """A mean a row and a mean a column, whose product over the mean is a factored second moment (Adafactor, Sec. 3)."""


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of the cut axis that are grouped alike.

    Args:
        length: Number of rows in one repeat of the segment.
        block_size: Rows in a block. It divides `length`, or it is `length` times the repeats: then one block spans all
            repeats of the segment.
    """

    length: int
    block_size: int


@dataclass(frozen=True)
class Blocks:
    """How a tensor of `shape` is cut. Build one through `element`, `whole`, `rows`, `segmented` or `factored`.

    Args:
        shape: Shape of the tensor.
        kind: What is kept of the squared gradients.
        axis: The axis of the blocks; None where a block spans all of it (`whole`) or nothing is shared (`element`).
        batch_axes: Axes that every block keeps apart, before the cut axis.
        segments: Rows along the cut axis, in order; empty without a cut axis.
        repeats: How often the sequence of segments repeats along the cut axis.

    Raises:
        ValueError: The segments do not add up to the cut axis, or a block size does not divide its segment.
    """

    shape: tuple[int, ...]
    kind: Kind
    axis: int | None = None
    batch_axes: tuple[int, ...] = ()
    segments: tuple[Segment, ...] = ()
    repeats: int = 1

    def __post_init__(self) -> None:
        """Check that the segments tile the cut axis."""
        if self.axis is None:
            return
        if not 0 <= self.axis < len(self.shape) or any(not 0 <= a < self.axis for a in self.batch_axes):
            raise ValueError(f"axis {self.axis} with batch axes {self.batch_axes} does not fit the shape {self.shape}")
        rows = self.repeats * sum(segment.length for segment in self.segments)
        if rows != self.shape[self.axis]:
            raise ValueError(f"segments cover {rows} rows, but dimension {self.axis} of {self.shape} has another size")
        for segment in self.segments:
            if not self._spans_repeats(segment) and segment.length % max(segment.block_size, 1):
                raise ValueError(f"blocks of {segment.block_size} rows do not divide the {segment.length} rows given")

    @classmethod
    def element(cls, shape: torch.Size | tuple[int, ...]) -> Blocks:
        """Every element is a block of its own: AdamW."""
        return cls(tuple(shape), Kind.ELEMENT)

    @classmethod
    def whole(cls, shape: torch.Size | tuple[int, ...], *, batch_axes: tuple[int, ...] = ()) -> Blocks:
        """The whole tensor, or each slice of its batch axes, is one block."""
        return cls(tuple(shape), Kind.MEAN, batch_axes=batch_axes)

    @classmethod
    def rows(
        cls,
        shape: torch.Size | tuple[int, ...],
        *,
        axis: int = 0,
        block_size: int = 1,
        batch_axes: tuple[int, ...] = (),
    ) -> Blocks:
        """Blocks of `block_size` rows: an output neuron or token (1), or a head (`head_dim`)."""
        return cls.segmented(shape, (Segment(shape[axis], block_size),), axis=axis, batch_axes=batch_axes)

    @classmethod
    def segmented(
        cls,
        shape: torch.Size | tuple[int, ...],
        segments: tuple[Segment, ...],
        *,
        axis: int = 0,
        repeats: int = 1,
        batch_axes: tuple[int, ...] = (),
    ) -> Blocks:
        """Segments with block sizes of their own, as in a fused query-key-value matrix."""
        return cls(tuple(shape), Kind.MEAN, axis, batch_axes, segments, repeats)

    @classmethod
    def factored(
        cls,
        shape: torch.Size | tuple[int, ...],
        *,
        axis: int = 0,
        batch_axes: tuple[int, ...] = (),
        segment_lengths: tuple[int, ...] = (),
        repeats: int = 1,
    ) -> Blocks:
        """A row mean and a column mean; each segment (Q, K, V of a fused matrix) has columns of its own."""
        lengths = segment_lengths or (shape[axis],)
        segments = tuple(Segment(length, length * repeats) for length in lengths)
        return cls(tuple(shape), Kind.FACTORED, axis, batch_axes, segments, repeats)

    @cached_property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each second-moment tensor by its state key; each broadcasts once `second_moment` expands it."""
        if self.kind is Kind.ELEMENT:
            return {"exp_avg_sq": self.shape}
        if self.kind is Kind.MEAN:
            return {"exp_avg_sq": self._kept_shape(sum(self._num_blocks(s) for s in self.segments))}
        assert self.axis is not None
        columns = list(self.shape)
        columns[self.axis] = len(self.segments)
        return {"exp_avg_sq_row": self.row_shape, "exp_avg_sq_col": tuple(columns)}

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one value a row: `shape` with size 1 on the reduced axes."""
        return self._kept_shape(1 if self.axis is None else self.shape[self.axis])

    @cached_property
    def cuts_rows(self) -> bool:
        """Whether every block is one row."""
        return self.kind is Kind.MEAN and bool(self.segments) and all(s.block_size == 1 for s in self.segments)

    @property
    def signature(self) -> str:
        """The cut in a few characters, without the sizes of reduced axes: what a saved state must agree with.

        `element`, or the kind, the batch axes, the cut axis and for each segment `rows/rows in a block`: `mean b0 a1
        64/8 32/1 x4` has experts on axis 0 and four repeats of two segments on axis 1.
        """
        if self.kind is Kind.ELEMENT:
            return self.kind.value
        parts = [self.kind.value, *(f"b{axis}" for axis in self.batch_axes)]
        if self.axis is not None:
            parts += [f"a{self.axis}", *(f"{s.length}/{s.block_size}" for s in self.segments)]
            parts += [f"x{self.repeats}"] if self.repeats > 1 else []
        return " ".join(parts)

    @property
    def num_values(self) -> int:
        """Number of second-moment values that are kept; for `Kind.MEAN`, the number of blocks."""
        return sum(math.prod(shape) for shape in self.state_shapes.values())

    def num_bytes(self, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of the kept second moment in `dtype`."""
        return self.num_values * dtype.itemsize

    def block_index(self) -> Tensor:
        """The number of the block each element belongs to, in the order of the flattened `exp_avg_sq`.

        Returns:
            An int64 tensor of `shape`.

        Raises:
            ValueError: A factored second moment has no blocks.
        """
        if self.kind is Kind.FACTORED:
            raise ValueError("a factored cut shares a row mean and a column mean: it has no blocks to number")
        (state_shape,) = self.state_shapes.values()
        numbers = torch.arange(math.prod(state_shape), device="cpu").view(state_shape)
        return self.expand_rows(numbers).expand(self.shape)

    def mean_square(self, tensor: Tensor, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """Means of the squares: one a block, or one a row and one a column.

        They are right to 1e-6 whatever the size of a block, and finite where the means are: sums are in float64. No
        temporary of the tensor's size is made for `Kind.MEAN` and `Kind.FACTORED`.

        Args:
            tensor: A tensor of `shape`, of any floating dtype.
            dtype: Dtype of the result; float64 has squares in float64 too.

        Returns:
            One tensor for each of `state_shapes`.
        """
        sums = self.square_sums(tensor, exact=dtype is torch.float64)
        return tuple(mean.to(dtype) for mean in self.means(*sums))

    def square_sums(self, tensor: Tensor, *, exact: bool = False) -> tuple[Tensor, ...]:
        """Sums of the squares, where `mean_square` has means: sums of parts of a tensor add up to those of the whole.

        Args:
            tensor: A tensor of `shape`, of any floating dtype.
            exact: Square in float64 too, which is slower.

        Returns:
            One tensor for each of `state_shapes`, in `wide_dtype`.
        """
        if self.kind is Kind.ELEMENT:
            return (tensor.to(wide_dtype(tensor.device)).square(),)
        row_sums = sum_square(tensor, self._reduced_axes, exact=exact)
        if self.kind is Kind.MEAN:
            return (row_sums if self._keeps_rows else self.block_sums(row_sums),)
        assert self.axis is not None
        columns = [
            sum_square(part, axes, exact=exact).reshape(self._column_shape()) for _, part, axes in self._parts(tensor)
        ]
        return row_sums, torch.cat(columns, self.axis)

    def row_square_sums(self, tensor: Tensor, *, exact: bool = False) -> Tensor:
        """Sums of the squares over the reduced axes, which stay with size 1; `tensor` may be any part of the whole."""
        return sum_square(tensor, self._reduced_axes, exact=exact)

    def row_sums(self, tensor: Tensor, *, dtype: torch.dtype) -> Tensor:
        """Sums over the reduced axes, which stay with size 1, in `dtype`; of a cut into blocks."""
        axes = self._reduced_axes
        return tensor.sum(axes, keepdim=True, dtype=dtype) if axes else tensor.to(dtype)

    def block_sums(self, row_sums: Tensor) -> Tensor:
        """Sums a block from sums a row: `(..., R, ...)` to `(..., B, ...)`, segment after segment."""
        if self._keeps_rows:
            return row_sums
        assert self.axis is not None
        sums = []
        for segment, part, axes in self._parts(row_sums):
            if self._spans_repeats(segment):
                sums.append(part.sum(axes).unsqueeze(self.axis))
            else:
                grouped = part.unflatten(self.axis + 1, (-1, segment.block_size))
                sums.append(grouped.sum(self.axis + 2).flatten(*axes))
        return sums[0] if len(sums) == 1 else torch.cat(sums, self.axis)

    def means(self, *sums: Tensor) -> tuple[Tensor, ...]:
        """Divide sums, one tensor for each of `state_shapes`, by the numbers of elements they were taken over."""
        if self.kind is Kind.ELEMENT:
            return sums
        width, sizes, counts = self._counts
        if self.kind is Kind.MEAN:
            return (sums[0] / width if self._keeps_rows else _divide(sums[0], self.axis, sizes, counts),)
        rows, columns = sums
        return rows / width, _divide(columns, self.axis, sizes, counts)

    def second_moment(self, *moments: Tensor) -> Tensor:
        """Expand kept moments so that they broadcast against the tensor.

        Args:
            *moments: One tensor for each of `state_shapes`.

        Returns:
            For `Kind.MEAN` one value a row, of size 1 on the reduced axes; else a tensor of `shape`. For
            `Kind.FACTORED` it is `row * column / mean(row)`, Adafactor's estimate (Shazeer and Stern 2018, Alg. 1).
        """
        return self._product(self.factors(*moments))

    def root_second_moment(self, *moments: Tensor) -> Tensor:
        """The square root of `second_moment`, as a new tensor; roots are taken before anything is expanded."""
        if self.kind is Kind.FACTORED:
            return self._product([factor.sqrt() for factor in self.factors(*moments)])
        root = moments[0].sqrt()
        return root if self._keeps_rows or self.kind is Kind.ELEMENT else self.expand_rows(root)

    def factors(self, *moments: Tensor) -> Sequence[Tensor]:
        """Tensors whose product, expanded, is the second moment: the moments; or rows over their mean, and columns."""
        if self.kind is not Kind.FACTORED:
            return moments
        rows, columns = moments
        assert self.axis is not None
        wide, tiny = wide_dtype(rows.device), torch.finfo(rows.dtype).tiny
        normalised = [
            (part / part.mean(axes, keepdim=True, dtype=wide).clamp_min(tiny)).to(rows.dtype)
            for _, part, axes in self._parts(rows)
        ]
        return torch.cat(normalised, self.axis + 1).flatten(self.axis, self.axis + 1), columns

    def _product(self, factors: Sequence[Tensor]) -> Tensor:
        """Expand factors against the tensor and multiply them."""
        if self.kind is Kind.ELEMENT:
            return factors[0]
        if self.kind is Kind.MEAN:
            return self.expand_rows(factors[0])
        rows, columns = factors
        assert self.axis is not None
        if len(self.segments) == 1:
            return rows * columns
        products = [
            part * columns.narrow(self.axis, number, 1).unsqueeze(self.axis + 1)
            for number, (_, part, _) in enumerate(self._parts(rows))
        ]
        return torch.cat(products, self.axis + 1).flatten(self.axis, self.axis + 1)

    def _spans_repeats(self, segment: Segment) -> bool:
        return segment.block_size == segment.length * self.repeats

    def _num_blocks(self, segment: Segment) -> int:
        return 1 if self._spans_repeats(segment) else self.repeats * (segment.length // max(segment.block_size, 1))

    @cached_property
    def _reduced_axes(self) -> tuple[int, ...]:
        return tuple(a for a in range(len(self.shape)) if a != self.axis and a not in self.batch_axes)

    @cached_property
    def _keeps_rows(self) -> bool:
        """Whether one value per row is one value per block."""
        return self.axis is None or self.cuts_rows

    @cached_property
    def _counts(self) -> tuple[int, list[int], list[int]]:
        """Elements of a row; for each segment, how many values are kept, and the elements that each stands for."""
        width = max(math.prod(self.shape[a] for a in self._reduced_axes), 1)
        if self.kind is Kind.FACTORED:
            return width, [1] * len(self.segments), [max(s.length * self.repeats, 1) for s in self.segments]
        return (
            width,
            [self._num_blocks(s) for s in self.segments],
            [max(s.block_size * width, 1) for s in self.segments],
        )

    def _kept_shape(self, cut_size: int) -> tuple[int, ...]:
        """`shape` with the cut axis replaced by `cut_size` and the reduced axes by 1."""
        sizes = {a: self.shape[a] for a in self.batch_axes}
        if self.axis is not None:
            sizes[self.axis] = cut_size
        return tuple(sizes.get(a, 1) for a in range(len(self.shape)))

    def _column_shape(self) -> tuple[int, ...]:
        return tuple(1 if a == self.axis else size for a, size in enumerate(self.shape))

    def _parts(self, tensor: Tensor) -> list[tuple[Segment, Tensor, tuple[int, int]]]:
        """The rows of each segment, as views `(..., repeats, length, ...)`, with the two axes that hold them."""
        assert self.axis is not None
        period = sum(segment.length for segment in self.segments)
        folded = tensor.unflatten(self.axis, (self.repeats, period))
        parts, start = [], 0
        for segment in self.segments:
            parts.append((segment, folded.narrow(self.axis + 1, start, segment.length), (self.axis, self.axis + 1)))
            start += segment.length
        return parts

    def expand_rows(self, blocks: Tensor) -> Tensor:
        """Repeat each block's value over its rows: `(..., B, ...)` to `(..., R, ...)`."""
        if self._keeps_rows:
            return blocks
        assert self.axis is not None
        rows, start = [], 0
        for segment in self.segments:
            count = self._num_blocks(segment)
            values = blocks.narrow(self.axis, start, count)
            start += count
            if self._spans_repeats(segment):
                target = [-1] * (values.dim() + 1)
                target[self.axis], target[self.axis + 1] = self.repeats, segment.length
                rows.append(values.unsqueeze(self.axis).expand(target))
            else:
                folded = values.unflatten(self.axis, (self.repeats, -1))
                rows.append(folded.repeat_interleave(segment.block_size, self.axis + 1))
        return torch.cat(rows, self.axis + 1).flatten(self.axis, self.axis + 1)


SMALL_ELEMENTS = 2**16
"""Elements that are squared in `wide_dtype` at once: the calls would cost more than they save."""
SLICE_ELEMENTS = 2**18
"""Elements that are squared at a time: a float32 temporary of 1 MiB, which stays in the cache."""


def _divide(tensor: Tensor, axis: int | None, sizes: Sequence[int], divisors: Sequence[int]) -> Tensor:
    """Divide consecutive parts of `tensor` along `axis` by a number each."""
    if len(set(divisors)) == 1:
        return tensor / divisors[0]
    assert axis is not None
    parts = [part / divisor for part, divisor in zip(tensor.split(list(sizes), axis), divisors, strict=True)]
    return torch.cat(parts, axis)


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums on a device: float64, so that they are finite wherever float32 means are."""
    return torch.float32 if device.type == "mps" else torch.float64  # which has no float64


def sum_square(tensor: Tensor, axes: tuple[int, ...], *, exact: bool = False) -> Tensor:
    """Sums of squares over `axes`, which stay with size 1, without a temporary of the tensor's size.

    Squares are in float32, a few of them are added there, and these sums in float64. On the CPU what overflows
    is summed anew in float64; elsewhere, where to look at it would wait for the device, a mean above about 1e35 may
    become infinite.

    Args:
        tensor: A tensor of any floating dtype.
        axes: What is summed over.
        exact: Square in float64 too, which is slower.

    Returns:
        Sums in `wide_dtype`; they are infinite or not a number where the tensor is.
    """
    wide = wide_dtype(tensor.device)
    if not axes:
        return tensor.to(wide).square()
    if tensor.numel() <= SMALL_ELEMENTS:
        if exact or not tensor.numel():
            return tensor.to(wide).square().sum(axes, keepdim=True)
        return torch.linalg.vector_norm(tensor, dim=axes, keepdim=True, dtype=wide).square_()
    if exact:
        return _sum_slices(tensor, axes, wide)
    narrow = torch.promote_types(tensor.dtype, torch.float32)
    sums = _sum_runs(tensor, axes, narrow)
    if sums is None:
        sums = _sum_slices(tensor, axes, narrow)
    if tensor.is_cpu and not bool(sums.isfinite().all()):
        return _sum_slices(tensor, axes, wide)
    return sums


RUN_LENGTH = 256
"""Squares that are added in float32 by one norm, which has eight or more partial sums: few enough for 1e-6."""
FEW_SLICES = 16
"""Squares that are added in float32 elementwise."""


def _run_length(width: int) -> int:
    """The length of runs, at most `RUN_LENGTH`, that a row is cut into; one that leaves no rest, if there is one."""
    count = -(-width // RUN_LENGTH)
    return next((width // n for n in range(count, 2 * count) if width % n == 0), RUN_LENGTH)


def _sum_runs(tensor: Tensor, axes: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """`sum_square` by norms of runs of elements that lie next to each other; None where they do not."""
    start = tensor.dim()
    while start - 1 in axes:
        start -= 1
    width = math.prod(tensor.shape[start:])
    if width == 1 or not tensor[(0,) * start].is_contiguous():
        return None
    runs = tensor.flatten(start) if start < tensor.dim() - 1 else tensor
    length = _run_length(width)
    whole = width // length * length
    parts = [runs[..., :whole].unflatten(-1, (-1, length))]
    parts += [runs[..., None, whole:]] if whole < width else []
    wide = wide_dtype(tensor.device)
    norms = [torch.linalg.vector_norm(part, dim=-1, dtype=dtype).to(wide) for part in parts]
    sums = sum(norm.square_().sum(-1) for norm in norms)
    assert isinstance(sums, Tensor)
    others = tuple(axis for axis in axes if axis < start)
    sums = sums.sum(others, keepdim=True) if others else sums
    return sums.view(*sums.shape, *[1] * (tensor.dim() - start))


def _sum_slices(tensor: Tensor, axes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`sum_square` by squares of slices in `dtype`; a few slices at a time are added elementwise."""
    axis = max(axes, key=lambda reduced: tensor.shape[reduced])
    length = max(1, SLICE_ELEMENTS * tensor.shape[axis] // tensor.numel())
    slices = tensor.split(length, axis)
    total: Tensor | None = None
    for number in range(0, len(slices), FEW_SLICES):
        first, *others = slices[number : number + FEW_SLICES]
        squares = first.to(dtype).square()
        for other in others:  # the last may be shorter
            part = other.to(dtype)
            squares.narrow(axis, 0, part.shape[axis]).addcmul_(part, part)
        sums = squares.sum(axes, keepdim=True).to(wide_dtype(tensor.device))
        total = sums if total is None else total.add_(sums)
    assert total is not None
    return total
