"""Advice from AdamW's second moments: a short run of a recipe, a table of statistics, and overrides for the recipe."""

from __future__ import annotations

import json
import logging
import math
import shlex
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any, cast

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_adam_mini.factory import AdamMini, AdamW
from lightning_adam_mini.measure import (
    MatrixStatistics,
    SecondMomentRecord,
    describe_machine,
    least_memory_rule,
    package_versions,
    slimadam_rule,
)
from lightning_adam_mini.measure.explanation_table import collapse
from lightning_adam_mini.measure.moment_statistics import Rule
from lightning_adam_mini.partition import Structure

from ...tasks.atomic_files import write_json, write_text
from ...tasks.base import Task
from ...tasks.callbacks import SecondMomentStatistics, StopOnDivergence
from ..application import Application
from ..models import ON_ONE_CPU, build_application, trainer_options, without_start
from ..progress import log_duration
from ..recipes import read_yaml
from ..tables import text_table
from .command import SLIMADAM

__all__ = ["run"]

log = logging.getLogger(__name__)

SHARED = tuple(field.name for field in fields(AdamW) if field.name != "fused")
"""Options that AdamW and AdamMini have in common."""
ALONE = {name: value for name, value in ON_ONE_CPU.items() if name not in ("accelerator", "precision")}
"""Options of the trainer: one process, without loggers and callbacks."""
UNTIL_STEPS = {"max_epochs": -1, "min_epochs": None, "min_steps": None, "max_time": None, "fast_dev_run": False}
WITHOUT_VALIDATION = {"limit_val_batches": 0, "num_sanity_val_steps": 0}
WITHOUT_OUTPUT = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
RATIOS = (Structure.ROW, Structure.COLUMN, Structure.HEAD, Structure.WHOLE)
DEVIATIONS = (*RATIOS, Structure.FACTORED)


def run(options: Namespace, recipe: Path) -> None:
    """Train, print the statistics and the advice, and write them if `options.out` is given.

    Raises:
        ValueError: See `command.main`.
    """
    application = build_application(recipe, [*options.recipe_options, *trainer_options(ALONE)])
    own = cast("Task", application.model).optimizer_factory
    adamw = _adamw(own, options.recipe)
    layouts = own.partition_layouts if isinstance(own, AdamMini) else {}
    record = _observe(application, adamw, layouts, options)
    rule: Rule = slimadam_rule if options.rule == SLIMADAM else partial(least_memory_rule, bound=options.bound)
    overrides, matrices = record.overrides(rule), record.matrices()
    kept = sum(each.structures[rule(each)].num_values for each in matrices)
    elements = sum(math.prod(each.shape) for each in matrices)
    log.info(
        "%s\n\nMeans over %d observations. SNR: above 1, the mean of a block stands for its elements. Log-dev.: the "
        "deviation of log v from its estimate, in nats.\nAdvice of %s%s: %s numbers for these matrices, not %s.\n",
        "\n".join(text_table(_table(matrices, rule), left=2)),
        record.num_observations,
        options.rule,
        "" if options.bound is None else f" {options.bound:g}",
        f"{kept:,}",
        f"{elements:,}",
    )
    mini = own if isinstance(own, AdamMini) else AdamMini(**{name: getattr(own, name) for name in SHARED})
    advised = replace(mini, partition="element", partition_overrides=cast("Any", overrides))
    section = {"optimizer": {"class_path": "lightning_adam_mini.factory.AdamMini", "init_args": _init_args(advised)}}
    log.info("for the recipe:\n%s", yaml.safe_dump(section, sort_keys=False, width=200))
    words = _without_optimizer(options.recipe_options)
    if options.out is None:
        given = _init_args(advised, always=SHARED).items()
        asked = [word for name, value in given for word in (f"--optimizer.{name}", _as_word(value))]
        words = [options.recipe, *words, "--optimizer", "AdamMini", *asked]
    else:
        path = options.out / "recipe.yaml"
        title = f"# {options.recipe} with second moments as `{options.command_line}` advises.\n"
        content = without_start(read_yaml(recipe)) | section
        write_text(path, title + yaml.safe_dump(content, sort_keys=False, width=200))
        values = {
            "command": options.command_line,
            "recipe": options.recipe,
            **{name: getattr(options, name) for name in ("source", "steps", "from_step", "every", "rule", "bound")},
            "observations": record.num_observations,
            "optimizer": asdict(adamw),
            "num_values": kept,
            "num_elements": elements,
            "partition": advised.partition,
            "partition_overrides": overrides,
            "matrices": [{**asdict(each), "advice": rule(each)} for each in matrices],
            "hardware": describe_machine(),
            "versions": package_versions(),
        }
        write_json(options.out / "advice.json", values, nan_as_null=True)
        log.info("wrote %s, %s", options.out / "advice.json", path)
        words = [str(path), *words]
    log.info("train with it:\n%s", shlex.join(["adam-mini", "fit", *words]))


def _adamw(own: object, recipe: str) -> AdamW:
    """AdamW with the options of the recipe's optimizer.

    Raises:
        ValueError: It is neither AdamW nor AdamMini, so that its learning rate is another one.
    """
    if isinstance(own, AdamW):
        return own
    if isinstance(own, AdamMini):
        return AdamW(**{name: getattr(own, name) for name in SHARED})
    raise ValueError(
        f"{recipe} trains with {type(own).__name__}, whose options are not AdamW's, and the advice is measured with "
        "AdamW: give --optimizer AdamW and its --optimizer.lr"
    )


def _observe(
    application: Application, adamw: AdamW, layouts: Mapping[str, str], options: Namespace
) -> SecondMomentRecord:
    """Train for the options' steps with AdamW, on one device and without a run folder."""
    task = cast("Task", application.model)
    task.optimizer_factory = adamw
    settings = application.config.trainer.as_dict()
    steps = settings["max_steps"]
    if task.schedule.horizon is None and steps > 0:  # the first steps of the recipe's own run
        task.schedule = replace(task.schedule, horizon=max(steps, options.steps))
    statistics = SecondMomentStatistics(options.from_step, options.every, layouts)
    callbacks = [StopOnDivergence(), statistics, _Duration(options.steps)]
    settings |= {**UNTIL_STEPS, **WITHOUT_VALIDATION, **WITHOUT_OUTPUT, "max_steps": options.steps}
    with TemporaryDirectory() as folder:  # tasks may draw samples at the end of training
        trainer = Trainer(**settings | {"callbacks": callbacks, "default_root_dir": folder})
        trainer.fit(task, datamodule=application.datamodule)
    return statistics.record


class _Duration(Callback):
    """Logs once how long all steps take, where that is long."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._update = log_duration(f"{self._steps} steps of AdamW")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._update(trainer.global_step, self._steps)


def _table(matrices: Sequence[MatrixStatistics], rule: Rule) -> list[list[str]]:
    """A row of means for the same matrix of equal layers; the advice counts layers where it differs."""
    rows = [
        [
            "matrix",
            "role",
            "shape",
            *(f"{'SNR ' if structure is RATIOS[0] else ''}{structure}" for structure in RATIOS),
            *(f"{'log-dev. ' if structure is DEVIATIONS[0] else ''}{structure}" for structure in DEVIATIONS),
            "advice",
        ]
    ]
    for label, members in collapse(matrices, name=lambda each: each.name, alike=lambda each: (each.shape, each.role)):
        first, advice = members[0], Counter(rule(each) for each in members)
        shown = ", ".join(
            f"{count} {structure}" if len(advice) > 1 else structure for structure, count in advice.items()
        )
        shape = "x".join(map(str, first.shape))
        rows.append([label, first.role, shape, *_means(members), shown])
    return rows


def _means(members: Sequence[MatrixStatistics]) -> Iterator[str]:
    for names, statistic in ((RATIOS, "signal_to_noise"), (DEVIATIONS, "log_deviation")):
        for name in names:
            found = [getattr(each.structures[name], statistic) for each in members if name in each.structures]
            mean = fmean(found) if found else math.nan
            yield "-" if math.isnan(mean) else f"{mean:.2f}"


def _init_args(factory: AdamMini, always: Sequence[str] = ("lr",)) -> dict[str, Any]:
    """The options of a factory that differ from their defaults, and those that are always named, for YAML."""
    default = AdamMini()
    given = {
        name: value for name, value in asdict(factory).items() if value != getattr(default, name) or name in always
    }
    return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


def _as_word(value: Any) -> str:
    """A value on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def _without_optimizer(recipe_options: Sequence[str]) -> list[str]:
    """Options of the command line, with their values, but those of the optimizer, which the advice contains."""
    kept: list[str] = []
    is_left_out = False
    for word in recipe_options:
        if word.startswith("--"):
            is_left_out = word.partition("=")[0].partition(".")[0] == "--optimizer"
        if not is_left_out:
            kept.append(word)
    return kept
