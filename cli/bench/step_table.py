"""The table of step times, as text."""

from __future__ import annotations

from typing import Any

__all__ = ["TRUSTED", "align", "doubtful", "step_table", "told_bytes"]

TRUSTED = 0.05
"""A ratio is told without a mark where its 95 % interval is within this part of it."""


def doubtful(row: dict[str, Any], clock: str) -> bool:
    """Whether the spread of a row's ratio is too large to trust it to 5 %."""
    return bool(row[clock]["ratio"]["uncertainty"] > TRUSTED)


def step_table(result: dict[str, Any]) -> str:
    """Rows of optimizers, those that did not run with the reason, and what to make of the figures."""
    is_gpu = result["device"].startswith("cuda")
    clocks = ["wall"] if is_gpu else ["cpu", "wall"]
    words = {"cpu": "CPU", "wall": "GPU" if is_gpu else "wall"}
    head = ["optimizer", *(f"{words[clock]} ms" for clock in clocks)]
    head += [f"x {words[clock]} (quartiles)" for clock in clocks]
    head += ["streams", "GB/s", "of best", "state", "extra memory"]
    is_sharded = result["ranks"] > 1
    if is_sharded:
        head.append("collectives")
    lines = [head]
    timed = [row for row in result["rows"] if "cpu" in row]
    lines += [
        [
            row["label"],
            *(f"{1000 * row[clock]['seconds']['median']:.2f}" for clock in clocks),
            *(_ratio(row, clock) for clock in clocks),
            f"{row['streams']:.2f}",
            f"{row['bytes_per_second'] / 1e9:.1f}",
            f"{100 * row['share_of_bandwidth']:.0f} %",
            told_bytes(row["state_bytes"]),
            told_bytes(row["peak_extra_bytes"]),
            *([_collectives(row)] if is_sharded else []),
        ]
        for row in timed
    ]
    threads = f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}"
    where = "GPU" if is_gpu else threads
    copy, add = (number / 1e9 for number in result["bytes_per_second"].values())
    sharded = f", one of {result['ranks']} ranks whose collectives send nothing" if is_sharded else ""
    told = [
        f"{result['parameters']:,} parameters in {result['tensors']} tensors, {result['dtype']}, on {where}{sharded}, "
        f"{result['rounds']} rounds; a copy moves {copy:.1f} GB/s, an addition in place {add:.1f} GB/s",
        "",
        *align(lines),
    ]
    told += [f"{row['label']}: not run: {row['reason']}" for row in result["rows"] if "reason" in row]
    if marked := [row for row in timed if any(doubtful(row, clock) for clock in clocks)]:
        names = ", ".join(row["label"] for row in marked)
        told += [
            "",
            f"~ the spread is too large to trust the ratio to {100 * TRUSTED:.0f} %: {names}; give more --rounds, or "
            "wait until the machine is quiet",
        ]
    return "\n".join(told)


def align(lines: list[list[str]]) -> list[str]:
    """Columns of equal width: the first from the left, the others from the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(cell.ljust(width) if not number else cell.rjust(width) for number, (cell, width) in enumerate(row))
        for row in (zip(line, widths, strict=True) for line in lines)
    ]


def told_bytes(number: float) -> str:
    """Bytes in the unit that fits, 1 GB being 1e9."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f} B"


def _collectives(row: dict[str, Any]) -> str:
    return "-" if row["collectives"] is None else f"{row['collectives']}, {told_bytes(row['collective_bytes'])}"


def _ratio(row: dict[str, Any], clock: str) -> str:
    ratio = row[clock]["ratio"]
    mark = "~" if doubtful(row, clock) else ""
    return f"{mark}{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"
