"""Times of calls on a machine that others use too: in turn, in random order, by two clocks.

What else the machine does changes within seconds. So every call runs once a round, in an order that is drawn for each
round, and calls are compared within a round.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

__all__ = ["Seconds", "choose_clock", "interleave", "time_call"]


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
