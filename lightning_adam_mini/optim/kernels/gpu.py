"""One step of Adam-mini on many tensors by Triton kernels, without waiting for the device.

Besides the tensors, a step needs three things on the device: the work of each program, planned once for a list of
tensors; the tensors' addresses, copied again when one has moved, as gradients do after `zero_grad`; and three scalars
per tensor. Tensors that the kernels do not take (`triton_plan.refusal`), such as those with a factored second moment,
float64, or a gradient in another memory order, are updated by `update`, one at a time.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor

from lightning_adam_mini.optim.kernels.layout import address
from lightning_adam_mini.optim.kernels.triton_plan import TritonPlan, make_plan, plan_key, refusal
from lightning_adam_mini.optim.update import ParameterView, StepOptions, accumulate_, reference_

__all__ = ["supports", "unavailable", "update_"]

MIN_CAPABILITY = 8
"""Devices below compute capability 8.0 have no bfloat16."""
MAX_PLANS = 32
"""Plans to keep: one per parameter group and set of parameters that had gradients."""


def unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device; None if they can."""
    if find_spec("triton") is None:
        return "Triton is not installed (`pip install triton`)"
    if _is_interpreted():
        return None
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return f"{device} is no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    if major < MIN_CAPABILITY:
        return f"{device} has compute capability {major}.{minor}, less than {MIN_CAPABILITY}.0"
    return None


def supports(tensor: ParameterView) -> str | None:
    """Why the kernels do not take a tensor, so that the reference updates it; None if they do.

    Args:
        tensor: A parameter, or this rank's part of it, with its state and, if it has one, its gradient.
    """
    return unavailable(tensor.param.device) or refusal(tensor)


def update_(tensors: Sequence[ParameterView], options: StepOptions, *, capturable: bool = False) -> None:
    """One step of Adam-mini on many tensors, in place.

    Args:
        tensors: Parameters with their gradients, blocks and states.
        options: Scalars of this step.
        capturable: Keep step counts, and `lr` if it is a tensor, on the device, so that CUDA graphs can capture the
            step. A graph reads and writes the memory that the tensors had when it was captured.

    Raises:
        RuntimeError: A graph captures the first step on these tensors.
    """
    by_device: dict[torch.device, list[ParameterView]] = defaultdict(list)
    for tensor in tensors:
        by_device[tensor.param.device].append(tensor)
    for device, here in by_device.items():
        prepared = _prepare(here, device) if _runs_on(device) else None
        for number in range(len(here)) if prepared is None else prepared.plan.left:
            reference_([here[number]], options, capturable=capturable)
        if prepared is None or not prepared.plan.taken:
            continue
        taken = [here[number] for number in prepared.plan.taken]
        torch._foreach_add_([tensor.step for tensor in taken], 1)
        for number in prepared.plan.summed:
            accumulate_(here[number], options.beta2)
        arguments: dict[str, Tensor | float] = {
            "scalars": _scalars(taken, options, device, capturable=capturable),
            "beta2": options.beta2,
            "weight1": 1 - options.beta1,
            "weight2": 1 - options.beta2,
            "eps": options.eps,
            "sign": -1.0 if options.maximize else 1.0,
        }
        prepared.launch(taken, arguments)


@dataclass
class _Prepared:
    """A plan with the tensors' addresses on the device.

    Args:
        plan: The plan.
        shards: Shards of the tensors, kept alive since `plan_key` has their identities.
        addresses: The addresses on the device; int64 (tensors, 4).
        pointers: The addresses that were copied last, as numbers.
        spare: Page-locked memory for a graph that is captured later, since none can be allocated during capture; None
            on the CPU.
    """

    plan: TritonPlan
    shards: list[object]
    addresses: Tensor
    pointers: list[list[int]]
    spare: Tensor | None

    def launch(self, tensors: Sequence[ParameterView], options: Mapping[str, Tensor | float]) -> None:
        """Launch the kernels of the plan.

        Args:
            tensors: The tensors that the plan takes.
            options: Scalars of this step, by the names of kernel arguments.
        """
        addresses = self.addresses_of(tensors)
        # Triton launches on the current device. Its default for `enable_fp_fusion` differs between versions.
        with torch.cuda.device(addresses.device) if addresses.is_cuda else nullcontext():
            for launch in self.plan.launches:
                values = {name: options[name] for name in launch.options}
                kernel = launch.kernel[(launch.num_programs,)]
                kernel(addresses=addresses, enable_fp_fusion=True, **values, **launch.arguments)

    def addresses_of(self, tensors: Sequence[ParameterView]) -> Tensor:
        """The addresses of parameters, gradients, first and second moments on the device."""
        memory = [(t.param, t.param if t.grad is None else t.grad, t.exp_avg, t.moments[0]) for t in tensors]
        names = ("the parameter", "the gradient", "the first moment", "the second moment")
        pointers = [
            [
                address(
                    f"{t.name}: {what}", tensor, dtypes=(tensor.dtype,), numel=tensor.numel(), device=t.param.device
                )
                for what, tensor in zip(names, four, strict=True)
            ]
            for t, four in zip(tensors, memory, strict=True)
        ]
        is_cuda = self.addresses.is_cuda
        if is_cuda and torch.cuda.is_current_stream_capturing():
            # Each replay copies the addresses of the capture, which must not change: later steps overwrite ours.
            if self.spare is None:
                raise RuntimeError("take one step outside the graph before each capture, to allocate memory for it")
            locked, self.spare = self.spare.copy_(torch.tensor(pointers, device="cpu")), None
            _CAPTURED.append((self, locked))
            return torch.empty_like(self.addresses).copy_(locked, non_blocking=True)
        if pointers != self.pointers:
            # A new page-locked tensor each time: an earlier asynchronous copy may still read the old one.
            self.addresses.copy_(torch.tensor(pointers, device="cpu", pin_memory=is_cuda), non_blocking=True)
            self.pointers = pointers
        if is_cuda and self.spare is None:
            self.spare = torch.empty(self.addresses.shape, dtype=torch.int64, device="cpu", pin_memory=True)
        return self.addresses


_PREPARED: dict[tuple[object, ...], _Prepared] = {}
_CAPTURED: list[tuple[_Prepared, Tensor]] = []
"""What captured graphs read in each replay. Kept until the process ends, since nothing reports when a graph ends."""


def _prepare(tensors: Sequence[ParameterView], device: torch.device) -> _Prepared:
    """The plan for these tensors, made in the first step on them."""
    key = (device, *map(plan_key, tensors))
    prepared = _PREPARED.get(key)
    if prepared is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("take one step on the same parameters and gradients before a CUDA graph captures one")
        plan = make_plan(tensors, device)
        addresses = torch.empty(len(plan.taken), 4, dtype=torch.int64, device=device)
        prepared = _Prepared(plan, [tensor.shard for tensor in tensors], addresses, [], None)
        _PREPARED[key] = prepared
        if len(_PREPARED) > MAX_PLANS:
            del _PREPARED[next(iter(_PREPARED))]  # the oldest
    return prepared


def _scalars(
    tensors: Sequence[ParameterView], options: StepOptions, device: torch.device, *, capturable: bool
) -> Tensor:
    """For each tensor the factor of weight decay, the step size and the root of the second bias correction.

    They are computed in float64; on the device only if `capturable`.
    """
    lr = options.lr
    if capturable:
        steps = torch.stack([tensor.step for tensor in tensors]).double()
        wide = replace(options, lr=lr.to(device, torch.float64) if isinstance(lr, Tensor) else lr)
        decay = torch.ones_like(steps) * wide.shrink
        return torch.stack([decay, wide.step_size(steps), wide.root(steps)], 1).float()
    options = replace(options, lr=float(lr))
    counts = [tensor.step.item() for tensor in tensors]
    rows = {step: (options.shrink, options.step_size(step), options.root(step)) for step in set(counts)}
    values = torch.tensor(
        [rows[step] for step in counts], dtype=torch.float32, device="cpu", pin_memory=device.type == "cuda"
    )
    return values.to(device, non_blocking=True)


def _runs_on(device: torch.device) -> bool:
    return device.type == "cuda" or (device.type == "cpu" and _is_interpreted())


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
