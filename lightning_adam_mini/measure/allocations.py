"""The most memory that a call allocates on top of what there was, exact and without a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["peak_extra_bytes"]


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
