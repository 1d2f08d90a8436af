"""Which code takes the step: the reference, lists of tensors, or kernels; and what is kept between steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import chain, compress
from operator import attrgetter, is_
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_adam_mini.optim.kernels.layout import Memory
from lightning_adam_mini.optim.params import extent
from lightning_adam_mini.optim.update import ParameterView, Update, foreach_updates, reference_

__all__ = ["Dispatch", "Implementation", "StepPlan"]

Implementation = Literal["reference", "foreach", "fused"]

_KERNEL_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}
Groups = Sequence[Mapping[str, Any]]
_grad = attrgetter("grad")


class Dispatch:
    """Chooses the implementation for each parameter: what was asked for, or the best that runs where the tensors are.

    Where nothing is asked for, that is the C kernel on the CPU if there is a compiler, and `foreach` elsewhere. The
    Triton kernels run only where they are asked for.

    Args:
        requested: What the user asks for; None to choose.

    Raises:
        ValueError: There is no such implementation.
    """

    def __init__(self, requested: Implementation | None) -> None:
        if requested is not None and requested not in get_args(Implementation):
            names = ", ".join(map(repr, get_args(Implementation)))
            raise ValueError(f"implementation must be {names} or None, not {requested!r}")
        self.requested = requested

    def check(self, parameters: Iterable[Tensor], *, capturable: bool) -> None:
        """Check that the implementation that was asked for can take the steps of these parameters.

        Args:
            parameters: Parameters of a group.
            capturable: Whether CUDA graphs capture the steps.

        Raises:
            ValueError: It cannot, with the reason and what runs instead.
        """
        if capturable and self.requested == "foreach":
            raise ValueError("capturable needs implementation='reference', 'fused' or None")
        if self.requested != "fused":
            return
        for device, dtype in sorted({(p.device, p.dtype) for p in parameters}, key=str):
            if reason := _refusal(device, dtype, capturable=capturable):
                instead = _best(device, dtype, capturable=capturable)
                raise ValueError(
                    f"implementation='fused' cannot run here: {reason}. Leave it out, and {instead!r} runs instead"
                )

    def choose(self, parameter: Tensor, *, capturable: bool) -> Implementation:
        """The implementation for a parameter on the device where it is now."""
        return self.requested or _best(parameter.device, parameter.dtype, capturable=capturable)

    def square_sums(self, view: ParameterView) -> tuple[Tensor, ...]:
        """Sums of squares over this rank's part of a parameter, by the implementation that takes its steps."""
        if view.param.is_cpu and not view.exact and self.choose(view.param, capturable=False) == "fused":
            from lightning_adam_mini.optim.kernels import cpu

            return cpu.square_sums(view) or view.local_square_sums()
        return view.local_square_sums()

    def updates(self, views: Sequence[ParameterView], *, capturable: bool) -> list[Update]:
        """The updates that together take one step of these views, all of which have a gradient.

        Nothing is written before the first of them is called.
        """
        chosen: dict[tuple[str, Implementation], list[ParameterView]] = {}
        entangled = _entangled(views)
        for place, view in enumerate(views):
            how = "reference" if place in entangled else self.choose(view.param, capturable=capturable)
            chosen.setdefault((view.param.device.type, how), []).append(view)
        found: list[Update] = []
        for (device_type, how), members in chosen.items():
            if how == "fused" and device_type == "cuda":
                from lightning_adam_mini.optim.kernels import gpu

                found.append(partial(gpu.update_, members, capturable=capturable))
            elif how == "fused" and device_type == "cpu" and not capturable:
                from lightning_adam_mini.optim.kernels import cpu

                found += cpu.updates(members)
            elif how == "reference" or capturable:
                found.append(partial(reference_, members, capturable=capturable))
            else:
                found += foreach_updates(members)
        return found


class StepPlan:
    """The views of all parameters with their updates, which are kept as long as all tensors are the same.

    Args:
        views: For each parameter group, the views of parameters with a gradient, and of those whose sums of squares
            other ranks wait for.
        updates: For each group, what takes a step of the views with a gradient.
    """

    def __init__(self, views: Sequence[Sequence[ParameterView]], updates: Sequence[Sequence[Update]]) -> None:
        self.updates = updates
        self.is_on_cpu = False
        """Whether all parameters are known to be on the CPU, where no graph is captured."""
        self._views = [view for members in views for view in members if view.grad is not None]
        self._communicates = any(view.shard.groups for members in views for view in members)
        # A plan that communicates is not kept, so its steps need not look for overlaps a second time.
        self._has_overlaps = not self._communicates and any(_entangled(members) for members in views)

    def keep(self, groups: Groups, state: Mapping[Tensor, Any]) -> bool:
        """Note what the plan depends on; return whether the next step may use it.

        Views and gradients must be those of whole parameters in CPU or CUDA memory, which share it with nothing else,
        and states dicts of tensors.

        Args:
            groups: Parameter groups of the optimizer.
            state: State of the optimizer.
        """
        self._sizes = [len(group["params"]) for group in groups]
        self._params: list[Tensor] = [parameter for group in groups for parameter in group["params"]]
        self._has_grad = [parameter.grad is not None for parameter in self._params]
        members = self._members = list(compress(self._params, self._has_grad))
        if self._communicates or self._has_overlaps or any(group["capturable"] for group in groups):
            return False  # a rank without gradients, too, takes part in each step's all-reduce
        for member, view in zip(members, self._views, strict=True):
            is_itself = view.param is member and view.grad is member.grad and view.is_whole
            own = state[member]
            is_plain = isinstance(own, dict) and all(isinstance(value, Tensor) for value in own.values())
            if not (is_itself and is_plain and (member.is_cpu or member.is_cuda)):
                return False
        self._states = [state[member] for member in members]
        self._values = list(chain.from_iterable(map(dict.values, self._states)))
        self._memory, self._memory_of_grads = Memory(members, self._values), Memory(list(map(_grad, members)))
        self.is_on_cpu = all(member.is_cpu for member in members)
        return True

    def holds(self, groups: Groups, state: Mapping[Tensor, Any]) -> bool:
        """Whether only numbers and the gradients' addresses have changed; if so, the views get the new gradients.

        Args:
            groups: Parameter groups of the optimizer.
            state: State of the optimizer.
        """
        lists = [group["params"] for group in groups]
        params = list(chain.from_iterable(lists))
        if list(map(len, lists)) != self._sizes or not all(map(is_, params, self._params)):
            return False
        all_grads = list(map(_grad, params))
        if [grad is not None for grad in all_grads] != self._has_grad:
            return False
        values = list(chain.from_iterable(map(dict.values, self._states)))
        if not (
            all(map(is_, map(state.get, self._members), self._states))
            and len(values) == len(self._values)
            and all(map(is_, values, self._values))
            and self._memory.is_in_place(self._members, values)
        ):
            return False
        grads = list(compress(all_grads, self._has_grad))
        if self._memory_of_grads.addresses(grads, apart_from=self._memory) is None:
            return False
        for view, grad in zip(self._views, grads, strict=True):
            view.grad = grad
        return True

    def release(self) -> None:
        """Keep no gradient alive."""
        for view in self._views:
            view.grad = None


def _best(device: torch.device, dtype: torch.dtype, *, capturable: bool) -> Implementation:
    if capturable:
        return "reference"
    return "fused" if device.type == "cpu" and _refusal(device, dtype, capturable=False) is None else "foreach"


def _refusal(device: torch.device, dtype: torch.dtype, *, capturable: bool) -> str | None:
    """Why kernels cannot update tensors on a device; None if they can."""
    if device.type == "meta":  # moved before the first step
        return None
    if device.type not in _KERNEL_DTYPES:
        return f"there are kernels for the CPU and for CUDA, not for {device.type}"
    if dtype not in _KERNEL_DTYPES[device.type]:
        return f"the kernels do not take {dtype}"
    if device.type == "cpu":
        if capturable:
            return "capturable is for CUDA devices"
        from lightning_adam_mini.optim.kernels import cpu

        return cpu.unavailable()
    from lightning_adam_mini.optim.kernels import gpu

    return gpu.unavailable(device)


def _entangled(views: Sequence[ParameterView]) -> set[int]:
    """Places of parameters that overlap in memory with other parameters or with gradients: these are stepped in turn.

    Whole ranges are compared, including the gaps between elements.
    """
    ranges = sorted(
        (start, start + extent(memory) * memory.itemsize, memory is view.param, place)
        for place, view in enumerate(views)
        if not view.param.is_meta
        for memory in (view.param, view.grad)
        if memory is not None and (start := memory.data_ptr()) and memory.numel()
    )
    found: set[int] = set()
    last, last_written = (0, -1), (0, -1)  # the farthest end so far, of any range and of a parameter's
    for start, end, is_written, place in ranges:
        for other_end, other in (last, last_written) if is_written else (last_written,):
            if start < other_end:
                found |= {place, other}
        last = max(last, (end, place))
        last_written = max(last_written, (end, place)) if is_written else last_written
    return found
