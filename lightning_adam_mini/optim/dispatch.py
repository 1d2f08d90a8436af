"""Which code takes the step: the reference, lists of tensors, or kernels."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from operator import is_
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from lightning_adam_mini.optim import foreach, update
from lightning_adam_mini.optim.parameter_view import ParameterView, extent
from lightning_adam_mini.optim.step_options import StepOptions

if TYPE_CHECKING:
    from lightning_adam_mini.optim.kernels.group import GroupPlan

__all__ = ["Implementation", "Stepper", "options_of"]

Implementation = Literal["reference", "foreach", "fused"]

_KERNEL_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}


class Stepper:
    """Takes the steps of parameter groups by one implementation, or by the best that runs where the tensors are.

    Where nothing is asked for, that is the C kernel on the CPU if there is a compiler, and `foreach` elsewhere. The
    Triton kernels run where they are asked for.

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
        self._plans: dict[int, GroupPlan] = {}
        self._stepped: list[Tensor] = []  # the keys and values of the state that the plans are of
        self._states: list[Mapping[str, Tensor]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles make plans of their own."""
        return {"requested": self.requested, "_plans": {}, "_stepped": [], "_states": []}

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
                instead = self._best(device, dtype, capturable=capturable)
                raise ValueError(
                    f"implementation='fused' cannot run here: {reason}. Leave it out, and {instead!r} runs instead"
                )

    def on(self, parameter: Tensor, *, capturable: bool) -> Implementation:
        """What takes the steps of a parameter where it is now."""
        return self.requested or self._best(parameter.device, parameter.dtype, capturable=capturable)

    def square_sums(self, tensor: ParameterView) -> tuple[Tensor, ...]:
        """Sums of squares over this rank's part of a parameter, by what takes its steps."""
        if tensor.param.is_cpu and not tensor.exact and self.on(tensor.param, capturable=False) == "fused":
            from lightning_adam_mini.optim.kernels import cpu

            return cpu.square_sums(tensor) or tensor.local_square_sums()
        return tensor.local_square_sums()

    def ready(
        self,
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Tensor, Mapping[str, Tensor]],
        *,
        apart_from: Container[int] = (),
    ) -> dict[int, tuple[list[Tensor], list[int]] | None]:
        """Gradients of groups that can be stepped as they were last; None for one that has to be looked at anew.

        Nothing is written: the steps of all groups are checked before the first is taken.

        Args:
            groups: Their parameters and options.
            state: State of the optimizer.
            apart_from: Numbers of groups that are to be looked at anew.
        """
        # Identities in the order of the dict: looking up each parameter would cost a third of all checks.
        if self._plans and not (
            len(state) == len(self._states)
            and all(map(is_, state, self._stepped))
            and all(map(is_, state.values(), self._states))
        ):
            self._plans.clear()
        found = {}
        for number, group in enumerate(groups):
            plan = None if number in apart_from or group["capturable"] else self._plans.get(number)
            found[number] = None if plan is None else plan.gradients(group["params"])
            if plan is None or found[number] is None:
                self._plans.pop(number, None)
        return found

    def repeat(self, number: int, options: StepOptions, gradients: tuple[list[Tensor], list[int]]) -> None:
        """Take a group's step as the last one was taken, with what `ready` gave."""
        self._plans[number].step(options, gradients)

    def take(
        self,
        tensors: Sequence[ParameterView],
        group: Mapping[str, Any],
        *,
        number: int | None = None,
        state: Mapping[Tensor, Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Take a step of some of a group's parameters, which have gradients.

        Args:
            tensors: The parameters.
            group: Options of the group.
            number: Of the group, if `tensors` are all of it: then `repeat` may take its next step.
            state: State of the optimizer, in that case.
        """
        capturable = group["capturable"]
        by_device: dict[tuple[str, Implementation], list[ParameterView]] = {}
        entangled = _entangled(tensors)
        for place, tensor in enumerate(tensors):
            how = "reference" if place in entangled else self.on(tensor.param, capturable=capturable)
            by_device.setdefault((tensor.param.device.type, how), []).append(tensor)
        for (device_type, how), here in by_device.items():
            _update(here, group, how, device_type)
        if number is None:
            return
        self._plans.pop(number, None)
        if by_device.keys() == {("cpu", "fused")} and not capturable:
            from lightning_adam_mini.optim.kernels.group import GroupPlan

            assert state is not None
            plan = GroupPlan.of(group["params"], state, tensors)
            if plan is not None:
                self._plans[number] = plan
                self._stepped, self._states = list(state), list(state.values())

    def _best(self, device: torch.device, dtype: torch.dtype, *, capturable: bool) -> Implementation:
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


def options_of(group: Mapping[str, Any]) -> StepOptions:
    """The scalars of a group's next step."""
    lr = group["lr"] if group["capturable"] else float(group["lr"])
    beta1, beta2 = group["betas"]
    return StepOptions(lr, beta1, beta2, group["eps"], group["weight_decay"], group["maximize"])


def _entangled(tensors: Sequence[ParameterView]) -> set[int]:
    """Places in the list of parameters that lie in memory where others do, or gradients: these take turns.

    Whole ranges are compared, so that what lies between the elements of another counts too.
    """
    ranges = sorted(
        (start, start + extent(memory) * memory.itemsize, memory is tensor.param, place)
        for place, tensor in enumerate(tensors)
        if not tensor.param.is_meta
        for memory in (tensor.param, tensor.grad)
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


def _update(tensors: Sequence[ParameterView], group: Mapping[str, Any], how: Implementation, device_type: str) -> None:
    options, capturable = options_of(group), group["capturable"]
    if how == "fused" and device_type == "cuda":
        from lightning_adam_mini.optim.kernels import gpu

        gpu.update_(tensors, options, capturable=capturable)
    elif how == "fused" and device_type == "cpu" and not capturable:
        from lightning_adam_mini.optim.kernels import cpu

        cpu.update_(tensors, options)
    elif how == "reference" or capturable:
        for tensor in tensors:
            update.update_(tensor, options, capturable=capturable)
    else:
        foreach.update_(tensors, options)
