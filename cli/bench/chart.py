"""The ratios of a measurement as bars with their quartiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...tasks.plots import save_figure
from .contenders import BASELINE
from .step_table import doubtful

__all__ = ["draw_ratios"]

BARS = {"adam-mini-": "tab:blue", "": "tab:gray"}
WORDS = {"cpu": "CPU time", "wall": "time"}


def draw_ratios(path: Path, result: dict[str, Any]) -> None:
    """Bars of the ratios to AdamW fused, by the clock that counts, with whiskers at their quartiles.

    Args:
        path: The PNG.
        result: What `measure` returned, with the machine.
    """
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
    marks = ["~" if doubtful(row, clock) else "" for row in rows]
    axes.bar_label(bars, [f"{mark}{number:.2f}" for mark, number in zip(marks, medians, strict=True)], padding=4)
    for bar, row in zip(bars, rows, strict=True):
        bar.set_alpha(0.5 if doubtful(row, clock) else 1.0)
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
