"""A parameter group that is stepped by the C kernel, with all that stays from step to step kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, compress
from operator import attrgetter, is_
from typing import Any

from torch import Tensor

from lightning_adam_mini.optim.kernels.cpu import is_laid_out_as, laid_out_as, supports, whole_entry
from lightning_adam_mini.optim.kernels.cpu_plan import Plan
from lightning_adam_mini.optim.kernels.layout import Memory
from lightning_adam_mini.optim.parameter_view import ParameterView
from lightning_adam_mini.optim.step_options import StepOptions

__all__ = ["GroupPlan"]

_grad = attrgetter("grad")


class GroupPlan:
    """The plan of a group, which holds as long as its parameters and states are the same tensors in the same memory.

    Build one through `of`.

    Args:
        params: Parameters of the group.
        state: State of the optimizer.
        tensors: The parameters that have a gradient, in the same order, all of which the kernel supports, and none of
            which shares memory with another or with its own gradient.
    """

    def __init__(
        self, params: Sequence[Tensor], state: Mapping[Tensor, Mapping[str, Tensor]], tensors: Sequence[ParameterView]
    ) -> None:
        self._params = list(params)
        self._has_grad = [parameter.grad is not None for parameter in params]
        self._members = [tensor.param for tensor in tensors]
        self._states: list[Any] = [state[parameter] for parameter in self._members]
        self._kept = [value for own in self._states for value in own.values()]
        grads = [tensor.grad for tensor in tensors if tensor.grad is not None]
        self._is_copied = [not is_laid_out_as(p, grad) for p, grad in zip(self._members, grads, strict=True)]
        self._plan = Plan([whole_entry(tensor) for tensor in tensors])
        self._memory, self._memory_of_grads = Memory(self._members, self._kept), Memory(grads)

    @classmethod
    def of(
        cls, params: Sequence[Tensor], state: Mapping[Tensor, Mapping[str, Tensor]], tensors: Sequence[ParameterView]
    ) -> GroupPlan | None:
        """The plan of a group, or None where the kernel cannot take all of it whole and plain."""
        members = [parameter for parameter in params if parameter.grad is not None]
        if len(members) != len(tensors):
            return None
        for parameter, tensor in zip(members, tensors, strict=True):
            if tensor.param is not parameter or tensor.shard.groups or not tensor.is_whole or supports(tensor):
                return None
            own = state[parameter]
            if not isinstance(own, dict) or not all(isinstance(value, Tensor) for value in own.values()):
                return None
        return cls(params, state, tensors)

    def gradients(self, params: Sequence[Tensor]) -> tuple[list[Tensor], list[int]] | None:
        """Gradients of a step, laid out as the plan takes them, with their addresses; None where it does not hold.

        Nothing is written.

        Args:
            params: Parameters of the group now, whose states are the same dicts as when the plan was made.
        """
        if len(params) != len(self._params) or not all(map(is_, params, self._params)):
            return None
        grads = list(map(_grad, params))
        if [grad is not None for grad in grads] != self._has_grad:
            return None
        kept = list(chain.from_iterable(map(dict.values, self._states)))
        if len(kept) != len(self._kept) or not all(map(is_, kept, self._kept)):
            return None
        if not self._memory.is_in_place(self._members, kept):
            return None
        members = list(compress(grads, self._has_grad))
        addresses = self._memory_of_grads.addresses(members, apart_from=self._memory)
        if addresses is None:
            return None
        if any(self._is_copied):
            copied = zip(self._members, members, self._is_copied, strict=True)
            members = [laid_out_as(parameter, grad) if is_copied else grad for parameter, grad, is_copied in copied]
            addresses = [grad.data_ptr() for grad in members]
        return members, addresses

    def step(self, options: StepOptions, gradients: tuple[list[Tensor], list[int]]) -> None:
        """One step with what `gradients` gave.

        Args:
            options: Scalars of this step.
            gradients: The gradients and their addresses.
        """
        self._plan.step(options, gradients[1])
