"""Time of an optimizer step beside its peers, on GPT-2 124M's parameters with random gradients.

    OMP_NUM_THREADS=1 python benchmarks/step_time.py --out benchmarks/results/step_time_cpu.json

Optimizers take their steps in turn, so that they share whatever else the machine does; the figures are medians of the
process's CPU time on the CPU, of CUDA events on a GPU, and ratios to torch's fused AdamW.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_adam_mini import AdamMini
from lightning_adam_mini.measure import cpu_name, optimizer_state_bytes


def public_package(model: nn.Module) -> torch.optim.Optimizer:
    from adam_mini import Adam_mini

    return Adam_mini(model.named_parameters(), lr=1e-4, dim=768, n_heads=12, verbose=False)


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW fused": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True),
    "AdamW foreach": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-4, foreach=True),
    "adam-mini 1.1.1": public_package,
    "ours, reference": lambda m: AdamMini(m, lr=1e-4, implementation="reference"),
    "ours, foreach": lambda m: AdamMini(m, lr=1e-4, implementation="foreach"),
    "ours, foreach, rank one": lambda m: AdamMini(m, lr=1e-4, partition="transformer_rank_one"),
}


def seconds(step: Callable[[], object], device: torch.device) -> float:
    """One step: CPU seconds of the process, or seconds between CUDA events."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    start_time = time.process_time()
    step()
    return time.process_time() - start_time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    device = torch.device(options.device)

    model = GPT2LMHeadModel(GPT2Config(n_layer=options.layers)).to(device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    optimizers = {name: build(model) for name, build in OPTIMIZERS.items()}
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for round_number in range(options.rounds + 1):
        for name, optimizer in optimizers.items():
            elapsed = seconds(optimizer.step, device)
            if round_number:  # the first step makes state and warms caches
                times[name].append(elapsed)
    fused = times["AdamW fused"]
    result = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "adam-mini")},
        "rows": [
            {
                "optimizer": name,
                "milliseconds": 1000 * median(values),
                "ratio_to_fused_adamw": median(a / b for a, b in zip(values, fused, strict=True)),
                "state_bytes": optimizer_state_bytes(optimizers[name]),
            }
            for name, values in times.items()
        ],
    }
    for row in result["rows"]:
        print(f"{row['optimizer']:<26} {row['milliseconds']:9.1f} ms  x {row['ratio_to_fused_adamw']:.2f}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
