"""What a measurement leaves: tables on standard output, a chart, and files that say how they were made."""

from __future__ import annotations

import json
import logging
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning_adam_mini.measure import describe_machine, package_versions
from lightning_adam_mini.measure.memory import format_bytes

from ...tasks.atomic_files import write_text
from ...tasks.plots import save_figure
from ..tables import text_table
from .contenders import BASELINE

__all__ = ["step_table", "throughput_table", "write_results"]

log = logging.getLogger(__name__)

TRUSTED = 0.05
"""A ratio is marked if its 95 % interval is wider than this part of it, to either side."""
VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
BARS = {"adam-mini-": "tab:blue", "": "tab:gray"}
WORDS = {"cpu": "CPU time", "wall": "time"}


def write_results(options: Namespace, result: dict[str, Any], table: str, name: str, *, draws: bool = False) -> None:
    """Print the table; with `--out`, write NAME.json and the chart.

    Args:
        options: Of the command line, with the `command` itself.
        result: The measured values.
        table: The same as text.
        name: Stem of the files.
        draws: Whether there is a chart, of `result` from `measure`.
    """
    log.info("%s", table)
    if options.out is None:
        return
    made = {
        "command": options.command,
        "model": options.model,
        "source": options.source,
        **result,
        "hardware": describe_machine(),
        "versions": package_versions(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
    files = [options.out / f"{name}.json"]
    write_text(files[0], json.dumps(made, indent=1) + "\n")
    if draws:
        files.append(options.out / f"{name}.png")
        _draw_ratios(files[1], made)
    log.info("%s", f"\nwrote {' and '.join(map(str, files))}")


# Step times


def step_table(result: dict[str, Any]) -> str:
    """The rows of optimizers, the reasons of those that did not run, and a warning about unreliable ratios."""
    is_gpu = result["device"].startswith("cuda")
    clocks = ["wall"] if is_gpu else ["cpu", "wall"]
    words = {"cpu": "CPU", "wall": "GPU" if is_gpu else "wall"}
    head = ["optimizer", *(f"{words[clock]} ms" for clock in clocks)]
    head += [f"x {words[clock]} (quartiles)" for clock in clocks]
    head += ["streams", "GB/s", "of best", "state", "extra memory"]
    is_sharded = result["ranks"] > 1
    if is_sharded:
        head.append("collectives")
    rows = [head]
    timed = [row for row in result["rows"] if "cpu" in row]
    rows += [
        [
            row["label"],
            *(f"{1000 * row[clock]['seconds']['median']:.2f}" for clock in clocks),
            *(_ratio(row, clock) for clock in clocks),
            f"{row['streams']:.2f}",
            f"{row['bytes_per_second'] / 1e9:.1f}",
            f"{100 * row['share_of_bandwidth']:.0f} %",
            format_bytes(row["state_bytes"]),
            format_bytes(row["peak_extra_bytes"]),
            *([_collectives(row)] if is_sharded else []),
        ]
        for row in timed
    ]
    threads = f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}"
    where = "GPU" if is_gpu else threads
    copy, add = (number / 1e9 for number in result["bytes_per_second"].values())
    sharded = f", one of {result['ranks']} ranks whose collectives send nothing" if is_sharded else ""
    lines = [
        f"{result['parameters']:,} parameters in {result['tensors']} tensors, {result['dtype']}, on {where}{sharded}, "
        f"{result['rounds']} rounds; a copy moves {copy:.1f} GB/s, an in-place addition {add:.1f} GB/s",
        "",
        *text_table(rows),
    ]
    lines += [f"{row['label']}: not run: {row['reason']}" for row in result["rows"] if "reason" in row]
    if marked := [row for row in timed if any(_is_doubtful(row, clock) for clock in clocks)]:
        names = ", ".join(row["label"] for row in marked)
        lines += [
            "",
            f"~ the spread is too large to trust the ratio to {100 * TRUSTED:.0f} %: {names}; give more --rounds, or "
            "wait until the machine is quiet",
        ]
    return "\n".join(lines)


def _is_doubtful(row: dict[str, Any], clock: str) -> bool:
    """Whether the spread of a row's ratio is too large to trust it to 5 %."""
    return bool(row[clock]["ratio"]["uncertainty"] > TRUSTED)


def _collectives(row: dict[str, Any]) -> str:
    return "-" if row["collectives"] is None else f"{row['collectives']}, {format_bytes(row['collective_bytes'])}"


def _ratio(row: dict[str, Any], clock: str) -> str:
    ratio = row[clock]["ratio"]
    mark = "~" if _is_doubtful(row, clock) else ""
    return f"{mark}{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"


def _draw_ratios(path: Path, result: dict[str, Any]) -> None:
    """Bars of the ratios to AdamW fused, by the decisive clock, with whiskers at their quartiles."""
    from matplotlib.figure import Figure

    clock = result["clock"]
    rows = [row for row in result["rows"] if clock in row]
    ratios = [row[clock]["ratio"] for row in rows]
    medians = [ratio["median"] for ratio in ratios]
    whiskers = [
        [ratio["median"] - ratio["low"] for ratio in ratios],
        [ratio["high"] - ratio["median"] for ratio in ratios],
    ]
    colors = [next(color for prefix, color in BARS.items() if row["optimizer"].startswith(prefix)) for row in rows]
    figure = Figure(figsize=(8, 1.2 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([row["label"] for row in rows], medians, xerr=whiskers, color=colors, capsize=3)
    marks = ["~" if _is_doubtful(row, clock) else "" for row in rows]
    axes.bar_label(bars, [f"{mark}{number:.2f}" for mark, number in zip(marks, medians, strict=True)], padding=4)
    for bar, row in zip(bars, rows, strict=True):
        bar.set_alpha(0.5 if _is_doubtful(row, clock) else 1.0)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(
        f"{WORDS[clock]} of a step, as ratio to {BASELINE}; median and quartiles of {result['rounds']} rounds"
    )
    hardware = result["hardware"]
    is_gpu = result["device"].startswith("cuda")
    place = hardware["gpu"] if is_gpu else f"{hardware['cpu']}, threads: {result['threads']}"
    axes.set_title(f"{result['parameters']:,} parameters, {result['dtype']}, on {place}", fontsize=10)
    save_figure(figure, path)


# Throughput


def throughput_table(result: dict[str, Any], memory: str) -> str:
    """The prediction, and the measurement if there is one."""
    ranks = f"{result['ranks']} ranks of FSDP2" if result["ranks"] > 1 else "one device"
    rows = [["optimizer", "micro-batch", "parameters", "gradients", "state", "gathered", "activations", "total"]]
    keys = ("parameter", "gradient", "state", "gathered", "activation", "total")
    for row in result["rows"]:
        predicted = row["predicted"]
        cells = [format_bytes(predicted[f"{key}_bytes"]) if f"{key}_bytes" in predicted else "-" for key in keys]
        rows.append([row["optimizer"], str(predicted["batch"]), *cells])
    lines = [
        f"{result['parameters']:,} parameters, {result['context']} tokens a sequence, {result['precision']}, "
        f"activation checkpointing {'on' if result['activation_checkpointing'] else 'off'}, {ranks} of {memory}",
        "",
        "predicted, per device:",
        *text_table(rows),
        *_reasons(result, "predicted"),
    ]
    if any("measured" in row for row in result["rows"]):
        lines += ["", *_measured_lines(result)]
    return "\n".join([*lines, *(f"note: {warning}" for warning in result["warnings"])])


def _measured_lines(result: dict[str, Any]) -> list[str]:
    rows = [["optimizer", "micro-batch", "peak", "allocated", "micro-batch s", "step s", "tokens/s"]]
    for row in result["rows"]:
        measured = row["measured"]
        if "tokens_per_second" in measured:
            memory = [format_bytes(measured[f"{key}_bytes"]) for key in ("peak", "allocated")]
            seconds = [f"{measured['micro_batch_seconds']:.3f}", f"{measured['step_seconds']:.3f}"]
            cells = [str(measured["batch"]), *memory, *seconds, f"{measured['tokens_per_second']:.1f}"]
        else:
            cells = ["0", *"-----"]
        rows.append([row["optimizer"], *cells])
    where = f"{result['device']}, threads: {result['threads']}" if result["device"] == "cpu" else result["device"]
    clock = next((row["measured"]["clock"] for row in result["rows"] if "clock" in row["measured"]), "")
    by = ", by CPU time" if clock == "cpu" else ""
    head = f"measured on {where}{by}; tokens/s of a step over {result['sequences']} sequences:"
    return [head, *text_table(rows), *_reasons(result, "measured")]


def _reasons(result: dict[str, Any], kind: str) -> list[str]:
    """Why there is no batch."""
    return [f"{row['optimizer']}: {row[kind]['reason']}" for row in result["rows"] if "reason" in row[kind]]
