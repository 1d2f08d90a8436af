"""The same update on many tensors at once, through torch's foreach functions.

Block means are taken tensor by tensor; everything else runs over lists. On a GPU that saves launches. Large tensors of
the CPU are updated one at a time, slice by slice (`cache_blocked`), and so are those whose denominators are as large as
the parameters, or whose state is not plain numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_adam_mini.blocks import Kind
from lightning_adam_mini.optim import cache_blocked, update
from lightning_adam_mini.optim.parameter_view import ParameterView
from lightning_adam_mini.optim.step_options import StepOptions

__all__ = ["update_"]


def update_(tensors: Sequence[ParameterView], options: StepOptions) -> None:
    """One step of Adam-mini on many tensors, in place.

    Args:
        tensors: Parameters with their gradients, blocks and states.
        options: Scalars of this step, `lr` a number.
    """
    for tensor in tensors:
        if not _joins_a_list(tensor):
            one_at_a_time = cache_blocked.update_ if cache_blocked.takes(tensor) else update.update_
            one_at_a_time(tensor, options)
    for alike in _alike(tensors):
        params = [t.param for t in alike]
        grads = [t.grad for t in alike if t.grad is not None]
        exp_avgs = [t.exp_avg for t in alike]
        if options.maximize:
            grads = list(torch._foreach_neg(grads))

        torch._foreach_add_([t.step for t in alike], 1)
        steps = [t.step.item() for t in alike]
        step_sizes = [-float(options.step_size(step)) for step in steps]
        roots = [options.root(step) for step in steps]

        if options.weight_decay != 0:
            torch._foreach_mul_(params, options.shrink)
        torch._foreach_lerp_(exp_avgs, [grad.to(exp_avgs[0].dtype) for grad in grads], 1 - options.beta1)
        denoms = _denominators(alike, options.beta2)
        torch._foreach_div_(denoms, roots)
        torch._foreach_add_(denoms, options.eps)
        if not all(t.is_whole for t in alike):
            pieces = [list(t.split(denom)) for t, denom in zip(alike, denoms, strict=True)]
            step_sizes = [size for size, parts in zip(step_sizes, pieces, strict=True) for _ in parts]
            if not step_sizes:
                continue
            params, exp_avgs, denoms = map(list, zip(*(piece for parts in pieces for piece in parts), strict=True))
        torch._foreach_addcdiv_(params, exp_avgs, denoms, step_sizes)


def _denominators(tensors: Sequence[ParameterView], beta2: float) -> list[Tensor]:
    """Update the second moments; return their roots, shaped to broadcast against the parameters."""
    moments = [moment for t in tensors for moment in t.moments]
    torch._foreach_mul_(moments, beta2)
    if tensors[0].blocks.kind is Kind.ELEMENT:
        grads = [t.grad for t in tensors if t.grad is not None]
        torch._foreach_addcmul_(moments, grads, grads, 1 - beta2)
        return list(torch._foreach_sqrt(moments))
    means = [mean for t in tensors for mean in t.mean_square()]
    torch._foreach_add_(moments, means, alpha=1 - beta2)
    return [t.blocks.root_second_moment(*t.moments) for t in tensors]


def _joins_a_list(tensor: ParameterView) -> bool:
    return tensor.is_plain and tensor.blocks.kind is not Kind.FACTORED and not cache_blocked.takes(tensor)


def _alike(tensors: Sequence[ParameterView]) -> list[list[ParameterView]]:
    """Tensors that one foreach call can take together."""
    groups: dict[tuple[object, ...], list[ParameterView]] = defaultdict(list)
    for t in tensors:
        kind = t.blocks.kind
        if _joins_a_list(t):
            groups[
                t.param.device,
                t.param.dtype,
                None if t.grad is None else t.grad.dtype,
                t.exp_avg.dtype,
                t.moments[0].dtype,
                kind,
            ].append(t)
    return list(groups.values())
