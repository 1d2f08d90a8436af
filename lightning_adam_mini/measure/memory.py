"""Memory in bytes: of optimizer states, of processes and devices, of a step and of a forward and backward pass.

1 GB is 1e9 bytes.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from lightning_adam_mini.blocks import Blocks
from lightning_adam_mini.optim.state import first_moment_bytes, second_moment_dtype

__all__ = [
    "STEP_BYTES",
    "LiveMemory",
    "RankMemory",
    "activation_peak",
    "adam_mini_state_bytes",
    "adamw_state_bytes",
    "available_bytes",
    "format_bytes",
    "largest_batch",
    "optimizer_state_bytes",
    "peak_extra_bytes",
    "peak_memory_bytes",
    "resident_bytes",
    "resident_peak_bytes",
    "step_traffic_bytes",
    "stored_state_bytes",
]

CGROUP = Path("/sys/fs/cgroup")
STEP_BYTES = 4
"""The step count of each parameter, a float32 number."""


def format_bytes(number: float) -> str:
    """Bytes with a unit of a power of 1000: 26.96 GB."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(number) >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number} B"


def optimizer_state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in the present state of an optimizer; of sharded tensors, over all ranks."""
    tensors = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def adam_mini_state_bytes(parameter: Tensor, blocks: Blocks, exp_avg_dtype: torch.dtype | None = None) -> int:
    """Bytes that `AdamMini` keeps for a parameter: a step, its first moment and the second moments of its blocks.

    Args:
        parameter: The parameter.
        blocks: How it is partitioned.
        exp_avg_dtype: As for `AdamMini`.
    """
    first = first_moment_bytes(parameter.shape, parameter.dtype, exp_avg_dtype)
    return STEP_BYTES + first + blocks.num_bytes(second_moment_dtype(parameter))


def adamw_state_bytes(parameters: Iterable[Tensor]) -> int:
    """Bytes that torch's AdamW keeps for trainable parameters: a step, and two moments of their shape and dtype."""
    return sum(STEP_BYTES + 2 * p.numel() * p.element_size() for p in parameters if p.requires_grad)


def stored_state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the tensors that hold an optimizer's state in this process, with all parts of quantized ones.

    `optimizer_state_bytes` counts the logical tensors instead: a sharded one in full, a quantized one by its dtype.
    """
    leaves = tree_leaves(list(optimizer.state.values()))
    return sum(_num_bytes(leaf) for leaf in leaves if isinstance(leaf, Tensor))


def step_traffic_bytes(parameters: Iterable[Tensor], state_bytes: int) -> int:
    """The least that a step can move: parameters and state are read and written once, gradients are read once.

    AdamW moves 28 bytes for each float32 parameter, seven streams; Adam-mini about 20, five streams.

    Args:
        parameters: Parameters of the optimizer, this rank's part of sharded ones; those without gradient do not count.
        state_bytes: Bytes of its state.
    """
    updated = [(p, p.grad) for p in parameters if p.grad is not None]
    return sum(2 * _num_bytes(p) + _num_bytes(grad) for p, grad in updated) + 2 * state_bytes


def _num_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor in this process."""
    return sum(plain.numel() * plain.element_size() for plain in _plain(tensor))


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors inside a tensor subclass, such as a quantized tensor; a plain tensor itself."""
    subclassed: Any = tensor
    if not is_traceable_wrapper_subclass(subclassed):
        yield tensor
        return
    names, _ = subclassed.__tensor_flatten__()
    for name in names:
        if isinstance(part := getattr(tensor, name), Tensor):  # a DTensor names its mesh too
            yield from _plain(part)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes(device: torch.device) -> int | None:
    """Free memory of a device, within the limit of a container; None where the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if sys.platform != "linux":
        return None
    free = _kilobytes(Path("/proc/meminfo"), "MemAvailable")
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if free is None or not (limit.is_file() and used.is_file()):
        return free
    allowed = limit.read_text("ascii").strip()
    return free if allowed == "max" else min(free, int(allowed) - int(used.read_text("ascii")))


def resident_bytes() -> int:
    """Resident memory of this process now; its peak where the system does not report it."""
    return _kilobytes(Path("/proc/self/status"), "VmRSS") or peak_memory_bytes(torch.device("cpu"))


def resident_peak_bytes() -> int:
    """Peak resident memory of this program; on Linux without what the process held before it started Python."""
    return _kilobytes(Path("/proc/self/status"), "VmHWM") or peak_memory_bytes(torch.device("cpu"))


def _kilobytes(file: Path, name: str) -> int | None:
    if not file.is_file():
        return None
    found = re.search(rf"^{name}:\s+(\d+) kB", file.read_text("ascii"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The peak of allocated bytes during a call, less those before it; exact, within this process.

    On the CPU, torch's profiler reports every allocation and release of torch. Resident memory would show less: pages
    that an allocator keeps are resident before the call too. Allocations of other libraries are not counted.

    Args:
        call: The function to measure; it runs once.
        device: Where it allocates.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text("utf-8"))["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


class LiveMemory(TorchDispatchMode):
    """Bytes of the storages that operations created under this mode and that are still alive, and their peak.

    With fake tensors, which have shapes and no data, it predicts the memory of a model without having that memory.

    Args:
        known: Tensors whose storages do not count, such as parameters: operations create views of them too.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._alive = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._alive:
            return
        self._alive.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, storage._cdata, storage.nbytes())

    def _release(self, number: int, num_bytes: int) -> None:
        self._alive.discard(number)
        self.live -= num_bytes


def activation_peak(model: nn.Module, loss: Callable[[], Tensor], inputs: Iterable[Tensor] = ()) -> int:
    """Peak bytes of a forward and backward pass, without parameters, buffers and gradients of parameters.

    It counts the activations that the backward pass needs, what checkpointed blocks compute again, and logits with
    their gradients. Each gradient of a parameter is released when it is complete, so that the peak comes on top of
    gradients that are kept, as over the micro-batches of a step.

    Args:
        model: The model; with fake tensors, within `FakeTensorMode`, nothing is computed.
        loss: Computes the loss.
        inputs: Tensors that exist before, which do not count.
    """

    def release(parameter: Tensor) -> None:
        parameter.grad = None

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [parameter.register_post_accumulate_grad_hook(release) for parameter in trained]
    try:
        with LiveMemory([*model.parameters(), *model.buffers(), *inputs]) as memory:
            loss().backward()
    finally:
        for handle in handles:
            handle.remove()
    return memory.peak


@dataclass(frozen=True)
class RankMemory:
    """Bytes on each of `ranks` ranks that FSDP2 shards a model over, without activations.

    Gradients count, as they exist while micro-batches accumulate. With more than one rank the root is unsharded during
    the whole pass, two blocks are too (the current and the prefetched one), and one unit has an unsharded
    gradient until it is reduced.

    Args:
        parameters: Bytes of all parameters, as of all gradients.
        state: Bytes of the optimizer's state over all ranks.
        root: Bytes of the parameters outside of the repeated blocks.
        largest_block: Bytes of the parameters of the largest block.
        ranks: Number of ranks.
    """

    parameters: int
    state: int
    root: int
    largest_block: int
    ranks: int = 1

    @property
    def gathered(self) -> int:
        """Bytes of unsharded parameters and gradients, on top of the shards."""
        return 0 if self.ranks == 1 else self.root + 2 * self.largest_block + max(self.root, self.largest_block)

    @property
    def total(self) -> int:
        """All bytes that do not depend on the batch."""
        return -(-(2 * self.parameters + self.state) // self.ranks) + self.gathered


def largest_batch(fits: Callable[[int], bool], *, start: int = 1, limit: int = 1 << 20) -> int:
    """The largest batch size that fits, 0 if none does; every size below one that fits must fit.

    Args:
        fits: Whether a batch of this size fits; called once for each size that the search tries.
        start: The first guess; a good one saves calls.
        limit: The largest size to try.
    """
    low, high, step = 0, limit + 1, 1
    guess = min(max(start, 1), limit)
    while high - low > 1:
        if fits(guess):
            low = guess
            guess = low + step if high > limit else (low + high) // 2
        else:
            high = guess
            guess = high - step if low == 0 else (low + high) // 2
        step *= 2
        guess = min(max(guess, low + 1), high - 1)
    return low
