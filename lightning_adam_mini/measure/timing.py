"""Times of calls on a machine that others use too: in turn, in random order, by two clocks.

What else the machine does changes within seconds. So every call runs once a round, in an order that is drawn for each
round, and calls are compared within a round.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

__all__ = [
    "Collectives",
    "Seconds",
    "Spread",
    "add_of_bytes",
    "choose_clock",
    "copy_of_bytes",
    "count_collectives",
    "interleave",
    "ratio_of_pairs",
    "spread_of",
    "step_traffic_bytes",
    "stored_state_bytes",
    "time_call",
]


class Seconds(NamedTuple):
    """How long a call took."""

    cpu: float
    """CPU time of the process, over all of its threads."""
    wall: float
    """Time between CUDA events on a GPU, else on the clock."""


def choose_clock(device: torch.device) -> str:
    """The field of `Seconds` to go by: CPU time misses threads that wait, and the clock counts other processes."""
    return "cpu" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


def time_call(call: Callable[[], object], device: torch.device, *, repeats: int = 1) -> Seconds:
    """Seconds that one of `repeats` calls in a row takes.

    Args:
        call: What is timed.
        device: Where it computes.
        repeats: Number of calls; the result is their mean.
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
        calls: What is timed, by name.
        device: Where they compute.
        rounds: Number of rounds.
        seed: Of the order within the rounds.
        warmup: Calls before the first round; the last of them tells how often a short call is repeated.
        shortest: Seconds that a call must take, or it is repeated in a row until it does.

    Returns:
        Seconds of one call in each round, by name.
    """
    repeats = {}
    for name, call in calls.items():
        last = [time_call(call, device) for _ in range(max(warmup, 1))][-1]
        repeats[name] = max(1, math.ceil(shortest / max(last.wall, 1e-6)))
    order, draw = list(calls), random.Random(seed)
    times: dict[str, list[Seconds]] = {name: [] for name in calls}
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            times[name].append(time_call(calls[name], device, repeats=repeats[name]))
    return times


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of figures that were measured several times.

    Args:
        median: Their median.
        low: Lower quartile.
        high: Upper quartile.
        number: How many there were.
    """

    median: float
    low: float
    high: float
    number: int

    @property
    def uncertainty(self) -> float:
        """Half of the 95 % interval of the median, relative to it: 1.96 standard deviations of the median.

        These are estimated from the quartiles, 1.25 (high - low) / (1.35 root of the number), as for the notches of box
        plots (McGill, Tukey and Larsen 1978, "Variations of Box Plots").
        """
        return 1.96 * 1.25 / 1.35 * (self.high - self.low) / sqrt(self.number) / self.median if self.median else 0.0


def spread_of(figures: Sequence[float]) -> Spread:
    """Median and quartiles, which lie between figures as numpy's do.

    Raises:
        ValueError: Fewer than two figures.
    """
    if len(figures) < 2:
        raise ValueError(f"quartiles need at least two figures, got {len(figures)}")
    low, _, high = quantiles(figures, n=4, method="inclusive")
    return Spread(median(figures), low, high, len(figures))


def ratio_of_pairs(figures: Sequence[float], others: Sequence[float]) -> Spread:
    """Ratios of figures that were measured in the same round, to the other's."""
    return spread_of([figure / other for figure, other in zip(figures, others, strict=True)])


def stored_state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the tensors that hold an optimizer's state in this process; of quantized states, what they are made of.

    `optimizer_state_bytes` counts what the tensors stand for: a sharded one whole, a quantized one as it seems.
    """
    values = (value for state in optimizer.state.values() for value in _tensors(state))
    return sum(map(_num_bytes, values))


def step_traffic_bytes(parameters: Iterable[Tensor], state_bytes: int) -> int:
    """The least a step can move: parameters and state are read and written once, gradients are read once.

    AdamW moves 28 bytes for each float32 parameter, seven streams; Adam-mini about 20, five streams.

    Args:
        parameters: What the optimizer updates, of sharded ones this rank's part; those without gradient are left
            alone.
        state_bytes: Bytes of its state.
    """
    updated = [(p, p.grad) for p in parameters if p.grad is not None]
    return sum(2 * _num_bytes(p) + _num_bytes(grad) for p, grad in updated) + 2 * state_bytes


def copy_of_bytes(num_bytes: int, device: torch.device) -> Callable[[], object]:
    """A copy of one tensor of `num_bytes` to another, which moves twice as many."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def add_of_bytes(num_bytes: int, device: torch.device) -> Callable[[], object]:
    """An addition in place of two tensors of `num_bytes`, which moves three times as many.

    A CPU reads what a copy overwrites before it writes it, so that a copy moves more than its two tensors. A step, as
    this, overwrites what it has read.
    """
    total, other = torch.zeros(num_bytes // 4, device=device), torch.ones(num_bytes // 4, device=device)
    return lambda: total.add_(other)


def _num_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor in this process."""
    return sum(plain.numel() * plain.element_size() for plain in _plain(tensor))


def _tensors(state: object) -> Iterator[Tensor]:
    """Tensors of a state, which some optimizers keep in lists or dictionaries."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors(value)


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The ordinary tensors that one of a subclass, such as a quantized one, is made of."""
    subclassed: Any = tensor
    if not is_traceable_wrapper_subclass(subclassed):
        yield tensor
        return
    names, _ = subclassed.__tensor_flatten__()
    for name in names:
        if isinstance(part := getattr(tensor, name), Tensor):  # a DTensor names its mesh too
            yield from _plain(part)


class Collectives(NamedTuple):
    """Collective operations.

    Args:
        number: How many.
        num_bytes: Bytes of the tensors that this rank gives to them.
    """

    number: int
    num_bytes: int


def count_collectives(call: Callable[[], object]) -> Collectives:
    """Count the collective operations of a call, which is made once."""
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
