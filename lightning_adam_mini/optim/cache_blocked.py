"""The same update on one large tensor of the CPU, slice by slice: the form that needs no compiler.

Each operation reads and writes the memory of its operands. On a whole tensor they come from the main memory every time;
a slice stays in the cache from the first operation to the last. Temporaries are no larger than a slice.
"""

from __future__ import annotations

from torch import Tensor

from lightning_adam_mini.blocks import Blocks, Kind
from lightning_adam_mini.optim import update
from lightning_adam_mini.optim.parameter_view import ParameterView
from lightning_adam_mini.optim.shards import Shard
from lightning_adam_mini.optim.step_options import StepOptions

__all__ = ["SLICE_ELEMENTS", "takes", "update_"]

SLICE_ELEMENTS = 2**19
"""Elements of a slice. Three of them, in float32, fit the cache of most CPUs, and a call costs little beside them."""


def takes(tensor: ParameterView) -> bool:
    """Whether a tensor is worth it, and its denominators can be had slice by slice."""
    blocks = tensor.blocks
    return (
        tensor.param.is_cpu
        and tensor.is_plain
        and tensor.param.dim() > 1
        and tensor.param.numel() > SLICE_ELEMENTS
        and tensor.is_whole
        and (blocks.kind is not Kind.FACTORED or len(blocks.segments) == 1)
    )


def update_(tensor: ParameterView, options: StepOptions) -> None:
    """One step of Adam-mini on one tensor, in place.

    Args:
        tensor: The parameter with its gradient, blocks and state; `takes` says yes.
        options: Scalars of this step, `lr` a number.
    """
    assert tensor.grad is not None
    tensor.step.add_(1)
    step = tensor.step.item()
    step_size, root = -float(options.step_size(step)), options.root(step)
    by_slice = _is_sum_of_slice(tensor)
    if not by_slice:
        update.accumulate_(tensor, options.beta2)
        factors = _broadcast_factors(tensor)
    rows = tensor.param.shape[0]
    length = max(1, SLICE_ELEMENTS * rows // tensor.param.numel())
    for start in range(0, rows, length):
        stop = min(start + length, rows)
        param, grad, exp_avg = tensor.param[start:stop], tensor.grad[start:stop], tensor.exp_avg[start:stop]
        if by_slice:
            own = [tensor.moments[0][start:stop]]
            blocks = Blocks.element if tensor.blocks.kind is Kind.ELEMENT else Blocks.rows
            part = ParameterView(param, grad, Shard(blocks(param.shape)), tensor.step, exp_avg, tuple(own))
            update.accumulate_(part, options.beta2)
        else:
            own = [factor if factor.shape[0] == 1 else factor[start:stop] for factor in factors]
        exp_avg.lerp_((-grad if options.maximize else grad).to(exp_avg.dtype), 1 - options.beta1)
        if options.weight_decay != 0:
            param.mul_(options.shrink)
        roots = [factor.sqrt() for factor in own]
        denom = roots[0] * roots[1] if roots[1:] else roots[0]
        param.addcdiv_(exp_avg, denom.div_(root).add_(options.eps), value=step_size)


def _is_sum_of_slice(tensor: ParameterView) -> bool:
    """Whether the second moments of a slice follow from its own gradient alone."""
    blocks = tensor.blocks
    return blocks.kind is Kind.ELEMENT or (blocks.cuts_rows and blocks.axis == 0 and tensor.square_sums is None)


def _broadcast_factors(tensor: ParameterView) -> list[Tensor]:
    """Factors of the second moment, one or two, that broadcast against the tensor."""
    factors = tensor.blocks.factors(*tensor.moments)
    return [tensor.blocks.expand_rows(*factors)] if tensor.blocks.kind is Kind.MEAN else list(factors)
