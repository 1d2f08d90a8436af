"""The update of Adam-mini: the text to read first.

Zhang et al., "Adam-mini: Use Fewer Learning Rates To Gain More" (2024), Algorithm 1: AdamW with one second moment for
each block `b` of a tensor,

    p   <- p - lr * weight_decay * p
    m   <- beta1 * m + (1 - beta1) * g
    v_b <- beta2 * v_b + (1 - beta2) * mean_b(g * g)
    p   <- p - lr * m_hat / (sqrt(v_hat_b) + eps)

with m_hat = m / (1 - beta1^t) and v_hat_b = v_b / (1 - beta2^t). `eps` stands outside the root, as in AdamW. A block of
one element is AdamW.

A factored second moment is a mean for each row and each column of a matrix; `floored_root` makes of them the root for
each element.

`reference_` says exactly this, one tensor at a time. The other forms do the same arithmetic in another order of memory:
`foreach_` on lists of tensors; `slices_` on large CPU tensors, slice by slice, so that a slice stays in the cache; and
`_rounded_slices_` on 8-bit first moments and on what is rounded stochastically. The kernels are in `kernels/`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor

from lightning_adam_mini.blocks import SMALL_ELEMENTS, Blocks, Kind, floored_root, wide_dtype
from lightning_adam_mini.optim import quantized
from lightning_adam_mini.optim.params import DTYPES, check_memory, memory_problem
from lightning_adam_mini.optim.shards import Box, Shard, intersect, split, whole_box
from lightning_adam_mini.optim.stochastic_rounding import Rounding, round_to_bfloat16

__all__ = [
    "ParameterView",
    "StepOptions",
    "Update",
    "accumulate_",
    "foreach_",
    "foreach_updates",
    "reference_",
    "slices_",
]


@dataclass(frozen=True)
class StepOptions:
    """The scalars of one step of a parameter group.

    Args:
        lr: Learning rate of this step; a tensor only if the step is capturable.
        beta1: Decay rate of the first moment.
        beta2: Decay rate of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay coefficient.
        maximize: Ascend instead of descend.
    """

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool = False

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> StepOptions:
        """The scalars of the next step of a parameter group."""
        lr = group["lr"] if group["capturable"] else float(group["lr"])
        beta1, beta2 = group["betas"]
        return cls(lr, beta1, beta2, group["eps"], group["weight_decay"], group["maximize"])

    @property
    def shrink(self) -> float | Tensor:
        """Factor of weight decay."""
        return 1 - self.lr * self.weight_decay

    @overload
    def step_size(self, step: float) -> float | Tensor: ...

    @overload
    def step_size(self, step: Tensor) -> Tensor: ...

    def step_size(self, step: float | Tensor) -> float | Tensor:
        """Learning rate over the bias correction of the first moment, at step 1, 2, ..."""
        return self.lr / (1 - self.beta1**step)

    @overload
    def root(self, step: float) -> float: ...

    @overload
    def root(self, step: Tensor) -> Tensor: ...

    def root(self, step: float | Tensor) -> float | Tensor:
        """Square root of the bias correction of the second moment, at step 1, 2, ..."""
        return (1 - self.beta2**step) ** 0.5


Update = Callable[[StepOptions], None]
"""Takes one step of the views that it was made for, with the gradients that they hold then."""


@dataclass
class ParameterView:
    """A parameter, or this rank's part of it, with its gradient, its blocks and its state.

    The parts of a view fit each other, so that an update which relies on one fails here, before it has changed
    anything, or not at all.

    Args:
        param: The parameter.
        grad: Its gradient, of the same shape; None where this rank has none.
        shard: Its block structure on this rank; for a whole parameter, `Shard(blocks)`.
        step: Steps taken, a float32 tensor without dimensions.
        exp_avg: First moment, of the parameter's shape; codes where there are scales.
        moments: Second moments, one tensor for each of the state shapes of `shard.local_blocks`.
        exact: Sum squares themselves, as `Blocks.square_sums` says, and not squared norms.
        square_sums: Sums of squares of the gradient over all ranks, where blocks are split between ranks.
        exp_avg_scale: Scales of an 8-bit first moment, as `quantized` says.
        rounding: The random bits of what is stored in bfloat16; None where it is rounded to nearest.
        name: Name of the parameter, for messages.

    Attributes:
        blocks: The blocks that the second moments of this rank belong to.
        is_whole: Whether the expanded second moments broadcast against the parameter as it is.
        is_plain: Whether the state is numbers that tensor operations update in place.

    Raises:
        ValueError: Parameter, gradient, blocks and state do not fit each other, as after a parameter was replaced by
            one of another shape.
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
    blocks: Blocks = field(init=False, repr=False)
    is_whole: bool = field(init=False, repr=False)
    is_plain: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check that all parts fit each other."""
        self.blocks, self.is_whole = self.shard.local_blocks, self.shard.boxes is None
        self.is_plain = self.exp_avg_scale is None and self.rounding is None
        check_memory(self.name, self.param, self.grad)
        if reason := self._misfit():
            raise ValueError(
                f"{self.name}: {reason}. Build the optimizer anew after changing a parameter, or load a state that fits"
            )

    def _misfit(self) -> str | None:
        """Why the parameter does not fit its blocks and state; None if it does."""
        param, shape = self.param, tuple(self.param.shape)
        if not self.shard.fits(shape):
            return f"it has the shape {shape}, but its blocks are those of {self.blocks.shape}"
        state = {"exp_avg": (self.exp_avg, shape)}
        assert len(self.moments) == len(self.blocks.state_shapes)
        for moment, (key, expected) in zip(self.moments, self.blocks.state_shapes.items(), strict=True):
            state[key] = (moment, expected)
        if self.exp_avg_scale is not None:
            state["exp_avg_scale"] = (self.exp_avg_scale, quantized.scale_shape(shape))
        for key, (tensor, expected) in state.items():
            if tensor.shape != expected:
                return f"{key} of its state has the shape {tuple(tensor.shape)}, and {expected} is right"
            if tensor.device != param.device:
                return f"{key} of its state is on {tensor.device}, and the parameter on {param.device}"
            dtypes = (torch.uint8,) if key == "exp_avg" and self.exp_avg_scale is not None else DTYPES
            if problem := memory_problem(tensor, dtypes, written=True):
                return f"{key} of its state {problem}"
        if self.step.numel() != 1 or not self.step.dtype.is_floating_point:
            return f"step of its state is no single number, but {self.step.dtype} of shape {tuple(self.step.shape)}"
        problem = memory_problem(self.step, DTYPES, written=True)
        return f"step of its state {problem}" if problem else None

    def local_square_sums(self) -> tuple[Tensor, ...]:
        """Sums of squares over this rank's part, in a dtype in which they are finite where their means are."""
        if self.grad is None:
            return tuple(torch.zeros_like(moment, dtype=wide_dtype(moment.device)) for moment in self.moments)
        return self.shard.square_sums(self.grad, exact=self.exact)

    def pieces(self, root: float | Tensor, eps: float) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        """Pieces of the parameter and of its first moment with their denominators `sqrt(v) / root + eps`."""
        if self.is_whole or self.blocks.kind is not Kind.FACTORED:
            denom = self.blocks.root_second_moment(*self.moments).div_(root).add_(eps)
            return [(self.param, self.exp_avg, denom)] if self.is_whole else self.split(denom)
        roots = self.shard.factored_roots(self.moments)  # one piece at a time: all have the size of the parameter
        return ((box.view(self.param), box.view(self.exp_avg), r.div_(root).add_(eps)) for box, r in roots)

    def split(self, denom: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Pieces of the parameter and of its first moment with the part of `denom` that broadcasts against them."""
        if self.shard.boxes is None:
            return [(self.param, self.exp_avg, denom)]
        return [(box.view(self.param), box.view(self.exp_avg), box.within(denom)) for box in self.shard.boxes]


# One tensor at a time


def reference_(views: Iterable[ParameterView], options: StepOptions, *, capturable: bool = False) -> None:
    """One step of Adam-mini, in place, one tensor at a time.

    Args:
        views: Parameters with their gradients, blocks and states.
        options: Scalars of this step.
        capturable: Keep all scalars on the parameters' device, so that CUDA graphs can capture the step.
    """
    for view in views:
        assert view.grad is not None
        view.step.add_(1)
        step = view.step if capturable else view.step.item()
        step_size, root = options.step_size(step), options.root(step)
        accumulate_(view, options.beta2)
        if not view.is_plain:
            _rounded_slices_(view, options, step_size, root)
            continue
        pieces = view.pieces(root, options.eps)
        _move_(view.param, view.grad, view.exp_avg, pieces, options, step_size if capturable else float(step_size))


def accumulate_(view: ParameterView, beta2: float) -> None:
    """Move the second moments of a parameter towards the mean squares of its gradient."""
    grad, blocks = view.grad, view.blocks
    assert grad is not None
    if blocks.kind is Kind.ELEMENT:  # as torch's AdamW to the last bit, and without a temporary
        view.moments[0].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        return
    sums = view.square_sums or (blocks if view.is_whole else view.shard).square_sums(grad, exact=view.exact)
    for moment, mean in zip(view.moments, blocks.means(*sums), strict=True):
        moment.mul_(beta2).add_(mean.to(moment.dtype), alpha=1 - beta2)
        if blocks.kind is Kind.FACTORED:  # an infinite mean of the rows would make all of them NaN
            moment.clamp_max_(torch.finfo(moment.dtype).max)


def _move_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    pieces: Iterable[tuple[Tensor, Tensor, Tensor]],
    options: StepOptions,
    step_size: float | Tensor,
) -> None:
    """Weight decay, the first moment, and the parameter, whose pieces come with their denominators."""
    if options.weight_decay != 0:
        param.mul_(options.shrink)
    exp_avg.lerp_((-grad if options.maximize else grad).to(exp_avg.dtype), 1 - options.beta1)
    for param_piece, exp_avg_piece, denom in pieces:
        if isinstance(step_size, Tensor):  # capturable: addcdiv_ takes numbers of the host alone
            param_piece.addcmul_(exp_avg_piece, step_size / denom, value=-1)
        else:
            param_piece.addcdiv_(exp_avg_piece, denom, value=-step_size)


# Large tensors of the CPU, slice by slice

SLICE_ELEMENTS = 2**19
"""Elements of a slice: three slices in float32 fit the cache of most CPUs, and the calls of one slice cost little."""


def slices_(views: Iterable[ParameterView], options: StepOptions) -> None:
    """One step of Adam-mini on large CPU tensors, in place: the quickest form that needs no compiler.

    Each operation reads and writes the memory of its operands. A whole tensor comes from main memory every time; a
    slice stays in the cache from the first operation to the last, and temporaries are no larger than a slice.

    Args:
        views: Parameters with their gradients, blocks and states, for which `_is_sliced` says yes.
        options: Scalars of this step, `lr` a number.
    """
    for view in views:
        assert view.grad is not None
        view.step.add_(1)
        step = view.step.item()
        step_size, root = float(options.step_size(step)), options.root(step)
        row_blocks = _blocks_within_rows(view)
        factors: Sequence[Tensor] = view.moments
        if row_blocks is None:
            accumulate_(view, options.beta2)
            factors = view.blocks.factors(*view.moments)
            if view.blocks.kind is Kind.MEAN:
                factors = [view.blocks.expand_rows(*factors)]
        rows = view.param.shape[0]
        length = max(1, SLICE_ELEMENTS * rows // view.param.numel())
        for start in range(0, rows, length):
            stop = min(start + length, rows)
            param, grad, exp_avg = view.param[start:stop], view.grad[start:stop], view.exp_avg[start:stop]
            own = [factor if factor.shape[0] == 1 else factor[start:stop] for factor in factors]
            if row_blocks is not None:
                shard = Shard(row_blocks(param.shape))
                accumulate_(ParameterView(param, grad, shard, view.step, exp_avg, (own[0],)), options.beta2)
            roots = [factor.sqrt() for factor in own]
            denom = (floored_root(*roots) if roots[1:] else roots[0]).div_(root).add_(options.eps)
            _move_(param, grad, exp_avg, [(param, exp_avg, denom)], options, step_size)


def _is_sliced(view: ParameterView) -> bool:
    """Whether slices are worth it, and a slice has denominators of its own."""
    blocks = view.blocks
    return (
        view.param.is_cpu
        and view.is_plain
        and view.param.dim() > 1
        and view.param.numel() > SLICE_ELEMENTS
        and view.is_whole
        and (blocks.kind is not Kind.FACTORED or len(blocks.segments) == 1)
    )


def _blocks_within_rows(view: ParameterView) -> Callable[[torch.Size], Blocks] | None:
    """The block structure of a slice where each block is within one row of axis 0; None where it is not."""
    blocks = view.blocks
    if blocks.kind is Kind.ELEMENT:
        return Blocks.element
    return Blocks.rows if blocks.has_row_blocks and blocks.axis == 0 and view.square_sums is None else None


# Lists of tensors

_ONE = torch.tensor(1.0, dtype=torch.float32, device="cpu")


def foreach_(views: Sequence[ParameterView], options: StepOptions) -> None:
    """One step of Adam-mini on many tensors, in place, through torch's foreach functions.

    Args:
        views: Parameters with their gradients, blocks and states.
        options: Scalars of this step, `lr` a number.
    """
    for update in foreach_updates(views):
        update(options)


def foreach_updates(views: Sequence[ParameterView]) -> list[Update]:
    """The updates of `foreach_`, which may be kept as long as the views are.

    Lists take small plain tensors. Large tensors of the CPU are updated slice by slice. Tensors whose denominators are
    as large as the parameter (factored second moments), and those whose state is not plain, are updated one at a time.
    """
    lists: dict[tuple[object, ...], list[ParameterView]] = defaultdict(list)
    single: list[ParameterView] = []
    sliced: list[ParameterView] = []
    for view in views:
        if _is_sliced(view):
            sliced.append(view)
        elif not view.is_plain or view.blocks.kind is Kind.FACTORED:
            single.append(view)
        else:
            assert view.grad is not None
            dtypes = (view.param.dtype, view.grad.dtype, view.exp_avg.dtype, view.moments[0].dtype)
            lists[view.param.device, *dtypes, view.blocks.kind, _is_small_block(view)].append(view)
    updates: list[Update] = []
    for members in lists.values():
        update = _small_blocks_ if _is_small_block(members[0]) else _foreach_list_
        updates.append(partial(update, ForeachList.of(members)))
    updates += [partial(slices_, sliced)] if sliced else []
    return updates + ([partial(reference_, single)] if single else [])


def _is_small_block(view: ParameterView) -> bool:
    """Whether a tensor is one small block on the CPU, whose second moment may be a number of the host."""
    is_block = view.blocks.kind is Kind.MEAN and view.blocks.num_values == 1
    is_number = view.param.is_cpu and view.param.dtype in (torch.float32, torch.float64)
    is_here = view.is_whole and view.square_sums is None and 0 < view.param.numel() <= SMALL_ELEMENTS
    return is_block and is_number and is_here and view.exp_avg.dtype == view.param.dtype


@dataclass(frozen=True)
class ForeachList:
    """Tensors of one device, dtype and kind of blocks that are updated together.

    Args:
        views: The tensors.
        params, exp_avgs, moments, steps: Their parts.
        is_whole: Whether none of them consists of rectangles.
    """

    views: list[ParameterView]
    params: list[Tensor]
    exp_avgs: list[Tensor]
    moments: list[Tensor]
    steps: list[Tensor]
    is_whole: bool

    @classmethod
    def of(cls, views: list[ParameterView]) -> ForeachList:
        """The list of these tensors."""
        moments = [view.moments[0] for view in views]
        params, exp_avgs = [view.param for view in views], [view.exp_avg for view in views]
        return cls(views, params, exp_avgs, moments, [v.step for v in views], all(v.is_whole for v in views))

    def next_step_(self, options: StepOptions) -> tuple[list[float], list[float]]:
        """Count a step; return the step size and the root of the second bias correction of each tensor."""
        # As in torch's optimizers: a number would become a tensor again for each step of the list.
        torch._foreach_add_(self.steps, 1 if self.steps[0].is_cuda else _ONE)
        steps = [step.item() for step in self.steps]
        scalars = {step: (float(options.step_size(step)), options.root(step)) for step in set(steps)}
        return [scalars[step][0] for step in steps], [scalars[step][1] for step in steps]

    def first_moments_(self, grads: list[Tensor], options: StepOptions) -> None:
        """Weight decay and the first moments."""
        if options.maximize:
            grads = list(torch._foreach_neg(grads))
        if grads[0].dtype != self.exp_avgs[0].dtype:
            grads = [grad.to(self.exp_avgs[0].dtype) for grad in grads]
        if options.weight_decay != 0:
            torch._foreach_mul_(self.params, options.shrink)
        torch._foreach_lerp_(self.exp_avgs, grads, 1 - options.beta1)


def _foreach_list_(tensors: ForeachList, options: StepOptions) -> None:
    """The lines of `reference_` on lists."""
    params, exp_avgs, views = tensors.params, tensors.exp_avgs, tensors.views
    grads: Any = [view.grad for view in views]
    sizes, roots = tensors.next_step_(options)
    denoms = _foreach_denominators_(tensors, grads, options.beta2)
    torch._foreach_div_(denoms, roots)
    torch._foreach_add_(denoms, options.eps)
    tensors.first_moments_(grads, options)
    if not tensors.is_whole:
        pieces = [view.split(denom) for view, denom in zip(views, denoms, strict=True)]
        sizes = [size for size, parts in zip(sizes, pieces, strict=True) for _ in parts]
        if not sizes:
            return
        params, exp_avgs, denoms = map(list, zip(*(piece for parts in pieces for piece in parts), strict=True))
    torch._foreach_addcdiv_(params, exp_avgs, denoms, [-size for size in sizes])


def _foreach_denominators_(tensors: ForeachList, grads: list[Tensor], beta2: float) -> list[Tensor]:
    """Update the second moments; return their roots as new tensors that broadcast against the parameters."""
    moments, views = tensors.moments, tensors.views
    torch._foreach_mul_(moments, beta2)
    if views[0].blocks.kind is Kind.ELEMENT:
        torch._foreach_addcmul_(moments, grads, grads, 1 - beta2)
        return list(torch._foreach_sqrt(moments))
    means = []
    for view in views:
        (mean,) = view.blocks.means(*(view.square_sums or view.local_square_sums()))
        means.append(mean.to(moments[0].dtype))
    torch._foreach_add_(moments, means, alpha=1 - beta2)
    return [view.blocks.root_second_moment(moment) for view, moment in zip(views, moments, strict=True)]


def _small_blocks_(tensors: ForeachList, options: StepOptions) -> None:
    """The lines of `reference_` on CPU tensors of one small block each.

    Half of the time of a step of small tensors is in the calls of operations on one-element tensors, so the second
    moments are numbers of the host here.
    """
    grads: Any = [view.grad for view in tensors.views]
    sizes, roots = tensors.next_step_(options)
    norms = torch._foreach_norm(grads, 2, dtype=torch.float64)
    tensors.first_moments_(grads, options)
    beta2, largest = options.beta2, torch.finfo(tensors.params[0].dtype).max
    parts = zip(tensors.params, tensors.exp_avgs, tensors.moments, norms, sizes, roots, strict=True)
    for param, exp_avg, moment, norm, size, root in parts:
        square = norm.item() * norm.item()  # a power that overflows would raise
        value = beta2 * moment.item() + (1 - beta2) * (square / param.numel())
        moment.fill_(math.inf if value > largest else value)  # torch refuses finite numbers that overflow
        value = moment.item()  # as it is rounded
        denom = (math.sqrt(value) if value >= 0 else math.nan) / root + options.eps
        param.add_(exp_avg, alpha=-(math.inf if denom <= size / largest else size / denom))


# 8-bit first moments and stochastic rounding, slice by slice


def _rounded_slices_(
    view: ParameterView, options: StepOptions, step_size: float | Tensor, root: float | Tensor
) -> None:
    """Move the first moment and the parameter, with the step and the second moments as they are after this step.

    What is stored in few bits is converted to float32, updated and stored again, a slice of about a megabyte at a time,
    so that no temporary has the size of the parameter. The parameter moves by the first moment before that is rounded.
    Each line below is one IEEE operation per element: fused or reordered ones would give other last bits in the tail of
    a vector, on another device or in another sharding, and with them other roundings.

    Args:
        view: The parameter with its gradient, blocks and state.
        options: Scalars of this step.
        step_size: Learning rate over the bias correction of the first moment.
        root: Root of the bias correction of the second moment.
    """
    assert view.grad is not None
    wide = view.moments[0].dtype
    step: int | Tensor = view.step.to(torch.int64) if isinstance(root, Tensor) else int(view.step.item())
    is_block_mean = view.blocks.kind is Kind.MEAN
    kept = view.blocks.root_second_moment(*view.moments).div_(root).add_(options.eps) if is_block_mean else None
    for box, rectangles in _slices(view):
        grad = box.view(view.grad).to(wide, copy=True)
        grad = grad.neg_() if options.maximize else grad
        exp_avg = _first_moment(view, box).to(wide)
        exp_avg.add_(grad.sub_(exp_avg).mul_(1 - options.beta1))
        param = box.view(view.param).to(wide, copy=True).mul_(options.shrink)
        if kept is not None:
            denoms: Iterable[tuple[Box, Tensor]] = ((piece, piece.within(kept)) for piece in rectangles)
        else:
            roots = _roots_of_slice(view, rectangles)
            denoms = ((piece, denom.div_(root).add_(options.eps)) for piece, denom in roots)
        for piece, denom in denoms:
            piece.view(param).sub_((piece.view(exp_avg) / denom).mul_(step_size))

        noise = None if view.rounding is None else view.rounding.bits(box, step, view.param.device)
        _store_(box.view(view.param), param, noise)
        if view.exp_avg_scale is not None:
            quantized.write_(view.exp_avg, view.exp_avg_scale, box, exp_avg.to(torch.float32))
        else:
            _store_(box.view(view.exp_avg), exp_avg, None if noise is None else noise >> 16)


def _slices(view: ParameterView) -> Iterator[tuple[Box, tuple[Box, ...]]]:
    """Slices of the local tensor, each with its rectangles of the local blocks, counted within the slice."""
    boxes = view.shard.boxes
    if boxes is not None and any(box.flat is not None for box in boxes):
        for part in (part for box in boxes for part in split(box)):
            yield part, (Box(part.start, part.sizes, (0,) * len(part.sizes)),)
        return
    whole = whole_box(view.param.shape)
    for box in split(whole, multiple=quantized.GROUP_SIZE):
        found = (intersect(box, other) for other in (boxes if boxes is not None else (whole,)))
        yield box, tuple(piece for piece in found if piece is not None)


def _roots_of_slice(view: ParameterView, rectangles: tuple[Box, ...]) -> Iterator[tuple[Box, Tensor]]:
    """Roots of element-wise or factored second moments, as new tensors; factored ones come segment by segment."""
    if view.blocks.kind is Kind.ELEMENT:
        return ((piece, piece.within(view.moments[0]).sqrt()) for piece in rectangles)
    return Shard(view.blocks, rectangles).factored_roots(view.moments)


def _first_moment(view: ParameterView, box: Box) -> Tensor:
    """A copy of a slice of the first moment, in float32 or wider."""
    if view.exp_avg_scale is not None:
        return quantized.read(view.exp_avg, view.exp_avg_scale, box)
    return box.view(view.exp_avg).to(torch.promote_types(view.exp_avg.dtype, torch.float32), copy=True)


def _store_(target: Tensor, numbers: Tensor, noise: Tensor | None) -> None:
    """Store numbers, which may be overwritten, in the target's dtype."""
    if noise is not None and target.dtype is torch.bfloat16:
        numbers = round_to_bfloat16(numbers, noise)
    target.copy_(numbers)
