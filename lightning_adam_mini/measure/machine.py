"""The machine, the versions of packages, and floating-point operations: of a device and of a Transformer."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = ["cpu_name", "describe_machine", "package_versions", "peak_flops", "transformer_flops_per_token"]

_PACKAGES = (
    "lightning-adam-mini", "torch", "lightning", "torchvision", "torch-geometric", "diffusers", "transformers", "timm",
    "pytorch-optimizer", "adam-mini", "numpy", "torchao", "triton",
)  # fmt: skip


def describe_machine() -> dict[str, Any]:
    """`cpu` (name), `cores`, `threads` (of torch), `memory_bytes` (None where the system does not report it), `gpu`."""
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
    """The processor's name where the system reports it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if sys.platform == "linux" and info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())


DENSE_BF16_PEAKS = {
    "B200": 2.25e15,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
}
"""Dense peaks of NVIDIA's data sheets in FLOP/s with bfloat16 (float16 where there is none); special names first."""


def transformer_flops_per_token(
    *, num_parameters: int, num_layers: int, hidden_size: int, context_length: int
) -> float:
    """FLOPs of a forward and backward pass for one token: `6 N + 12 L d T` (Chowdhery et al. 2022, PaLM, App. B).

    Args:
        num_parameters: Parameters without embeddings that are only looked up.
        num_layers: Number of attention layers `L`.
        hidden_size: Width of attention `d`, heads times head size.
        context_length: Tokens of a sequence `T`.
    """
    return 6.0 * num_parameters + 12.0 * num_layers * hidden_size * context_length


def peak_flops(device: torch.device) -> float | None:
    """Peak dense FLOP/s of a device: from the data sheet for CUDA, from a timed float32 matrix product for the CPU.

    Returns:
        The peak, or None for a device that is not in the table.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for key, peak in DENSE_BF16_PEAKS.items() if re.search(rf"\b{key}\b", name)), None)
    if device.type == "cpu":
        return _measured_matmul_flops()
    return None


def _measured_matmul_flops(size: int = 768, repeats: int = 4) -> float:
    """The best of a few matrix products, after one to warm up."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
