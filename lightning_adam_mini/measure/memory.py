"""Memory: bytes of optimizer state, and the peak of the process or device. 1 GB is 1e9 bytes."""

from __future__ import annotations

import json
import re
import resource
import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = [
    "LiveMemory",
    "RankMemory",
    "activation_peak",
    "adamw_state_bytes",
    "available_bytes",
    "largest_batch",
    "optimizer_state_bytes",
    "peak_extra_bytes",
    "peak_memory_bytes",
    "resident_bytes",
    "resident_peak_bytes",
]


def optimizer_state_bytes(optimizer: Optimizer) -> int:
    """Bytes of every tensor in the state of any optimizer, as it stands; over all ranks where tensors are sharded."""
    tensors = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def adamw_state_bytes(parameters: Iterable[Tensor]) -> int:
    """Bytes that torch's AdamW keeps for parameters: two moments of their shape and dtype, and a step of 4 bytes."""
    return sum(2 * p.numel() * p.element_size() + 4 for p in parameters if p.requires_grad)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int | None:
    """Free memory of a device, also under the limit of a container; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if sys.platform != "linux":
        return None
    free = _kilobytes(Path("/proc/meminfo"), "MemAvailable")
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if free is None or not (limit.is_file() and used.is_file()):
        return free
    told = limit.read_text("ascii").strip()
    return free if told == "max" else min(free, int(told) - int(used.read_text("ascii")))


def resident_bytes() -> int:
    """Resident memory of this process now; its peak where the system does not tell."""
    return _kilobytes(Path("/proc/self/status"), "VmRSS") or peak_memory_bytes(torch.device("cpu"))


def resident_peak_bytes() -> int:
    """The most resident memory that this program has had; on Linux, what its process was before it does not count."""
    return _kilobytes(Path("/proc/self/status"), "VmHWM") or peak_memory_bytes(torch.device("cpu"))


def _kilobytes(file: Path, name: str) -> int | None:
    if not file.is_file():
        return None
    found = re.search(rf"^{name}:\s+(\d+) kB", file.read_text("ascii"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The peak of allocated bytes during a call, less those before it.

    On the CPU, torch's profiler tells every allocation and release of torch. Resident memory would tell less: pages
    that an allocator keeps are resident before a step as during it. What other libraries allocate by themselves is not
    seen.

    Args:
        call: What is measured; it runs once.
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
    """Bytes of the storages that operations made under this mode and that still live, and their peak.

    Args:
        known: Tensors whose storages are not counted, such as parameters: views of them are made by operations too.
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
    """Peak bytes of a forward and backward pass, without parameters, buffers and whole gradients.

    Gradients are let go as they are complete, so that the peak is what comes on top of them where they are kept, as
    over the micro-batches of a step.

    Args:
        model: The model; on fake tensors, within their mode, nothing is computed.
        loss: Computes the loss.
        inputs: Tensors that are there before, which are not counted.
    """

    def let_go(parameter: Tensor) -> None:
        parameter.grad = None

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [parameter.register_post_accumulate_grad_hook(let_go) for parameter in trained]
    try:
        with LiveMemory([*model.parameters(), *model.buffers(), *inputs]) as memory:
            loss().backward()
    finally:
        for handle in handles:
            handle.remove()
    return memory.peak


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one of `ranks` ranks that FSDP2 shards a model over, before any activation.

    Gradients count in full, as they are there while micro-batches are accumulated. With more than one rank the root
    unit is gathered for the whole pass; of the blocks two are at a time, the one in use and the next, and the gradient
    of one unit is whole before it is reduced.

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
        """Whole parameters and gradients of units in use, beside the shards."""
        return 0 if self.ranks == 1 else self.root + 2 * self.largest_block + max(self.root, self.largest_block)

    @property
    def total(self) -> int:
        """All that is there whatever the batch."""
        return -(-(2 * self.parameters + self.state) // self.ranks) + self.gathered


def largest_batch(fits: Callable[[int], bool], *, start: int = 1, limit: int = 1 << 20) -> int:
    """The largest number for which `fits` holds, 0 where it does not hold for 1; it holds for all below the largest.

    Args:
        fits: Whether a batch of this size fits; each size is asked once.
        start: A first guess; a good one saves calls.
        limit: Where the search ends.
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
