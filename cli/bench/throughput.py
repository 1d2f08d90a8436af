"""The largest micro-batch of a language model on one device: predicted, and measured where asked.

The form of Table 2 of Zhang et al. 2024, "Adam-mini: Use Fewer Learning Rates To Gain More": what the optimizer does
not keep is free for a larger micro-batch, and a larger one gives more tokens a second.
"""

from __future__ import annotations

from argparse import Namespace
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_adam_mini.factory import OptimizerFactory
from lightning_adam_mini.measure.memory import RankMemory, activation_peak, largest_batch

from ...tasks.parallel.units import repeated_blocks
from ..model_building import quiet
from .measured import measure_largest
from .models import choose_device, give_memory, trained_bytes
from .results import write_results
from .step_table import align, told_bytes
from .workload import Workload, factories, workload

__all__ = ["predict", "run"]


def run(options: Namespace) -> None:
    """Predict, measure where asked, print the table and write the file.

    Raises:
        ValueError: There is no such model or optimizer, or the model is no language model.
    """
    device = choose_device(options.device)
    load = workload(options)
    result = predict(load, factories(options, load.source), options.memory)
    if options.measure:
        for row in result["rows"]:
            row["measured"] = measure_largest(options, row["optimizer"], str(device), row["predicted"]["batch"])
        result |= {"device": str(device), "threads": options.threads, "sequences": options.sequences}
    write_results(options, result, throughput_table(result, options.memory_text), "throughput")


def predict(load: Workload, optimizers: dict[str, OptimizerFactory], memory: int) -> dict[str, Any]:
    """Bytes on one rank with each optimizer, and the largest micro-batch for a memory.

    Args:
        load: What is trained.
        optimizers: Factories by name.
        memory: Bytes of one device.
    """
    model, dtype = load.source.model, load.parameter_dtype
    if dtype is not torch.float32:
        model.to(dtype)
    parameters = trained_bytes(model)
    blocks = [trained_bytes(block) for block in repeated_blocks(load.network).values()]
    states = {name: made.predict_state_bytes(model) for name, made in optimizers.items()}
    with FakeTensorMode():
        give_memory(model, torch.device("cpu"))

        @cache
        def activations(batch: int) -> int:
            tokens = torch.zeros(batch, load.context, dtype=torch.long)
            with quiet():
                return activation_peak(load.network, load.loss(tokens), [tokens])

        rows = []
        for name, state in states.items():
            if state is None:
                reason = "its state cannot be predicted"
                rows.append({"optimizer": name, "predicted": {"batch": 0, "reason": reason}})
                continue
            rank = RankMemory(parameters, state, parameters - sum(blocks), max(blocks, default=0), load.ranks)
            rows.append({"optimizer": name, "predicted": _fitted(rank, activations, memory)})
    return {
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "memory_bytes": memory,
        "ranks": load.ranks,
        "context": load.context,
        "precision": load.precision,
        "activation_checkpointing": load.checkpointing,
        "rows": rows,
        "warnings": list(load.told),
    }


def _fitted(rank: RankMemory, activations: Any, memory: int) -> dict[str, Any]:
    one, two = activations(1), activations(2)
    guess = 1 + (memory - rank.total - one) // max(two - one, 1)
    batch = largest_batch(lambda size: rank.total + activations(size) <= memory, start=guess)
    figures = {
        "batch": batch,
        "parameter_bytes": rank.parameters // rank.ranks,
        "gradient_bytes": rank.parameters // rank.ranks,
        "state_bytes": rank.state // rank.ranks,
        "gathered_bytes": rank.gathered,
        "activation_bytes": activations(max(batch, 1)),
        "activation_bytes_of_a_further_sequence": two - one,
        "total_bytes": rank.total + activations(max(batch, 1)),
    }
    if batch == 0:
        figures["reason"] = f"even one sequence needs {told_bytes(rank.total + one)}"
    return figures


def throughput_table(result: dict[str, Any], memory: str) -> str:
    """The prediction, and what was measured beside it."""
    is_measured = any("measured" in row for row in result["rows"])
    ranks = f"{result['ranks']} ranks of FSDP2" if result["ranks"] > 1 else "one device"
    told = [
        f"{result['parameters']:,} parameters, {result['context']} tokens a sequence, {result['precision']}, "
        f"activation checkpointing {'on' if result['activation_checkpointing'] else 'off'}, {ranks} of {memory}",
        "",
    ]
    lines = [["optimizer", "micro-batch", "parameters", "gradients", "state", "gathered", "activations", "total"]]
    keys = ("parameter", "gradient", "state", "gathered", "activation", "total")
    for row in result["rows"]:
        figures = row["predicted"]
        cells = [told_bytes(figures[f"{key}_bytes"]) if f"{key}_bytes" in figures else "-" for key in keys]
        lines.append([row["optimizer"], str(figures["batch"]), *cells])
    told += ["predicted, a device:", *align(lines)]
    told += [
        f"{row['optimizer']}: {row['predicted']['reason']}" for row in result["rows"] if "reason" in row["predicted"]
    ]
    if is_measured:
        told += ["", *_measured_lines(result)]
    told += [f"note: {warning}" for warning in result["warnings"]]
    return "\n".join(told)


def _measured_lines(result: dict[str, Any]) -> list[str]:
    lines = [["optimizer", "micro-batch", "peak", "allocated", "micro-batch s", "step s", "tokens/s"]]
    reasons = []
    for row in result["rows"]:
        figures = row["measured"]
        if "tokens_per_second" in figures:
            seconds = [f"{figures['micro_batch_seconds']:.3f}", f"{figures['step_seconds']:.3f}"]
            told = [told_bytes(figures[f"{key}_bytes"]) for key in ("peak", "allocated")]
            cells = [str(figures["batch"]), *told, *seconds]
            lines.append([row["optimizer"], *cells, f"{figures['tokens_per_second']:.1f}"])
        else:
            lines.append([row["optimizer"], "0", *"-----"])
            reasons.append(f"{row['optimizer']}: {figures['reason']}")
    where = f"{result['device']}, threads: {result['threads']}" if result["device"] == "cpu" else result["device"]
    clock = next((row["measured"]["clock"] for row in result["rows"] if "clock" in row["measured"]), "")
    by = ", by CPU time" if clock == "cpu" else ""
    head = f"measured on {where}{by}; tokens/s of a step over {result['sequences']} sequences:"
    return [head, *align(lines), *reasons]
