"""The machine and the versions that a figure was measured with."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = ["cpu_name", "describe_machine", "package_versions"]

_PACKAGES = (
    "lightning-adam-mini", "torch", "lightning", "torchvision", "torch-geometric", "diffusers", "transformers", "timm",
    "pytorch-optimizer", "adam-mini", "numpy", "torchao", "triton",
)  # fmt: skip


def describe_machine() -> dict[str, Any]:
    """`cpu` (name), `cores`, `threads` (of torch), `memory_bytes` (None where the system does not tell), `gpu`."""
    names = "SC_PAGE_SIZE", "SC_PHYS_PAGES"
    known = all(name in getattr(os, "sysconf_names", {}) for name in names)
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf(names[0]) * os.sysconf(names[1]) if known else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def package_versions() -> dict[str, str]:
    """Python and the packages of this field that are installed."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if sys.platform == "linux" and info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
