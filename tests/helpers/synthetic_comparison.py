"""Comparisons whose curves are made up by a formula, for the tests of reports. No figure here was measured."""

import math
import random
from dataclasses import fields, replace
from pathlib import Path
from statistics import fmean

from lightning_adam_mini.cli.compare.comparison import (
    Comparison,
    Entry,
    LearningRate,
    Ratios,
    TaskComparison,
)
from lightning_adam_mini.cli.compare.outcomes import ToTarget, Verdict
from lightning_adam_mini.cli.compare.run_records import Costs, Point, PrimaryMetric, RunResult
from lightning_adam_mini.cli.compare.stats import (
    estimate,
    first_reaching,
    profiles,
    target_of,
    to_target,
    verdict,
)

HEADLINES = (
    PrimaryMetric(),
    PrimaryMetric(
        metric="val_top1",
        mode="max",
        label="validation accuracy (top 1)",
        curve="val_top1",
        curve_label="validation accuracy (top 1)",
    ),
    PrimaryMetric(
        metric="test_accuracy_at_best",
        mode="max",
        label="test accuracy at the best epoch",
        curve="val_accuracy",
        curve_label="validation accuracy",
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
    primary_metrics=HEADLINES,
    validations=20,
):
    """A comparison; `lose` gives the status of a run that did not come to its end, and its message."""
    tasks = [
        _task(
            recipe,
            primary_metrics[number % len(primary_metrics)],
            optimizers,
            seeds,
            tuning_seeds,
            lrs,
            lose,
            validations,
        )
        for number, recipe in enumerate(recipes)
    ]
    return Comparison(
        tasks=tuple(tasks),
        optimizers=tuple(optimizers),
        reference=optimizers[0],
        seeds=tuple(seeds),
        tuning_seeds=tuple(tuning_seeds),
        profiles={cost: profiles(_times(tasks, cost)) for cost in ("steps", "seconds")},
        hardware=(HARDWARE,),
        versions=VERSIONS,
        command=("adam-mini", "compare", *recipes, "--out", "runs/a folder"),
        created="2025-01-01T00:00:00+00:00",
        notes=("All figures are synthetic: made by a formula for the tests.",),
    )


def without_costs(comparison):
    """The same where no run has logged a cost or a time."""
    tasks = []
    for task in comparison.tasks:
        entries = []
        for entry in task.entries:
            runs = tuple(
                replace(run, costs=Costs(), curve=tuple(replace(point, seconds=None) for point in run.curve))
                for run in entry.runs
            )
            unknown = ToTarget(by_seed={}, median=None)
            entries.append(replace(entry, runs=runs, costs=Costs(), ratios=Ratios(), seconds_to_target=unknown))
        tasks.append(replace(task, entries=tuple(entries)))
    return replace(comparison, tasks=tuple(tasks))


def _task(recipe, primary_metric, optimizers, seeds, tuning_seeds, lrs, lose, validations):
    mode, runs, best = primary_metric.mode, {}, {}
    for place, optimizer in enumerate(optimizers):

        def train(lr, seed, place=place, optimizer=optimizer):
            return _run(recipe, primary_metric, place, optimizer, lr, seed, lose, validations)

        tuning = {lr: [train(lr, seed) for seed in tuning_seeds] for lr in lrs}
        best[optimizer] = _best_lr(tuning, mode)
        more = [train(best[optimizer], seed) for seed in seeds if seed not in tuning_seeds and best[optimizer]]
        every = [*(run for own in tuning.values() for run in own), *more]
        runs[optimizer] = sorted(every, key=lambda run: (run.lr, run.seed))
    at_best = {optimizer: [run for run in runs[optimizer] if run.lr == best[optimizer]] for optimizer in optimizers}
    done = {optimizer: [run for run in own if run.status == "done"] for optimizer, own in at_best.items()}
    reference = done[optimizers[0]]
    target = target_of([run.curve[-1].value for run in reference], mode)
    entries = []
    for optimizer in optimizers:
        ours = [run.value for run in done[optimizer]]
        judged = verdict(ours, [run.value for run in reference], mode, missing=len(at_best[optimizer]) - len(ours))
        if optimizer == optimizers[0]:
            judged = Verdict(word="reference", text="reference")
        entries.append(
            Entry(
                optimizer=optimizer,
                options=("--optimizer", optimizer),
                lrs={lr: _learning_rate(lr, runs[optimizer], tuning_seeds) for lr in lrs},
                best_lr=best[optimizer],
                runs=tuple(runs[optimizer]),
                final=estimate(ours),
                steps_to_target=_to_target(done[optimizer], target, mode, "step"),
                seconds_to_target=_to_target(done[optimizer], target, mode, "seconds"),
                costs=done[optimizer][0].costs if done[optimizer] else Costs(),
                ratios=_ratios(done[optimizer], reference),
                verdict=judged,
                message="" if best[optimizer] else "no run has come to its end",
            )
        )
    entries = tuple(entries)
    return TaskComparison(
        recipe=recipe, title="A synthetic task.", primary_metric=primary_metric, target=target, entries=entries
    )


def _run(recipe, primary_metric, place, optimizer, lr, seed, lose, validations):
    lost = lose(recipe, optimizer, lr, seed)
    command = ("adam-mini", "fit", "--config", recipe, "--optimizer", optimizer, "--optimizer.lr", str(lr))
    common = {"recipe": recipe, "optimizer": optimizer, "lr": lr, "seed": seed, "command": command}
    common |= {"folder": Path("runs") / f"{place}-{lr}-{seed}", "hardware": HARDWARE, "versions": VERSIONS}
    if lost:
        return RunResult(status=lost[0], message=lost[1], steps=37, **common)
    draw = random.Random(f"{recipe}{place}{lr}{seed}")
    off = abs(math.log(lr / 3e-3)) ** 2 * 0.12 + 0.03 * place * (-1) ** place + draw.gauss(0, 0.02)
    curve = []
    for index in range(1, validations + 1):
        loss = 4.4 + off + 3 * math.exp(-4 * index / validations) + draw.gauss(0, 0.01)
        value = loss if primary_metric.mode == "min" else 1 - loss / 10
        curve.append(Point(40 * index, 0.9 * (40 + 3 * place) * index / 10, value))
    return RunResult(
        status="done",
        # A test figure lies below that of the validation which chooses the learning rate.
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


def _best_lr(tuning, mode):
    sign = 1 if mode == "min" else -1
    finished = {lr: own for lr, own in tuning.items() if all(run.status == "done" for run in own)}
    return min(finished, key=lambda lr: sign * fmean(run.selection for run in finished[lr]), default=None)


def _learning_rate(lr, runs, tuning_seeds):
    own = [run for run in runs if run.lr == lr]
    tuning = [run.selection for run in own if run.seed in tuning_seeds and run.status == "done"]
    return LearningRate(
        lr=lr,
        values={run.seed: run.value for run in own},
        statuses={run.seed: run.status for run in own},
        tuning=estimate(tuning),
        unfinished=tuple(
            run.seed for run in own if run.seed in tuning_seeds and run.status not in ("done", "diverged")
        ),
        eligible=len(tuning) == len(tuning_seeds),
    )


def _to_target(done, target, mode, axis):
    reached = {run.seed: first_reaching(run.curve, target, mode) for run in done} if target is not None else {}
    return to_target({seed: None if point is None else getattr(point, axis) for seed, point in reached.items()})


def _ratios(done, reference):
    if not done or not reference:
        return Ratios()
    names = [field.name for field in fields(Ratios)]
    return Ratios(**{name: getattr(done[0].costs, name) / getattr(reference[0].costs, name) for name in names})


def _times(tasks, cost):
    return {
        task.recipe: {entry.optimizer: getattr(entry, f"{cost}_to_target").median for entry in task.entries}
        for task in tasks
    }
