"""Comparisons whose curves are made up by a formula, for the tests of reports. No value here was measured."""

import math
import random
from dataclasses import replace
from pathlib import Path

from lightning_adam_mini.cli.compare.analysis import Comparison, CostRatios, analyse_task, profiles_of
from lightning_adam_mini.cli.compare.run_records import Costs, Point, RunRecord
from lightning_adam_mini.cli.compare.stats import TimeToTarget, best_of, mean_std
from lightning_adam_mini.tasks.base import PrimaryMetric

PRIMARY_METRICS = (
    PrimaryMetric(),
    PrimaryMetric(metric="val_top1", mode="max", label="validation accuracy (top 1)"),
    PrimaryMetric(
        metric="test_accuracy_at_best",
        mode="max",
        label="test accuracy at the best epoch",
        validated="val_accuracy",
        validated_label="validation accuracy",
    ),
)
LEARNING_RATES = (1e-3, 2e-3, 3e-3, 6e-3)
HARDWARE = {"cpu": "Synthetic CPU", "cores": 2, "threads": 1, "memory_bytes": 8_000_000_000, "gpu": None}
VERSIONS = {"python": "3.11.0", "torch": "2.0 (synthetic)"}


def synthetic_comparison(
    optimizers=("AdamW", "AdamMini"),
    recipes=("llm/synthetic_tiny.yaml",),
    seeds=(0, 1, 2),
    tuning_seeds=(0,),
    lrs=LEARNING_RATES,
    lose=lambda recipe, optimizer, lr, seed: None,
    primary_metrics=PRIMARY_METRICS,
    validations=20,
):
    """A comparison; `lose` gives the status and the message of a run that did not finish, and None for others."""
    tasks = tuple(
        _task(recipe, primary_metrics[number % len(primary_metrics)], optimizers, seeds, tuning_seeds, lrs, lose,
              validations)
        for number, recipe in enumerate(recipes)
    )  # fmt: skip
    return Comparison(
        tasks=tasks,
        optimizers=tuple(optimizers),
        reference=optimizers[0],
        seeds=tuple(seeds),
        tuning_seeds=tuple(tuning_seeds),
        profiles=profiles_of(tasks),
        hardware=(HARDWARE,),
        versions=VERSIONS,
        command=("adam-mini", "compare", *recipes, "--out", "runs/a folder"),
        created="2025-01-01T00:00:00+00:00",
        notes=("All values are synthetic: made by a formula for the tests.",),
    )


def without_costs(comparison):
    """The same where no run has logged a cost or a time."""

    def bare(summary):
        runs = tuple(
            replace(run, costs=Costs(), curve=tuple(replace(point, seconds=None) for point in run.curve))
            for run in summary.runs
        )
        unknown = TimeToTarget(by_seed={}, median=None)
        return replace(summary, runs=runs, costs=Costs(), ratios=CostRatios(), seconds_to_target=unknown)

    tasks = (replace(task, summaries=tuple(map(bare, task.summaries))) for task in comparison.tasks)
    return replace(comparison, tasks=tuple(tasks))


def _task(recipe, primary_metric, optimizers, seeds, tuning_seeds, lrs, lose, validations):
    runs, best = {}, {}
    for place, optimizer in enumerate(optimizers):

        def train(lr, seed, place=place, optimizer=optimizer):
            return _run(recipe, primary_metric, place, optimizer, lr, seed, lose, validations)

        own = {lr: [train(lr, seed) for seed in tuning_seeds] for lr in lrs}
        tuning = {lr: mean_std(run.selection for run in tried if run.selection is not None)
                  for lr, tried in own.items()}  # fmt: skip
        best[optimizer] = lr = best_of(tuning, primary_metric.mode)
        others = [train(lr, seed) for seed in seeds if seed not in tuning_seeds and lr]
        every = [*(run for tried in own.values() for run in tried), *others]
        runs[optimizer] = sorted(every, key=lambda run: (run.lr, run.seed))
    return analyse_task(
        runs,
        recipe=recipe,
        title="A synthetic task.",
        primary_metric=primary_metric,
        tuning_seeds=tuning_seeds,
        best_lrs=best,
        options={optimizer: ("--optimizer", optimizer) for optimizer in optimizers},
        reference=optimizers[0],
    )


def _run(recipe, primary_metric, place, optimizer, lr, seed, lose, validations):
    lost = lose(recipe, optimizer, lr, seed)
    command = ("adam-mini", "fit", "--config", recipe, "--optimizer", optimizer, "--optimizer.lr", str(lr))
    common = {"recipe": recipe, "optimizer": optimizer, "lr": lr, "seed": seed, "command": command}
    common |= {"folder": Path("runs") / f"{place}-{lr}-{seed}", "hardware": HARDWARE, "versions": VERSIONS}
    if lost:
        return RunRecord(status=lost[0], message=lost[1], steps=37, **common)
    draw = random.Random(f"{recipe}{place}{lr}{seed}")
    off = abs(math.log(lr / 3e-3)) ** 2 * 0.12 + 0.03 * place * (-1) ** place + draw.gauss(0, 0.02)
    curve = []
    for index in range(1, validations + 1):
        loss = 4.4 + off + 3 * math.exp(-4 * index / validations) + draw.gauss(0, 0.01)
        value = loss if primary_metric.mode == "min" else 1 - loss / 10
        curve.append(Point(40 * index, 0.9 * (40 + 3 * place) * index / 10, value))
    return RunRecord(
        status="done",
        # A test metric is below the validation metric that chooses the learning rate.
        value=curve[-1].value - (0.05 if primary_metric.metric.startswith("test") else 0.0),
        selection=curve[-1].value,
        steps=curve[-1].step,
        curve=tuple(curve),
        costs=Costs(
            step_milliseconds=90 + 3.0 * place,
            optimizer_milliseconds=14.2 - 2 * place,
            units_per_second=1000.0,
            unit="samples",
            peak_memory_bytes=612e6 - 4e6 * place,
            optimizer_state_bytes=8.8e6 / (place + 1),
            predicted_state_bytes=8.8e6 / (place + 1),
            adamw_state_bytes=8.8e6,
            parameters=1.1e6,
            parameter_bytes=4.4e6,
            training_seconds=curve[-1].seconds,
        ),
        wall_seconds=100.0,
        **common,
    )
