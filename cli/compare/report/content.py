"""The content of the report as texts, tables and charts, before it is rendered in any format."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from .charts import curves_chart, peak_chart, profile_chart, rates_chart, state_chart, tradeoff_chart
from .style import Chart
from .tables import ReportTable, failures_table, hardware_table, overview_table, verdict_table, versions_table
from .wording import learning_rate, number, plain

if TYPE_CHECKING:
    from ..analysis import Comparison, TaskComparison

__all__ = ["DEFINITIONS", "CommandGroup", "Page", "ShellCommand", "TaskSection", "make_page", "task_names"]

LISTED = 4

DEFINITIONS: tuple[tuple[str, str], ...] = (
    (
        "Budget",
        "Every optimizer gets a grid of learning rates. Each is trained with the tuning seeds, and the best one with "
        "the remaining seeds too. A run that diverges counts among the learning rates of its optimizer; one that "
        "failed is tried again at each start, and nothing replaces it.",
    ),
    (
        "Best learning rate",
        "The one with the best mean over the tuning seeds, among those at which every tuning seed finished; if a seed "
        "was lost at each rate, the best of those with the most seeds left. A validation metric chooses it: if the "
        "final value is a test metric, the validation metric chooses; if the final value is itself a validation "
        "metric, the same metric chooses and there is no held-out set. A rate at which a run failed or did not finish, "
        "although it did not diverge, is named below the table and leaves no verdict. If the best is the lowest or the "
        "highest of the grid, a wider grid may contain a better one.",
    ),
    (
        "Final value, mean ± std",
        "Mean and sample standard deviation (divisor n − 1) of the last value of each run, over the seeds that "
        "finished at the best learning rate. They include the tuning seeds, which chose the rate: their values are "
        "selected ones. One seed has no deviation.",
    ),
    (
        "Difference and interval",
        "Mean minus the reference's mean, with the 95\u00a0% confidence interval of Welch's t-test (Welch, Biometrika "
        "34, 1947), which does not assume equal variances. With few seeds it is wide, as it should be. Nothing is "
        "corrected for the number of comparisons.",
    ),
    (
        "Verdict",
        "Better or worse: the whole interval is on that side of zero. Within the spread: it includes zero; this number "
        "of seeds does not tell the two apart, which is neither a win nor a proof that they are equal. Failed: every "
        "run did. No verdict: there are too few values, the seeds do not differ at all, or runs were lost, and the "
        "rest would look too good.",
    ),
    (
        "Target, steps and time to it",
        "The target is the median over seeds of the reference's last validation at its best learning rate; for an even "
        "number of seeds the worse of the middle two, so that the reference's median seed reaches it. Steps and time "
        "to the target end at the first validation that is at least as good, so they are known to one validation "
        "interval. The value is the median over seeds, where a seed that never reached the target, or diverged, counts "
        "as later than any other. Seeds that failed or did not finish are left out.",
    ),
    (
        "Training time, time per step",
        "Wall-clock time from the first step on, without validation, including the time to save checkpoints. Runs that "
        "share a machine slow each other down, and not all equally: with several at once, times and their ratios are "
        "indicative. One run at a time (--jobs 1) measures them.",
    ),
    (
        "Optimizer's update",
        "The time from the end of gradient clipping to the end of the optimizer's step; part of the time per step.",
    ),
    (
        "Peak memory",
        "On CUDA the peak of the allocator on one rank; on a CPU the peak resident memory of the process, with Python, "
        "its libraries and the data.",
    ),
    (
        "Optimizer state, measured and predicted",
        "Bytes of all tensors in the optimizer state on one rank, as measured in the run, and as predicted from the "
        "shapes of the parameters before training. Costs are medians over the seeds at the best learning rate.",
    ),
    (
        "Performance profile",
        "For each task, the median time to the target divided by that of the fastest optimizer. The curve at a factor "
        "is the share of the tasks on which the optimizer is within that factor (Dolan and More, Mathematical "
        "Programming 91, 2002). The target is the reference's, so the profile depends on the choice of the reference.",
    ),
)
"""What every value of the report means."""


@dataclass(frozen=True)
class TaskSection:
    """One task: its verdicts, what to know about them, and its charts."""

    anchor: str
    name: str
    summary: str
    verdicts: ReportTable
    notes: tuple[str, ...]
    charts: tuple[Chart, ...]


@dataclass(frozen=True)
class ShellCommand:
    """A command to copy, and the run that it belongs to; the label is empty if the heading says it."""

    label: str
    text: str


@dataclass(frozen=True)
class CommandGroup:
    """Commands under one heading."""

    title: str
    commands: tuple[ShellCommand, ...]


@dataclass(frozen=True)
class Page:
    """All content of the report, in its order."""

    title: str
    summary: str
    notes: tuple[str, ...]
    started: str
    overview: ReportTable | None
    tasks: tuple[TaskSection, ...]
    across: tuple[Chart, ...]
    failures: ReportTable
    conditions: tuple[ReportTable, ...]
    commands: tuple[CommandGroup, ...]
    definitions: tuple[tuple[str, str], ...] = DEFINITIONS

    @property
    def charts(self) -> tuple[Chart, ...]:
        """All charts."""
        return tuple(chart for task in self.tasks for chart in task.charts) + self.across


def make_page(comparison: Comparison) -> Page:
    """Write the texts of a comparison and draw its charts."""
    names = task_names(comparison)
    across = (
        tradeoff_chart(comparison.tasks, names, "tradeoff") if len(comparison.tasks) > 1 else None,
        profile_chart(comparison, "steps", names),
        profile_chart(comparison, "seconds", names),
    )
    machines = [
        hardware_table(machine, "Machine." if len(comparison.hardware) == 1 else f"Machine {number}.")
        for number, machine in enumerate(comparison.hardware, start=1)
    ]
    return Page(
        title=_title(comparison, names),
        summary=_summary(comparison, names),
        notes=tuple(map(plain, comparison.notes)),
        started=_minute(comparison.created),
        overview=overview_table(comparison, names),
        tasks=tuple(_section(comparison, task, number, names) for number, task in enumerate(comparison.tasks, start=1)),
        across=tuple(chart for chart in across if chart is not None),
        failures=failures_table(comparison, names),
        conditions=(*machines, versions_table(comparison.versions)),
        commands=_commands(comparison, names),
    )


def task_names(comparison: Comparison) -> dict[str, str]:
    """Recipe -> its short name: without extension and folders, unless another recipe has the same one."""

    def short(recipe: str) -> str:
        # A packaged recipe keeps its domain.
        name = PurePath(recipe).name if recipe.startswith(("/", ".", "~")) else recipe
        return name.removesuffix(".yaml").removesuffix(".yml")

    names = {task.recipe: short(task.recipe) for task in comparison.tasks}
    taken = Counter(names.values())
    return {recipe: plain(name if taken[name] == 1 and name else recipe) for recipe, name in names.items()}


def _section(comparison: Comparison, task: TaskComparison, number: int, names: Mapping[str, str]) -> TaskSection:
    # Numbered, so that two recipes of one name in different folders have their own figures.
    slug = f"task{number}-{re.sub(r'[^a-z0-9]+', '-', task.recipe.lower().removesuffix('.yaml')).strip('-')[:40]}"
    charts = (
        curves_chart(task, f"{slug}-steps", "steps"),
        curves_chart(task, f"{slug}-time", "seconds"),
        rates_chart(task, f"{slug}-rates"),
        state_chart(task, f"{slug}-state"),
        peak_chart(task, f"{slug}-memory"),
        tradeoff_chart((task,), names, f"{slug}-tradeoff") if len(comparison.tasks) == 1 else None,
    )
    return TaskSection(
        anchor=slug,
        name=names[task.recipe],
        summary=_task_summary(comparison, task, names),
        verdicts=verdict_table(comparison, task),
        notes=tuple(f"{plain(each.optimizer)}: {plain(each.message)}" for each in task.summaries if each.message),
        charts=tuple(chart for chart in charts if chart is not None),
    )


def _minute(moment: str) -> str:
    """`2026-01-31 09:05 UTC` of ISO 8601."""
    found = re.match(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)", moment)
    return f"{found[1]} {found[2]} UTC" if found else plain(moment)


def _commands(comparison: Comparison, names: Mapping[str, str]) -> tuple[CommandGroup, ...]:
    """The command of the comparison, and those of the runs by task, as one types them."""
    groups = []
    if comparison.command:
        groups.append(CommandGroup("Command of the comparison", (ShellCommand("", shlex.join(comparison.command)),)))
    for task in comparison.tasks:
        runs = [run for summary in task.summaries for run in summary.runs if run.command]
        commands = tuple(
            ShellCommand(
                f"{plain(run.optimizer)}, lr {learning_rate(run.lr)}, seed {run.seed} ({run.status})",
                shlex.join(run.command),
            )
            for run in runs
        )
        if commands:
            groups.append(CommandGroup(f"Commands of the {len(commands)} runs of {names[task.recipe]}", commands))
    return tuple(groups)


def _title(comparison: Comparison, names: Mapping[str, str]) -> str:
    """`AdamMini and AdamW on gpt2_tiny`, or numbers if there are many."""
    optimizers, tasks = comparison.optimizers, list(names.values())
    who = _listed(optimizers) if len(optimizers) <= LISTED - 1 else f"{len(optimizers)} optimizers"
    return f"{who} on {_listed(tasks) if len(tasks) <= LISTED - 2 else f'{len(tasks)} tasks'}"


def _summary(comparison: Comparison, names: Mapping[str, str]) -> str:
    """What was compared, with which budget, against which reference, and the verdicts unless they are many."""
    sentences = [
        f"Compared: {_listed(comparison.optimizers)} on {_listed(list(names.values()))}.",
        f"The reference is {plain(comparison.reference)}.",
        _budget(comparison),
        _statuses(comparison),
        *_verdicts(comparison),
    ]
    return " ".join(sentences)


def _task_summary(comparison: Comparison, task: TaskComparison, names: Mapping[str, str]) -> str:
    """The recipe's own title, its primary metric and its target."""
    title = plain(task.title).rstrip(".")
    title = f"{title}. " if title and title != names[task.recipe] else ""
    better = "less" if task.primary_metric.mode == "min" else "more"
    metric = f"Runs are compared by their final {plain(task.primary_metric.label)} ({better} is better)."
    if task.selection_differs:
        chosen_by = _name_and_unit(task.primary_metric.curve_label)[0]
        metric += f" Learning rates were chosen by {chosen_by}, not by this metric."
    return f"{title}{metric} {_target(comparison, task)}"


def _target(comparison: Comparison, task: TaskComparison) -> str:
    reference = plain(comparison.reference)
    if task.target is None:
        summary = next((each for each in task.summaries if each.optimizer == comparison.reference), None)
        if summary is None or summary.final is None:
            return f"There is no target, because {reference} has no finished run."
        return f"There is no target, because most seeds of {reference} diverged or were not validated."
    name, unit = _name_and_unit(task.primary_metric.curve_label)
    article = "an" if name[:1].lower() in tuple("aeiou") else "a"
    value = f"{number(task.target)} {unit}".rstrip()
    return f"The target is {article} {name} of {value}, the median of the last values of {reference}'s seeds."


def _name_and_unit(label: str) -> tuple[str, str]:
    """`validation loss` and `nats a token` of a label with both."""
    name, _, unit = plain(label).partition(",")
    return name.strip(), unit.strip()


def _budget(comparison: Comparison) -> str:
    """Whether all optimizers had the same number of runs, and how many."""
    by_task = [{tuple(sorted(summary.lrs)) for summary in task.summaries} for task in comparison.tasks]
    grids = set().union(*by_task)
    sizes = sorted({len(grid) for grid in grids})
    tuning = comparison.tuning_seeds
    if len(grids) == 1:
        (grid,) = grids
        rates = f"the learning rate{'s' * (len(grid) != 1)} {_listed([learning_rate(lr) for lr in grid], 99)}"
    elif len(sizes) != 1:
        rates = f"{sizes[0] if sizes else 0} to {sizes[-1] if sizes else 0} learning rates"
    else:
        rates = f"{sizes[0]} learning rate{'s' * (sizes != [1])}"
        if any(len(grids_of_task) > 1 for grids_of_task in by_task):
            rates += ", not the same for all,"
    same = "Each optimizer had the same budget on each task" if len(sizes) == 1 else "The budgets differ"
    final = [seed for seed in comparison.seeds if seed not in tuning]
    text = f"{same}: {rates} with {_seeds(tuning)}"
    return f"{text}, then the best one with {_seeds(final)} too." if final else f"{text}."


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' * (len(seeds) != 1)} {_listed([str(seed) for seed in seeds], 99)}"


def _statuses(comparison: Comparison) -> str:
    counts = {status: count for status, count in comparison.statuses.items() if count}
    done, total = counts.pop("done", 0), len(comparison.runs)
    if done == total:
        return f"All {total} runs finished." if total != 1 else "The run finished."
    others = [
        f"{count} {'ran out of time' if status == 'timeout' else status}" for status, count in sorted(counts.items())
    ]
    unfinished = " The comparison is not complete." if counts.keys() & {"pending", "interrupted"} else ""
    return f"{done} of {total} runs finished; {_listed(others, 99)}.{unfinished}"


def _verdicts(comparison: Comparison) -> list[str]:
    """One sentence for each optimizer but the reference."""
    if len(comparison.seeds) == 1 and len(comparison.optimizers) > 1:
        return ["There is one seed, so there is no verdict: differences may be chance."]
    if len(comparison.tasks) > 1 and len(comparison.optimizers) > LISTED:
        return []  # the table of verdicts is shorter
    sentences = []
    for optimizer in comparison.optimizers:
        if optimizer == comparison.reference:
            continue
        words = Counter(task.summary_of(optimizer).verdict.word for task in comparison.tasks)
        found = [
            f"{word} than the reference" if word in ("better", "worse") else str(word)
            for word, _ in words.most_common()
        ]
        if len(comparison.tasks) > 1:
            found = [f"{text} on {count}" for text, (_, count) in zip(found, words.most_common(), strict=True)]
        of_tasks = f" of {len(comparison.tasks)} tasks" if len(comparison.tasks) > 1 else ""
        sentences.append(f"{plain(optimizer)}: {_listed(found, 99)}{of_tasks}.")
    if any(each.verdict.word == "within the spread" for task in comparison.tasks for each in task.summaries):
        sentences.append("A difference within the spread shows neither a difference nor equality.")
    return sentences


def _listed(names: Sequence[str], most: int = 8) -> str:
    """`a, b and c`; only the first ones of many."""
    texts = [plain(name) for name in names]
    if len(texts) > most:
        texts = [*texts[: most - 1], f"{len(texts) - most + 1} more"]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}" if texts else "nothing"
