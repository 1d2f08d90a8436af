"""The report as texts, tables and drawings, before it is written in any format."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .bars import peak_chart, state_chart
from .charts import curves_chart
from .definitions import DEFINITIONS
from .names import task_names
from .profiles import profile_chart
from .rates import rates_chart
from .style import Drawing
from .summary import page_summary, page_title, task_summary
from .tables import Table, failures_table, hardware_table, versions_table
from .verdicts import overview_table, verdict_table
from .wording import learning_rate, plain

if TYPE_CHECKING:
    from ..comparison import Comparison, TaskComparison

__all__ = ["Command", "CommandGroup", "Page", "TaskSection", "make_page"]


@dataclass(frozen=True)
class TaskSection:
    """One task: its verdicts, what to know about them, and its charts."""

    anchor: str
    name: str
    summary: str
    verdicts: Table
    notes: tuple[str, ...]
    drawings: tuple[Drawing, ...]


@dataclass(frozen=True)
class Command:
    """A command to copy, and which run it is; the label is empty where the heading says it."""

    label: str
    text: str


@dataclass(frozen=True)
class CommandGroup:
    """Commands under one heading."""

    title: str
    commands: tuple[Command, ...]


@dataclass(frozen=True)
class Page:
    """Everything that the report says, in its order."""

    title: str
    summary: str
    notes: tuple[str, ...]
    started: str
    overview: Table | None
    optimizers: tuple[str, ...]
    tasks: tuple[TaskSection, ...]
    profiles: tuple[Drawing, ...]
    failures: Table
    conditions: tuple[Table, ...]
    commands: tuple[CommandGroup, ...]
    definitions: tuple[tuple[str, str], ...]

    @property
    def drawings(self) -> tuple[Drawing, ...]:
        """All charts."""
        return tuple(drawing for task in self.tasks for drawing in task.drawings) + self.profiles


def make_page(comparison: Comparison) -> Page:
    """Draw the charts and write the texts of a comparison."""
    tasks = tuple(_section(comparison, task, number) for number, task in enumerate(comparison.tasks, start=1))
    profiles = (profile_chart(comparison, "steps"), profile_chart(comparison, "seconds"))
    machines = [
        hardware_table(machine, "Machine." if len(comparison.hardware) == 1 else f"Machine {number}.")
        for number, machine in enumerate(comparison.hardware, start=1)
    ]
    return Page(
        title=page_title(comparison),
        summary=page_summary(comparison),
        notes=tuple(map(plain, comparison.notes)),
        started=_minute(comparison.created),
        overview=overview_table(comparison),
        optimizers=tuple(map(plain, comparison.optimizers)),
        tasks=tasks,
        profiles=tuple(profile for profile in profiles if profile is not None),
        failures=failures_table(comparison),
        conditions=(*machines, versions_table(comparison.versions)),
        commands=_commands(comparison),
        definitions=DEFINITIONS,
    )


def _section(comparison: Comparison, task: TaskComparison, number: int) -> TaskSection:
    # Numbered, so that two recipes of one name in different folders have figures of their own.
    slug = f"task{number}-{re.sub(r'[^a-z0-9]+', '-', task.recipe.lower().removesuffix('.yaml')).strip('-')[:40]}"
    drawings = (
        curves_chart(task, f"{slug}-steps", "steps"),
        curves_chart(task, f"{slug}-time", "seconds"),
        rates_chart(task, f"{slug}-rates"),
        state_chart(task, f"{slug}-state"),
        peak_chart(task, f"{slug}-memory"),
    )
    return TaskSection(
        anchor=slug,
        name=task_names(comparison)[task.recipe],
        summary=task_summary(comparison, task),
        verdicts=verdict_table(comparison, task),
        notes=tuple(f"{plain(entry.optimizer)}: {plain(entry.message)}" for entry in task.entries if entry.message),
        drawings=tuple(drawing for drawing in drawings if drawing is not None),
    )


def _minute(moment: str) -> str:
    """`2026-01-31 09:05 UTC` of ISO 8601."""
    found = re.match(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)", moment)
    return f"{found[1]} {found[2]} UTC" if found else plain(moment)


def _commands(comparison: Comparison) -> tuple[CommandGroup, ...]:
    """The command of the comparison, and those of the runs by task, as one types them."""
    groups = []
    if comparison.command:
        groups.append(CommandGroup("Command of the comparison", (Command("", shlex.join(comparison.command)),)))
    for task in comparison.tasks:
        runs = [run for entry in task.entries for run in entry.runs if run.command]
        commands = tuple(
            Command(
                f"{plain(run.optimizer)}, lr {learning_rate(run.lr)}, seed {run.seed} ({run.status})",
                shlex.join(run.command),
            )
            for run in runs
        )
        if commands:
            groups.append(
                CommandGroup(f"Commands of the {len(commands)} runs of {task_names(comparison)[task.recipe]}", commands)
            )
    return tuple(groups)
