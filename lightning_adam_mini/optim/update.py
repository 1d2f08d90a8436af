"""The update of Adam-mini on one cut tensor: the text to read first.

Zhang et al., "Adam-mini: Use Fewer Learning Rates To Gain More" (2024), Algorithm 1: AdamW with one second moment for
each block `b` of a tensor,

    p   <- p - lr * weight_decay * p
    m   <- beta1 * m + (1 - beta1) * g
    v_b <- beta2 * v_b + (1 - beta2) * mean_b(g * g)
    p   <- p - lr * m_hat / (sqrt(v_hat_b) + eps)

with m_hat = m / (1 - beta1^t) and v_hat_b = v_b / (1 - beta2^t). `eps` stands outside the root, as in AdamW. A block of
one element is AdamW.

First moments in 8 bits, and what is rounded stochastically, are updated slice by slice (`sliced_update`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_adam_mini.blocks import Kind
from lightning_adam_mini.optim import sliced_update

if TYPE_CHECKING:
    from lightning_adam_mini.optim.parameter_view import ParameterView
    from lightning_adam_mini.optim.step_options import StepOptions

__all__ = ["accumulate_", "update_"]


def update_(tensor: ParameterView, options: StepOptions, *, capturable: bool = False) -> None:
    """One step of Adam-mini on one tensor, in place.

    Args:
        tensor: The parameter with its gradient, blocks and state.
        options: Scalars of this step.
        capturable: Keep all scalars on the parameter's device, so that CUDA graphs can capture the step.
    """
    assert tensor.grad is not None
    tensor.step.add_(1)
    step = tensor.step if capturable else tensor.step.item()
    step_size, root = options.step_size(step), options.root(step)
    accumulate_(tensor, options.beta2)

    if not tensor.is_plain:
        sliced_update.apply_(tensor, options, step_size=step_size, root=root)
        return
    grad = -tensor.grad if options.maximize else tensor.grad
    tensor.param.mul_(options.shrink)
    tensor.exp_avg.lerp_(grad.to(tensor.exp_avg.dtype), 1 - options.beta1)
    for param, exp_avg, denom in tensor.pieces(root, options.eps):
        if capturable:
            param.addcmul_(exp_avg, step_size / denom, value=-1)
        else:
            param.addcdiv_(exp_avg, denom, value=-float(step_size))


def accumulate_(tensor: ParameterView, beta2: float) -> None:
    """Move the second moments of a tensor towards the mean squares of its gradient."""
    if tensor.blocks.kind is Kind.ELEMENT:  # as torch's AdamW to the last bit, and without a temporary
        assert tensor.grad is not None
        tensor.moments[0].mul_(beta2).addcmul_(tensor.grad, tensor.grad, value=1 - beta2)
        return
    for moment, mean_square in zip(tensor.moments, tensor.mean_square(), strict=True):
        moment.mul_(beta2).add_(mean_square, alpha=1 - beta2)
