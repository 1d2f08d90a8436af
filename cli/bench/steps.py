"""Step times of several optimizers on one model, side by side."""

from __future__ import annotations

import gc
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from lightning_adam_mini.hints import require_package
from lightning_adam_mini.measure.memory import available_bytes, peak_extra_bytes, step_traffic_bytes, stored_state_bytes
from lightning_adam_mini.measure.timing import (
    Seconds,
    add_of_bytes,
    choose_clock,
    copy_of_bytes,
    count_collectives,
    interleave,
    ratio_of_pairs,
    spread_of,
    time_call,
)
from lightning_adam_mini.optim.distributed import local

from ...tasks.parallel.sharding import shard_model
from ..models import SOURCES, Source
from ..runnable_models import WEIGHT_STD, choose_device, give_memory, trained_bytes
from .contenders import BASELINE, Contender, choose
from .results import step_table, write_results

__all__ = ["measure", "run"]

GRADIENT_STD = 1e-3
COPY, ADD = "copy", "add in place"
COPY_BYTES = 256 << 20
"""More than most caches hold."""


def run(options: Namespace) -> None:
    """Measure, print the table, and write the files.

    Raises:
        ValueError: There is no such model or optimizer, or it does not fit into memory.
    """
    if options.out is not None:
        require_package("matplotlib", "--out")
    device = choose_device(options.device)
    torch.set_num_threads(options.threads)
    source = SOURCES[options.source](options.model)
    contenders = choose(options.optimizers, source, options.partition)
    with _first_of_ranks(options.ranks):
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
        _shard_with_memory(source.model, options.ranks, device, dtype)
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
        gc.collect()  # frees the states of this turn before the next
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
    """Groups of contenders whose states fit into memory at the same time, each with the baseline.

    Parameters and gradients are shared. A state takes the bytes of the parameters twice at most, and so do the
    temporary tensors of a step.

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
        except Exception as error:  # any library may raise anything: the row reports it, and the others go on
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
        row |= _values(times[row["label"]], times[BASELINE], traffic, clock)
        row["share_of_bandwidth"] = row["bytes_per_second"] / max(bandwidths.values())
        row["state_bytes"] = state
        row["streams"] = traffic / sum(local(p).numel() * p.element_size() for p in parameters)
        row["peak_extra_bytes"] = peak_extra_bytes(optimizer.step, device)
        if options.ranks > 1:
            row |= _collectives(optimizer)
    return rows, bandwidths


def _values(times: list[Seconds], baseline: list[Seconds], num_bytes: int, clock: str) -> dict[str, Any]:
    """Seconds and ratios by both clocks, and the bandwidth by the decisive one."""
    values: dict[str, Any] = {}
    for name in Seconds._fields:
        own, other = ([getattr(seconds, name) for seconds in column] for column in (times, baseline))
        ratio = ratio_of_pairs(own, other)
        values[name] = {
            "seconds": _as_dict(spread_of(own)),
            "ratio": {**_as_dict(ratio), "uncertainty": ratio.uncertainty},
            "rounds": own,
        }
    values["traffic_bytes"] = num_bytes
    values["bytes_per_second"] = num_bytes / values[clock]["seconds"]["median"]
    return values


def _collectives(optimizer: Optimizer) -> dict[str, int | None]:
    """Collectives of a step and their bytes; None for compiled steps, in which no dispatch mode can count."""
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


@contextmanager
def _first_of_ranks(ranks: int) -> Iterator[None]:
    """A fake process group: this is the first of `ranks`, the others do not exist, and collectives send nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if ranks == 1:
        yield
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _shard_with_memory(model: nn.Module, ranks: int, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Shard a model on the meta device in place as FSDP2 does, and give its own shards random content."""
    from torch.distributed.device_mesh import init_device_mesh

    if dtype is not None:
        model.to(dtype)
    shard_model(model, init_device_mesh(device.type, (ranks,)))
    model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            local(parameter).normal_(0.0, WEIGHT_STD)
        for buffer in model.buffers():
            buffer.zero_()
