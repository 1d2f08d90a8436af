"""One step of Adam-mini on many tensors by Triton kernels, without waiting for the device.

What a step needs beside the tensors lies on the device: the work of each program, made once for a list of tensors;
their addresses, copied where one has moved, as gradients do after `zero_grad`; and three scalars a tensor. Rank-one
cuts, float64, gradients that do not lie in memory as their parameters do, and tensors whose memory has gaps are updated
by `update`, one at a time.
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

from lightning_adam_mini.optim.kernels.memory import address
from lightning_adam_mini.optim.kernels.triton_plan import Plan, make_plan, plan_key, refusal
from lightning_adam_mini.optim.update import ParameterView, StepOptions, accumulate_, reference_

__all__ = ["supports", "unavailable", "update_"]

MIN_CAPABILITY = 8
"""Older devices have no bfloat16."""
MAX_PLANS = 32
"""Plans that are kept: one for each parameter group, and for each set of parameters that had gradients."""


def unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device; None where they can."""
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
    """Why the kernels do not take a tensor, so that the reference updates it; None where they do.

    Args:
        tensor: A parameter, or this rank's part of it, with its state and, if it has one, its gradient.
    """
    return unavailable(tensor.param.device) or refusal(tensor)


def update_(tensors: Sequence[ParameterView], options: StepOptions, *, capturable: bool = False) -> None:
    """One step of Adam-mini on many tensors, in place.

    Args:
        tensors: Parameters with their gradients, blocks and states.
        options: Scalars of this step.
        capturable: Step counts, and `lr` where it is a tensor, stay on the device, so that CUDA graphs can capture the
            step. A graph reads and writes the memory that the tensors had when it was captured.

    Raises:
        RuntimeError: A graph is captured before one step on the same tensors was taken.
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
        shards: Shards of the tensors, held since plans are found by them.
        addresses: Addresses on the device, as `pointers`; int64 (tensors, 4).
        pointers: The addresses that were copied last.
        spare: Page-locked memory for a graph that is captured later, when none can be had; None on the CPU.
    """

    plan: Plan
    shards: list[object]
    addresses: Tensor
    pointers: list[list[int]]
    spare: Tensor | None

    def launch(self, tensors: Sequence[ParameterView], options: Mapping[str, Tensor | float]) -> None:
        """Launch the kernels of the plan.

        Args:
            tensors: The tensors that the plan has taken.
            options: Scalars of this step, by the names of the kernels' arguments.
        """
        addresses = self.addresses_of(tensors)
        # Triton launches on the current device. Its default for fused multiplication and addition differs by version.
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
            # The graph copies its own addresses in each replay: later steps may change those that are kept here.
            if self.spare is None:
                raise RuntimeError("take one step outside the graph before each capture, which sets memory aside")
            locked, self.spare = self.spare.copy_(torch.tensor(pointers, device="cpu")), None
            _CAPTURED.append((self, locked))
            return torch.empty_like(self.addresses).copy_(locked, non_blocking=True)
        if pointers != self.pointers:
            # A new page-locked tensor each time: an earlier copy may still be under way.
            self.addresses.copy_(torch.tensor(pointers, device="cpu", pin_memory=is_cuda), non_blocking=True)
            self.pointers = pointers
        if is_cuda and self.spare is None:
            self.spare = torch.empty(self.addresses.shape, dtype=torch.int64, device="cpu", pin_memory=True)
        return self.addresses


_PREPARED: dict[tuple[object, ...], _Prepared] = {}
_CAPTURED: list[tuple[_Prepared, Tensor]] = []
"""What captured graphs read in every replay, for as long as the process lives: nothing tells when a graph ends."""


def _prepare(tensors: Sequence[ParameterView], device: torch.device) -> _Prepared:
    """The plan for these tensors, made at the first step on them."""
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

    They are computed in float64, on the device only if `capturable`.
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
