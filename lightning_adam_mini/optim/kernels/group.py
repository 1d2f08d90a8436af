"""A parameter group that is stepped by the C kernel, with all that stays from step to step kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_

from torch import Tensor

from lightning_adam_mini.optim.cut_tensor import CutTensor
from lightning_adam_mini.optim.kernels.cpu import laid_out_as, supports, whole_entry
from lightning_adam_mini.optim.kernels.plan import Plan
from lightning_adam_mini.optim.step_options import StepOptions

__all__ = ["GroupPlan"]


class GroupPlan:
    """The plan of a group, which holds as long as its parameters and states are the same tensors in the same memory.

    Build one through `of`.

    Args:
        params: Parameters of the group.
        state: State of the optimizer.
        tensors: The parameters that have a gradient, in the same order, all of which the kernel supports.
    """

    def __init__(
        self, params: Sequence[Tensor], state: Mapping[Tensor, Mapping[str, Tensor]], tensors: Sequence[CutTensor]
    ) -> None:
        self._params = list(params)
        self._has_grad = [parameter.grad is not None for parameter in params]
        self._members = [tensor.param for tensor in tensors]
        self._state = self._state_of_members(state)
        self._strides = [parameter.stride() for parameter in self._members]
        self._shapes = [parameter.shape for parameter in self._members]
        self._dtypes = [parameter.dtype for parameter in self._members]
        self._plan = Plan([whole_entry(tensor) for tensor in tensors])

    @classmethod
    def of(
        cls, params: Sequence[Tensor], state: Mapping[Tensor, Mapping[str, Tensor]], tensors: Sequence[CutTensor]
    ) -> GroupPlan | None:
        """The plan of a group, or None where the kernel cannot take all of it whole and plain."""
        members = [parameter for parameter in params if parameter.grad is not None]
        if len(members) != len(tensors):
            return None
        for parameter, tensor in zip(members, tensors, strict=True):
            if tensor.param is not parameter or tensor.shard.groups or not tensor.is_whole or supports(tensor):
                return None
        return cls(params, state, tensors)

    def gradients(
        self, params: Sequence[Tensor], state: Mapping[Tensor, Mapping[str, Tensor]]
    ) -> Sequence[Tensor] | None:
        """Gradients as the plan takes them; None where it does not hold. Nothing is written.

        Args:
            params: Parameters of the group now.
            state: State of the optimizer now.
        """
        if len(params) != len(self._params) or not all(map(is_, params, self._params)):
            return None
        grads = [parameter.grad for parameter in params]
        if [grad is not None for grad in grads] != self._has_grad:
            return None
        members = [grad for grad in grads if grad is not None]
        if [p.shape for p in self._members] != self._shapes or [grad.shape for grad in members] != self._shapes:
            return None
        if (
            not all(grad.is_cpu and not grad.is_sparse for grad in members)
            or [grad.dtype for grad in members] != self._dtypes
        ):
            return None
        now = self._state_of_members(state)
        if len(now) != len(self._state) or not all(map(is_, now, self._state)):
            return None
        if [parameter.stride() for parameter in self._members] != self._strides or not self._plan.is_in_place():
            return None
        if [grad.stride() for grad in members] != self._strides:
            members = [laid_out_as(parameter, grad) for parameter, grad in zip(self._members, members, strict=True)]
        return members

    def step(self, options: StepOptions, grads: Sequence[Tensor]) -> None:
        """One step with what `gradients` gave."""
        self._plan.step(options, grads)

    def _state_of_members(self, state: Mapping[Tensor, Mapping[str, Tensor]]) -> list[Tensor]:
        return [tensor for parameter in self._members for tensor in state[parameter].values()]
