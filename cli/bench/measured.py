"""The largest micro-batch that fits here, run: each batch in a process of its own, whose memory is its alone."""

from __future__ import annotations

from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from statistics import median
from typing import Any

import torch

from lightning_adam_mini.measure.memory import (
    largest_batch,
    peak_extra_bytes,
    resident_bytes,
    resident_peak_bytes,
    stored_state_bytes,
)
from lightning_adam_mini.measure.timing import choose_clock, time_call

from .models import give_memory, trained_bytes
from .step_table import told_bytes
from .workload import factories, workload

__all__ = ["measure_largest", "run_batch"]

REPEATS = 3


def measure_largest(options: Namespace, optimizer: str, device: str, start: int) -> dict[str, Any]:
    """The largest micro-batch within the memory of the options, and its throughput.

    Args:
        options: Of the command line.
        optimizer: Name of the optimizer.
        device: Where to run.
        start: The predicted batch, which the search begins with.
    """
    runs: dict[int, dict[str, Any]] = {}

    def fits(batch: int) -> bool:
        runs[batch] = _in_own_process(options, optimizer, device, batch)
        return runs[batch].get("peak_bytes", options.memory + 1) <= options.memory

    batch = largest_batch(fits, start=start)
    if batch == 0:
        peak = runs[1].get("peak_bytes")
        return {"batch": 0, "reason": f"even one sequence needs {told_bytes(peak)}" if peak else runs[1]["reason"]}
    figures = runs[batch]
    # As many whole micro-batches as the sequences need, and one step of the optimizer.
    number = -(-options.sequences // batch)
    tokens = number * batch * figures["context"]
    seconds = number * figures["micro_batch_seconds"] + figures["step_seconds"]
    return {"batch": batch, **figures, "tokens_per_second": tokens / seconds}


def run_batch(options: Namespace, optimizer: str, device_name: str, batch: int) -> dict[str, Any]:
    """Train for a few micro-batches and steps; the figures of this process.

    Returns:
        `peak_bytes`, on CUDA what torch allocated, else by how much resident memory has grown since before the model
        was made, which includes what the allocator holds back; `allocated_bytes`, what torch itself had at the peak of
        a pass; `micro_batch_seconds` of a forward and backward pass and `step_seconds`, medians; `context`. Or the
        `reason` why there are none.
    """
    device = torch.device(device_name)
    torch.set_num_threads(options.threads)
    load = workload(options)
    model = load.source.model
    partition = options.partition if optimizer == "AdamMini" else None
    made = factories(Namespace(optimizers=[optimizer], partition=partition), load.source)
    torch.manual_seed(0)
    _load_libraries(device)
    clock = choose_clock(device)
    passes: list[float] = []
    steps: list[float] = []
    try:
        before = 0 if device.type == "cuda" else resident_bytes()
        if load.parameter_dtype is not torch.float32:
            model.to(load.parameter_dtype)
        give_memory(model, device)
        tokens = torch.randint(0, load.vocab_size, (batch, load.context), device=device)
        loss, stepper = load.loss(tokens), made[optimizer].build(model)

        def run_pass() -> None:
            loss().backward()

        for _ in range(1 + REPEATS):
            # The second meets gradients that are there, as micro-batches of a step do.
            passes += [getattr(time_call(run_pass, device), clock) for _ in range(2)]
            steps.append(getattr(time_call(stepper.step, device), clock))
            stepper.zero_grad()
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_peak_bytes() - before
        run_pass()
        allocated = 2 * trained_bytes(model) + stored_state_bytes(stepper) + peak_extra_bytes(run_pass, device)
    except torch.OutOfMemoryError as error:
        return {"reason": " ".join(str(error).split())[:200]}
    figures = {"micro_batch_seconds": median(passes[2:]), "step_seconds": median(steps[1:])}
    return {"peak_bytes": peak, "allocated_bytes": allocated, "context": load.context, "clock": clock, **figures}


def _in_own_process(options: Namespace, optimizer: str, device: str, batch: int) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(run_batch, options, optimizer, device, batch).result()
        except BrokenProcessPool:
            return {"reason": "the process was killed, as a rule for want of memory"}


def _load_libraries(device: torch.device) -> None:
    """What torch loads and sets up at its first matrix product, backward pass and step, before memory is counted."""
    weight = torch.ones(64, 64, device=device, requires_grad=True)
    (weight @ weight).sum().backward()
    torch.optim.AdamW([weight]).step()
