"""Time and collectives of calls, on a machine that may be busy with other work.

The load of a machine changes within seconds. So calls run in rounds, each once a round and in random order, and two
calls are compared by the ratio of their times in the same round.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = [
    "Collectives",
    "Quartiles",
    "Seconds",
    "add_of_bytes",
    "choose_clock",
    "copy_of_bytes",
    "count_collectives",
    "interleave",
    "ratio_of_pairs",
    "spread_of",
    "time_call",
]


class Seconds(NamedTuple):
    """The time of a call."""

    cpu: float
    """CPU time of the process, over all of its threads."""
    wall: float
    """Time between CUDA events on a GPU, else on the clock."""


def choose_clock(device: torch.device) -> str:
    """The field of `Seconds` to compare: CPU time misses waiting threads, wall time includes other processes."""
    return "cpu" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


def time_call(call: Callable[[], object], device: torch.device, *, repeats: int = 1) -> Seconds:
    """Mean seconds of a call over `repeats` calls in a row.

    Args:
        call: The function to time.
        device: Where it computes.
        repeats: Number of calls.
    """
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        cpu = time.process_time()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        cpu = time.process_time() - cpu  # of the launches alone
        torch.cuda.synchronize(device)
        return Seconds(cpu / repeats, start.elapsed_time(end) / 1000 / repeats)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        call()
    return Seconds((time.process_time() - cpu) / repeats, (time.perf_counter() - wall) / repeats)


def interleave(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    seed: int = 0,
    warmup: int = 2,
    shortest: float = 0.02,
) -> dict[str, list[Seconds]]:
    """Time calls in turn, each once a round.

    Args:
        calls: The functions to time, by name.
        device: Where they compute.
        rounds: Number of rounds.
        seed: Seed of the order within the rounds.
        warmup: Calls before the first round; the last one decides how often a short call is repeated.
        shortest: Seconds that a measurement must take; a shorter call is repeated in a row.

    Returns:
        Seconds of one call in each round, by name.
    """
    repeats = {}
    for name, call in calls.items():
        last = [time_call(call, device) for _ in range(max(warmup, 1))][-1]
        repeats[name] = max(1, math.ceil(shortest / max(last.wall, 1e-6)))
    order, generator = list(calls), random.Random(seed)
    times: dict[str, list[Seconds]] = {name: [] for name in calls}
    for _ in range(rounds):
        generator.shuffle(order)
        for name in order:
            times[name].append(time_call(calls[name], device, repeats=repeats[name]))
    return times


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of repeated measurements.

    Args:
        median: The median.
        low: The lower quartile.
        high: The upper quartile.
        number: How many measurements there are.
    """

    median: float
    low: float
    high: float
    number: int

    @property
    def uncertainty(self) -> float:
        """Half of the 95 % interval of the median, relative to it: 1.96 standard deviations of the median.

        The standard deviation is estimated from the quartiles, 1.25 (high - low) / (1.35 sqrt(number)), as for the
        notches of box plots (McGill, Tukey and Larsen 1978, "Variations of Box Plots").
        """
        return 1.96 * 1.25 / 1.35 * (self.high - self.low) / sqrt(self.number) / self.median if self.median else 0.0


def spread_of(values: Sequence[float]) -> Quartiles:
    """Median and quartiles, interpolated as numpy does.

    Raises:
        ValueError: Fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"quartiles need at least two values, got {len(values)}")
    low, _, high = quantiles(values, n=4, method="inclusive")
    return Quartiles(median(values), low, high, len(values))


def ratio_of_pairs(values: Sequence[float], others: Sequence[float]) -> Quartiles:
    """Quartiles of the ratios of values that were measured in the same rounds."""
    return spread_of([value / other for value, other in zip(values, others, strict=True)])


def copy_of_bytes(num_bytes: int, device: torch.device) -> Callable[[], object]:
    """A copy from one tensor of `num_bytes` to another, which moves twice as many bytes."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def add_of_bytes(num_bytes: int, device: torch.device) -> Callable[[], object]:
    """An in-place addition of two tensors of `num_bytes`, which moves three times as many bytes.

    A CPU loads the cache lines that a copy overwrites, so that a copy moves more than its two tensors. An addition in
    place, like an optimizer's step, overwrites what it has read.
    """
    total, other = torch.zeros(num_bytes // 4, device=device), torch.ones(num_bytes // 4, device=device)
    return lambda: total.add_(other)


class Collectives(NamedTuple):
    """Collective operations of a call.

    Args:
        number: How many.
        num_bytes: Bytes of the tensors that this rank passes to them.
    """

    number: int
    num_bytes: int


def count_collectives(call: Callable[[], object]) -> Collectives:
    """Count the collective operations of one call."""
    with _Counter() as counter:
        call()
    return Collectives(counter.number, counter.num_bytes)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.number = self.num_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "wait_tensor" not in func.name():
            self.number += 1
            self.num_bytes += sum(t.numel() * t.element_size() for t in tree_leaves(args) if isinstance(t, Tensor))
        return func(*args, **(kwargs or {}))
