"""Step times of several optimizers on one model, side by side."""

from __future__ import annotations

import gc
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_adam_mini.measure.allocations import peak_extra_bytes
from lightning_adam_mini.measure.available import available_bytes
from lightning_adam_mini.measure.collectives import count_collectives
from lightning_adam_mini.measure.spread import ratio_of_pairs, spread_of
from lightning_adam_mini.measure.timing import Seconds, choose_clock, interleave, time_call
from lightning_adam_mini.measure.traffic import add_of_bytes, copy_of_bytes, step_traffic_bytes, stored_state_bytes
from lightning_adam_mini.optim.distributed import local

from ..model_building import Source
from .contenders import BASELINE, Contender, choose
from .models import choose_device, give_memory, outline, trained_bytes
from .ranks import one_of_ranks, shard_with_memory
from .results import check_drawing, write_results
from .step_table import step_table

__all__ = ["measure", "run"]

GRADIENT_STD = 1e-3
COPY, ADD = "copy", "add in place"
COPY_BYTES = 256 << 20
"""Larger than most caches."""


def run(options: Namespace) -> None:
    """Measure, print the table, and write the files.

    Raises:
        ValueError: There is no such model or optimizer, or it does not fit into memory.
    """
    if options.out is not None:
        check_drawing()
    device = choose_device(options.device)
    torch.set_num_threads(options.threads)
    source = outline(options)
    contenders = choose(options.optimizers, source, options.partition)
    with one_of_ranks(options.ranks):
        result = measure(source, contenders, options, device)
    write_results(options, result, step_table(result), "bench", draws=True)


def measure(
    source: Source, contenders: Sequence[Contender], options: Namespace, device: torch.device
) -> dict[str, Any]:
    """Times, bytes and memory of each contender; the model gets memory and random content.

    Args:
        source: The model, on the meta device.
        contenders: Optimizers, the baseline first.
        options: Of the command line.
        device: Where to measure.

    Raises:
        ValueError: Not even two optimizers fit into memory, or the baseline fails.
    """
    dtype = getattr(torch, options.dtype) if options.dtype else None
    turns = list(_turns(contenders, trained_bytes(source.model, dtype), available_bytes(device)))
    torch.manual_seed(options.seed)
    if options.ranks > 1:
        shard_with_memory(source.model, options.ranks, device, dtype)
    else:
        give_memory(source.model, device, dtype)
    parameters = [parameter for parameter in source.model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
        local(parameter.grad).normal_(0.0, GRADIENT_STD)
    rows: list[dict[str, Any]] = []
    bandwidths: dict[str, float] = {}
    for turn in turns:
        found, moved = _measure_turn(source, turn, parameters, options, device)
        gc.collect()  # the states of this turn make room for those of the next
        bandwidths = bandwidths or moved
        rows += found if not rows else found[1:]  # the baseline runs in each turn and is shown once
    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "tensors": len(parameters),
        "dtype": str(parameters[0].dtype).removeprefix("torch."),
        "gradients": f"normal, deviation {GRADIENT_STD}, the same in all rounds",
        "device": str(device),
        "ranks": options.ranks,
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "seed": options.seed,
        "clock": choose_clock(device),
        "groups": len(turns),
        "bytes_per_second": bandwidths,
        "rows": rows,
    }


def _turns(contenders: Sequence[Contender], model_bytes: int, free: int | None) -> Iterator[Sequence[Contender]]:
    """Contenders whose states fit into memory at a time, each turn with the baseline.

    Parameters and gradients are shared. A state takes two parameters at most, and a step's temporaries take two.

    Raises:
        ValueError: Not even two fit.
    """
    baseline, *others = contenders
    if free is None:
        number = len(contenders)
    else:
        number = min((free - 4 * model_bytes - 4 * COPY_BYTES) // max(2 * model_bytes, 1), len(contenders))
        if number < min(2, len(contenders)):
            needed = (4 + 2 * min(2, len(contenders))) * model_bytes + 4 * COPY_BYTES
            raise ValueError(
                f"the model needs {needed / 1e9:.1f} GB here with gradients and the states of two optimizers, and "
                f"{free / 1e9:.1f} GB are free; take a smaller model, or --dtype bfloat16"
            )
    if not others:
        yield [baseline]
    size = max(number - 1, 1)
    for start in range(0, len(others), size):
        yield [baseline, *others[start : start + size]]


def _measure_turn(
    source: Source, turn: Sequence[Contender], parameters: list[nn.Parameter], options: Namespace, device: torch.device
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of contenders that keep their states at the same time, and the bytes a second that the machine moves."""
    rows: list[dict[str, Any]]
    rows = [{"label": entry.label, "optimizer": entry.name, "partition": entry.partition} for entry in turn]
    optimizers: dict[str, Optimizer] = {}
    for entry, row in zip(turn, rows, strict=True):
        start = time.perf_counter()
        try:
            optimizer = entry.build(source)
            time_call(optimizer.step, device)  # makes lazy states, and compiles what is compiled
        except Exception as error:  # of any library: the row says it, and the others go on
            row["reason"] = _reason(error)
            if entry.name == BASELINE:
                raise ValueError(f"{BASELINE}, which ratios are to, failed: {row['reason']}") from error
            continue
        row["first_step_seconds"] = time.perf_counter() - start
        optimizers[entry.label] = optimizer
    probes = {COPY: copy_of_bytes(COPY_BYTES, device), ADD: add_of_bytes(COPY_BYTES, device)}
    steps: dict[str, Callable[[], object]] = {label: optimizer.step for label, optimizer in optimizers.items()}
    times = interleave({**steps, **probes}, device, rounds=options.rounds, seed=options.seed)
    clock = choose_clock(device)
    moved = {COPY: 2 * COPY_BYTES, ADD: 3 * COPY_BYTES}
    bandwidths = {name: count / median(getattr(t, clock) for t in times[name]) for name, count in moved.items()}
    for row in rows:
        if row["label"] not in optimizers:
            continue
        optimizer = optimizers[row["label"]]
        state = stored_state_bytes(optimizer)
        traffic = step_traffic_bytes(parameters, state)
        row |= _figures(times[row["label"]], times[BASELINE], traffic, clock)
        row["share_of_bandwidth"] = row["bytes_per_second"] / max(bandwidths.values())
        row["state_bytes"] = state
        row["streams"] = traffic / sum(local(p).numel() * p.element_size() for p in parameters)
        row["peak_extra_bytes"] = peak_extra_bytes(optimizer.step, device)
        if options.ranks > 1:
            row |= _collectives(optimizer)
    return rows, bandwidths


def _figures(times: list[Seconds], baseline: list[Seconds], num_bytes: int, clock: str) -> dict[str, Any]:
    """Seconds and ratios by both clocks, and the bandwidth by the one that counts."""
    figures: dict[str, Any] = {}
    for name in Seconds._fields:
        own, other = ([getattr(seconds, name) for seconds in column] for column in (times, baseline))
        ratio = ratio_of_pairs(own, other)
        figures[name] = {
            "seconds": _as_dict(spread_of(own)),
            "ratio": {**_as_dict(ratio), "uncertainty": ratio.uncertainty},
            "rounds": own,
        }
    figures["traffic_bytes"] = num_bytes
    figures["bytes_per_second"] = num_bytes / figures[clock]["seconds"]["median"]
    return figures


def _collectives(optimizer: Optimizer) -> dict[str, int | None]:
    """Collectives of a step and their bytes; None for steps that torch compiles, which nothing may look into."""
    try:
        found = count_collectives(optimizer.step)
    except RuntimeError:
        return {"collectives": None, "collective_bytes": None}
    return {"collectives": found.number, "collective_bytes": found.num_bytes}


def _as_dict(spread: Any) -> dict[str, float]:
    return {"median": spread.median, "low": spread.low, "high": spread.high}


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text[:160]}"
