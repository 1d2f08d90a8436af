"""One run of a comparison, as its folder tells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = ["Costs", "Point", "PrimaryMetric", "RunResult", "Status"]

Status = Literal["done", "diverged", "failed", "timeout", "interrupted", "pending"]
"""How a run ended; `pending` has not begun, or is not yet over."""


@dataclass(frozen=True, kw_only=True)
class PrimaryMetric:
    """The figure that runs of a task are compared by.

    Args:
        metric: Its name; the last value of a run counts.
        mode: Whether less (`min`) or more (`max`) is better.
        label: Its name for readers.
        curve: The metric of each validation that is drawn over steps; `metric` itself where a task names no other.
        curve_label: Its name for readers.
    """

    metric: str = "val_loss"
    mode: Literal["min", "max"] = "min"
    label: str = "validation loss"
    curve: str = "val_loss"
    curve_label: str = "validation loss"


@dataclass(frozen=True)
class Point:
    """One value of a curve.

    Args:
        step: Optimizer steps taken.
        seconds: Seconds of training until then, without validation; None where a run did not log them.
        value: The value.
    """

    step: int
    seconds: float | None
    value: float


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a run cost on one rank; None where it is not known. Names are those of `result.json`.

    Args:
        step_milliseconds: Time of a training step.
        optimizer_milliseconds: Of it the optimizer's update.
        units_per_second: Throughput over all ranks.
        unit: What throughput counts: samples, tokens, nodes.
        peak_memory_bytes: Peak memory, measured.
        optimizer_state_bytes: The optimizer's state, measured.
        predicted_state_bytes: The same, predicted from the shapes before training.
        adamw_state_bytes: AdamW's state for the same model, predicted.
        parameters: Number of parameters.
        parameter_bytes: Their bytes.
        training_seconds: Seconds of all training steps, without validation.
    """

    step_milliseconds: float | None = None
    optimizer_milliseconds: float | None = None
    units_per_second: float | None = None
    unit: str | None = None
    peak_memory_bytes: float | None = None
    optimizer_state_bytes: float | None = None
    predicted_state_bytes: float | None = None
    adamw_state_bytes: float | None = None
    parameters: float | None = None
    parameter_bytes: float | None = None
    training_seconds: float | None = None

    @property
    def predicted_memory_bytes(self) -> float | None:
        """Parameters, gradients of the same size and the optimizer's state, predicted; activations are not in it."""
        if self.parameter_bytes is None or self.predicted_state_bytes is None:
            return None
        return 2 * self.parameter_bytes + self.predicted_state_bytes


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One run of the grid, whether it came to its end or not.

    Args:
        recipe: The recipe as the user named it.
        optimizer: Label of the optimizer.
        lr: Peak learning rate.
        seed: Seed of the run.
        folder: The run folder.
        status: How it ended.
        message: Why it did not end well; empty otherwise.
        value: PrimaryMetric figure; None unless the run is done.
        selection: Figure that learning rates are chosen by, which is never one of a test; None unless the run is done.
        steps: Optimizer steps taken; None where it left no result.
        curve: The curve of the primary metric, one point a validation.
        costs: What it cost.
        hardware: As `result.json` has it.
        versions: As `result.json` has it.
        command: The command of the run, as a user would type it.
        wall_seconds: Seconds from the start of the process to its end, of all starts together.
        num_jobs: Runs at a time, itself among them; None where that was not recorded or there was no limit.
        launcher: What started it, `local` or `submitit`; None where that was not recorded.
    """

    recipe: str
    optimizer: str
    lr: float
    seed: int
    folder: Path
    status: Status
    message: str = ""
    value: float | None = None
    selection: float | None = None
    steps: int | None = None
    curve: tuple[Point, ...] = ()
    costs: Costs = Costs()
    hardware: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    wall_seconds: float | None = None
    num_jobs: int | None = None
    launcher: str | None = None
