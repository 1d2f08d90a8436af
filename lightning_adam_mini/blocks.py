"""Blocks: which elements of a tensor share a second moment.

The partition decides on a `Blocks` for each parameter, and the optimizer computes with it. A `Blocks` is a value: it
knows shapes, and nothing of modules, roles or gradients.

A tensor has a *block axis* (its output neurons, tokens or channels; called "rows" below, on whichever dimension they
are), optional *batch axes* (experts), whose slices never share a block, and *reduced axes*, all others. Rows come in
`segments`, and each segment is divided into blocks of a number of rows: one row (an output neuron), the rows of a head,
or all of them. A fused query-key-value matrix has one segment each for Q, K and V. If it interleaves them head by head,
the sequence of segments repeats.

Shapes: `R` rows on the block axis, `C` the product of the reduced axes, `B` blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Blocks", "Kind", "Segment", "sum_square", "wide_dtype"]


class Kind(StrEnum):
    """What is kept of the squared gradients."""

    MEAN = "mean"
    """One mean per block (Adam-mini)."""
    ELEMENT = "element"
    """Every element, as in AdamW."""
    FACTORED = "factored"
    """One mean per row and one per column: a factored second moment (Shazeer and Stern 2018, Adafactor, Sec. 3)."""


@dataclass(frozen=True)
class Segment:
    """Consecutive rows that are divided into blocks of equal size.

    Args:
        length: Number of rows in one repeat of the segment.
        block_size: Rows per block. It divides `length`, or it is `length` times the number of repeats: then one block
            spans all repeats of the segment.
    """

    length: int
    block_size: int


@dataclass(frozen=True)
class Blocks:
    """The block structure of a tensor. Build one with `element`, `whole`, `rows`, `segmented` or `factored`.

    Args:
        shape: Shape of the tensor.
        kind: What is kept of the squared gradients.
        axis: The block axis; None if a block spans the whole tensor (`whole`) or nothing is shared (`element`).
        batch_axes: Axes before the block axis whose slices never share a block.
        segments: Segments of the block axis, in order; empty without a block axis.
        repeats: How often the sequence of segments repeats along the block axis.

    Raises:
        ValueError: The segments do not add up to the block axis, or a block size does not divide its segment.
    """

    shape: tuple[int, ...]
    kind: Kind
    axis: int | None = None
    batch_axes: tuple[int, ...] = ()
    segments: tuple[Segment, ...] = ()
    repeats: int = 1

    def __post_init__(self) -> None:
        """Check that the segments tile the block axis."""
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
        """Every element is a block: AdamW."""
        return cls(tuple(shape), Kind.ELEMENT)

    @classmethod
    def whole(cls, shape: torch.Size | tuple[int, ...], *, batch_axes: tuple[int, ...] = ()) -> Blocks:
        """The whole tensor, or each slice along its batch axes, is one block."""
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
        """Segments with different block sizes, as in a fused query-key-value matrix."""
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
        """Row means and column means; each segment (Q, K, V of a fused matrix) has its own column means."""
        lengths = segment_lengths or (shape[axis],)
        segments = tuple(Segment(length, length * repeats) for length in lengths)
        return cls(tuple(shape), Kind.FACTORED, axis, batch_axes, segments, repeats)

    @cached_property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each second-moment tensor by its state key."""
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
        """Shape of one value per row: `shape` with size 1 on the reduced axes."""
        return self._kept_shape(1 if self.axis is None else self.shape[self.axis])

    @cached_property
    def has_row_blocks(self) -> bool:
        """Whether every block is one row."""
        return self.kind is Kind.MEAN and bool(self.segments) and all(s.block_size == 1 for s in self.segments)

    @property
    def signature(self) -> str:
        """The block structure in a few characters, without the sizes of reduced axes; saved states must agree with it.

        `element`, or the kind, the batch axes, the block axis and for each segment `rows/rows per block`: `mean b0 a1
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
        """Number of second-moment values; for `Kind.MEAN`, the number of blocks."""
        return sum(math.prod(shape) for shape in self.state_shapes.values())

    def num_bytes(self, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of the second moment in `dtype`."""
        return self.num_values * dtype.itemsize

    def block_index(self) -> Tensor:
        """The index of each element's block in the flattened `exp_avg_sq`.

        Returns:
            An int64 tensor of `shape`.

        Raises:
            ValueError: The second moment is factored.
        """
        if self.kind is Kind.FACTORED:
            raise ValueError(
                "a factored second moment has row and column means, and no blocks to number: take those of another "
                "partition, such as transformer"
            )
        (state_shape,) = self.state_shapes.values()
        numbers = torch.arange(math.prod(state_shape), device="cpu").view(state_shape)
        return self.expand_rows(numbers).expand(self.shape)

    def mean_square(self, tensor: Tensor, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """Means of the squares: one per block, or one per row and one per column.

        They are accurate to 1e-6 for blocks of any size, and finite whenever the means are, since sums are in float64.
        For `Kind.MEAN` and `Kind.FACTORED` there is no temporary of the tensor's size.

        Args:
            tensor: A tensor of `shape`, of any floating dtype.
            dtype: Dtype of the result; for float64, squares are in float64 too.

        Returns:
            One tensor for each of `state_shapes`.
        """
        sums = self.square_sums(tensor, exact=dtype is torch.float64)
        return tuple(mean.to(dtype) for mean in self.means(*sums))

    def square_sums(self, tensor: Tensor, *, exact: bool = False) -> tuple[Tensor, ...]:
        """Sums of the squares, one for each mean of `mean_square`; sums over parts of a tensor can be added.

        Args:
            tensor: A tensor of `shape`, of any floating dtype.
            exact: Square in float64 too, which is slower.

        Returns:
            One tensor for each of `state_shapes`, in `wide_dtype`.
        """
        if self.kind is Kind.ELEMENT:
            return (sum_square(tensor, ()),)
        row_sums = sum_square(tensor, self._reduced_axes, exact=exact)
        if self.kind is Kind.MEAN:
            return (row_sums if self._keeps_rows else self.block_sums(row_sums),)
        assert self.axis is not None
        columns = [sum_square(part, axes, exact=exact).squeeze(self.axis) for _, part, axes in self._parts(tensor)]
        return row_sums, torch.cat(columns, self.axis)

    def row_square_sums(self, tensor: Tensor, *, exact: bool = False) -> Tensor:
        """Sums of the squares over the reduced axes, which keep size 1; `tensor` may be any part of the whole."""
        return sum_square(tensor, self._reduced_axes, exact=exact)

    def row_sums(self, tensor: Tensor, *, dtype: torch.dtype) -> Tensor:
        """Sums of the elements over the reduced axes, which keep size 1, in `dtype`."""
        return tensor.sum(self._reduced_axes, keepdim=True, dtype=dtype) if self._reduced_axes else tensor.to(dtype)

    def block_sums(self, row_sums: Tensor) -> Tensor:
        """Sums per block from sums per row: `(..., R, ...)` to `(..., B, ...)`, segment after segment."""
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
        """Divide sums, one tensor for each of `state_shapes`, by the number of elements in each."""
        if self.kind is Kind.ELEMENT:
            return sums
        width, sizes, counts = self._counts
        if self.kind is Kind.MEAN:
            return (sums[0] / width if self._keeps_rows else _divide(sums[0], self.axis, sizes, counts),)
        rows, columns = sums
        return rows / width, _divide(columns, self.axis, sizes, counts)

    def second_moment(self, *moments: Tensor) -> Tensor:
        """Expand second moments so that they broadcast against the tensor.

        Args:
            *moments: One tensor for each of `state_shapes`.

        Returns:
            For `Kind.MEAN` one value per row, with size 1 on the reduced axes; otherwise a tensor of `shape`. For
            `Kind.FACTORED` it is `row * column / mean(row)`, Adafactor's estimate (Shazeer and Stern 2018, Alg. 1).
        """
        return self._product(self.factors(*moments), lambda normalised, columns, _: normalised * columns)

    def root_second_moment(self, *moments: Tensor) -> Tensor:
        """The root that a step divides by, as a new tensor: of `second_moment`, or of factors as in `floored_root`."""
        if self.kind is Kind.FACTORED:
            return self._product([factor.sqrt() for factor in self.factors(*moments)], floored_root)
        root = moments[0].sqrt()
        return root if self._keeps_rows or self.kind is Kind.ELEMENT else self.expand_rows(root)

    def factors(self, *moments: Tensor) -> Sequence[Tensor]:
        """The factors of `second_moment`: the moment itself, or rows over their mean, columns and rows."""
        if self.kind is not Kind.FACTORED:
            return moments
        rows, columns = moments
        assert self.axis is not None
        # Clamped, since rows that have only seen zeros have the mean zero. Their estimate is then zero, not NaN.
        wide, tiny = wide_dtype(rows.device), torch.finfo(rows.dtype).tiny
        normalised = [
            (part / part.mean(axes, keepdim=True, dtype=wide).clamp_min(tiny)).to(rows.dtype)
            for _, part, axes in self._parts(rows)
        ]
        return torch.cat(normalised, self.axis + 1).flatten(self.axis, self.axis + 1), columns, rows

    def _product(self, factors: Sequence[Tensor], combine: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Expand factors against the tensor; `combine` takes those of a factored second moment."""
        if self.kind is Kind.ELEMENT:
            return factors[0]
        if self.kind is Kind.MEAN:
            return self.expand_rows(factors[0])
        normalised, columns, rows = factors
        assert self.axis is not None
        if len(self.segments) == 1:
            return combine(normalised, columns, rows)
        parts = zip(self._parts(normalised), self._parts(rows), strict=True)
        products = [
            combine(part, columns.narrow(self.axis, number, 1).unsqueeze(self.axis + 1), own)
            for number, ((_, part, _), (_, own, _)) in enumerate(parts)
        ]
        return torch.cat(products, self.axis + 1).flatten(self.axis, self.axis + 1)

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

    def _spans_repeats(self, segment: Segment) -> bool:
        """Whether one block spans all repeats of a segment."""
        return segment.block_size == segment.length * self.repeats

    def _num_blocks(self, segment: Segment) -> int:
        return 1 if self._spans_repeats(segment) else self.repeats * (segment.length // max(segment.block_size, 1))

    # Computed once, since every step needs them.

    @cached_property
    def _reduced_axes(self) -> tuple[int, ...]:
        return tuple(a for a in range(len(self.shape)) if a != self.axis and a not in self.batch_axes)

    @cached_property
    def _keeps_rows(self) -> bool:
        """Whether sums per row are sums per block already."""
        return self.axis is None or self.has_row_blocks

    @cached_property
    def _counts(self) -> tuple[int, list[int], list[int]]:
        """Elements per row; for each segment, the number of blocks (or column means) and the elements of each."""
        width = max(math.prod(self.shape[axis] for axis in self._reduced_axes), 1)
        if self.kind is Kind.FACTORED:
            return width, [1] * len(self.segments), [max(s.length * self.repeats, 1) for s in self.segments]
        blocks = [self._num_blocks(s) for s in self.segments]
        return width, blocks, [max(s.block_size * width, 1) for s in self.segments]

    def _kept_shape(self, num_kept: int) -> tuple[int, ...]:
        """`shape` with size `num_kept` on the block axis and 1 on the reduced axes."""
        sizes = {a: self.shape[a] for a in self.batch_axes}
        if self.axis is not None:
            sizes[self.axis] = num_kept
        return tuple(sizes.get(a, 1) for a in range(len(self.shape)))

    def _parts(self, tensor: Tensor) -> list[tuple[Segment, Tensor, tuple[int, int]]]:
        """The rows of each segment as a view `(..., repeats, length, ...)`, with the two axes that hold them."""
        assert self.axis is not None
        period = sum(segment.length for segment in self.segments)
        folded = tensor.unflatten(self.axis, (self.repeats, period))
        parts, start = [], 0
        for segment in self.segments:
            parts.append((segment, folded.narrow(self.axis + 1, start, segment.length), (self.axis, self.axis + 1)))
            start += segment.length
        return parts


FLOOR = 0.3
"""Least second moment of an element in a step, in units of the smaller one of its row's and its column's mean."""


def floored_root(normalised: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """The root of a factored second moment, from roots that broadcast against each other, as a new tensor.

    One element that is far larger than the others raises the mean of all rows, so the product falls far below the
    second moments of all elements outside of its row and column, which would then move much too far. The smaller one of
    two means does not fall: it has not seen that element. In a matrix of rank one the floor matters only where row and
    column both are below three tenths of the average.

    Args:
        normalised: Roots of the rows over their mean.
        columns: Roots of the columns.
        rows: Roots of the rows.
    """
    return (normalised * columns).clamp_min_(torch.minimum(rows, columns).mul_(FLOOR**0.5))


def _divide(tensor: Tensor, axis: int | None, sizes: Sequence[int], divisors: Sequence[int]) -> Tensor:
    """Divide consecutive parts of `tensor` along `axis` by one number each."""
    if len(set(divisors)) == 1:
        return tensor / divisors[0]
    assert axis is not None
    parts = [part / divisor for part, divisor in zip(tensor.split(list(sizes), axis), divisors, strict=True)]
    return torch.cat(parts, axis)


# Sums of squares. A float32 sum over a large block would lose small squares, and float64 squares would take twice the
# time and memory. So float32 adds only a few squares one after the other, and float64 adds the sums of these.

SMALL_ELEMENTS = 2**16
"""Elements of a tensor that is squared in `wide_dtype` at once: for it, more calls would cost more than they save."""
RUN_LENGTH = 256
"""Squares that one float32 norm adds up, in eight or more partial sums: few enough for 1e-6."""
SLICE_ELEMENTS = 2**18
"""Elements that are squared at a time: a float32 temporary of 1 MiB, which stays in the cache."""
FEW_SLICES = 16
"""Slices whose squares are added up elementwise in float32."""


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums on a device: float64, in which they are finite whenever float32 means are."""
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def sum_square(tensor: Tensor, axes: tuple[int, ...], *, exact: bool = False) -> Tensor:
    """Sums of squares over `axes`, which keep size 1, without a temporary of the tensor's size.

    Squares and the sums of a few of them are in float32, sums of these in float64. On the CPU, sums that overflow are
    computed again in float64. On other devices, where checking would wait for the device, a mean above about 1e35 may
    become infinite.

    Args:
        tensor: A tensor of any floating dtype.
        axes: Axes to sum over; without any, the result is the squares.
        exact: Square in float64 too, which is slower.

    Returns:
        Sums in `wide_dtype`; they are infinite or NaN where the tensor is.
    """
    wide = wide_dtype(tensor.device)
    if not axes:
        return tensor.to(wide).square()
    if tensor.numel() <= SMALL_ELEMENTS:
        if exact or not tensor.numel():
            return tensor.to(wide).square().sum(axes, keepdim=True)
        return torch.linalg.vector_norm(tensor, dim=axes, keepdim=True, dtype=wide).square_()
    if exact:
        return _sum_slices(tensor, axes, wide, wide)
    narrow = torch.promote_types(tensor.dtype, torch.float32)
    sums = _sum_runs(tensor, axes, narrow, wide)
    if sums is None:
        sums = _sum_slices(tensor, axes, narrow, wide)
    if tensor.is_cpu and not bool(sums.isfinite().all()):
        return _sum_slices(tensor, axes, wide, wide)
    return sums


def _sum_runs(tensor: Tensor, axes: tuple[int, ...], narrow: torch.dtype, wide: torch.dtype) -> Tensor | None:
    """`sum_square` by norms of contiguous runs of elements; None if the reduced elements are not contiguous.

    A norm squares and adds in one pass, without a temporary.
    """
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
    norms = [torch.linalg.vector_norm(part, dim=-1, dtype=narrow).to(wide) for part in parts]
    sums = sum(norm.square_().sum(-1) for norm in norms)
    assert isinstance(sums, Tensor)
    others = tuple(axis for axis in axes if axis < start)
    sums = sums.sum(others, keepdim=True) if others else sums
    return sums.view(*sums.shape, *[1] * (tensor.dim() - start))


def _run_length(width: int) -> int:
    """The length of runs for `width` elements: at most `RUN_LENGTH`, and a divisor of `width` if it has a large one."""
    count = -(-width // RUN_LENGTH)
    return next((width // n for n in range(count, 2 * count) if width % n == 0), RUN_LENGTH)


def _sum_slices(tensor: Tensor, axes: tuple[int, ...], dtype: torch.dtype, wide: torch.dtype) -> Tensor:
    """`sum_square` by squares of slices in `dtype`; the squares of a few slices at a time are added elementwise."""
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
        sums = squares.sum(axes, keepdim=True).to(wide)
        total = sums if total is None else total.add_(sums)
    assert total is not None
    return total
