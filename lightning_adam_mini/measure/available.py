"""Memory that this process may still take, and the most it has had."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

from lightning_adam_mini.measure.memory import peak_memory_bytes

__all__ = ["available_bytes", "resident_bytes", "resident_peak_bytes"]

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
